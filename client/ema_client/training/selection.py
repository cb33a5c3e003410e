"""Which tensors of a model are averaged: chosen once, found again in the model at every update.

While the model stays as it was, finding its tensors costs microseconds: the identities, dtypes, shapes and flags of all
tensors are compared with those of the latest update. Only where something differs are the names looked at again, and a
fault is told by name.

Knows modules, parameters and buffers, and their canonical names. Does not know what a sharded model's ranks hold, or
how tensors travel.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from ema_client import wire
from ema_client.client import EmaClient
from ema_client.errors import NameCollision, UsageError, listed
from ema_client.protocol import TensorSpec, WeightsInfo
from ema_client.targets import Wished
from ema_client.tensors.layout import dtype_name, is_lazy, parameters_of, specs_of, state_of
from ema_client.tensors.wrappers import bare_name
from ema_client.tensors.writing import write
from ema_client.training.sharding import is_sharded

__all__ = ["BufferPolicy", "FrozenPolicy", "Selection"]

#: What becomes of the model's buffers: left alone or, where a buffer is floating point and saved with the model,
#: averaged or copied.
BufferPolicy = Literal["none", "average", "copy"]
#: What becomes of a parameter that is frozen later: the average goes on, of a value that stays; or an error is raised.
#: "average": frozen parameters are averaged from the beginning, for a training that freezes and unfreezes.
FrozenPolicy = Literal["hold", "error", "average"]


class Selection:
    """The averaged tensors of a whole model: parameters that require gradients now, and others or buffers if asked for.

    Args:
        model: looked at now, and not referred to later.
        buffers, frozen: see BufferPolicy and FrozenPolicy.
        dtype: the dtype that averaged tensors are sent as; by default each tensor's own. Copied tensors are sent as
            they are.

    Raises UsageError for a model without such parameters, or with a tensor that cannot be sent; NameCollision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        buffers: BufferPolicy = "none",
        frozen: FrozenPolicy = "hold",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        _check_choice("buffers", buffers, BufferPolicy)
        _check_choice("frozen", frozen, FrozenPolicy)
        self._frozen_policy = frozen
        self._buffers = buffers != "none"
        self._dtype = None if dtype is None else dtype_name(dtype)
        named = self._all_named(model)
        chosen_buffers, self.left_out = _chosen_buffers(model) if self._buffers else ({}, ())
        chosen = parameters_of(model, frozen=frozen == "average") | chosen_buffers
        # left_out: names of buffers that would be averaged or copied, and hold an infinity or a NaN.
        #: Names of the tensors to copy instead of averaging.
        self.copied = frozenset(chosen_buffers if buffers == "copy" else ())
        specs = [self._sent(spec) for spec in specs_of(state_of(chosen))]
        #: Of the tensors as sent, in canonical order.
        self.specs = tuple(entry.spec for entry in wire.place(specs))
        self._by_name = {spec.name: spec for spec in self.specs}
        #: Other name of a tied tensor -> the name by which the tensor is averaged.
        names = {id(tensor): name for name, tensor in chosen.items()}
        self._twins = {
            name: names[id(tensor)] for name, tensor in named.items() if id(tensor) in names and name not in chosen
        }
        self._model: weakref.ref[nn.Module] | None = None
        self._signature: list[tuple[Any, ...]] = []
        self._positions: list[int] = []

    def of(self, model: nn.Module) -> tuple[list[Tensor], list[str]]:
        """The model's tensors of now, in the order of ``specs``; and names of those frozen since the latest call.

        Raises UsageError naming what is missing, new or changed.
        """
        tensors = list(_tensors(model))
        signature = [(id(t), t.requires_grad, t.dtype, None if is_lazy(t) else t.shape) for t in tensors]
        if self._model is not None and self._model() is model and signature == self._signature:
            return [tensors[position] for position in self._positions], []
        found = self._found(model)
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        self._positions = [places[id(tensor)] for tensor in found]
        self._model, self._signature = weakref.ref(model), signature
        if self._frozen_policy == "average":
            return found, []
        return found, [spec.name for spec, t in zip(self.specs, found, strict=True) if _is_frozen(t)]

    def targets(self, model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[Tensor, str]]]:
        """The model's tensors to fill, by name, frozen ones too; and its untied twins, each with the name to copy from.

        An untied twin is tied in the model of the selection, and not in ``model``. Raises UsageError naming missing
        tensors, and tensors that require gradients and are not averaged.
        """
        named = self._all_named(model)
        faults = self._missing(named) + self._new(model, named, untied=False)
        if faults:
            raise _mismatch(faults)
        targets = {spec.name: self._at(named, spec.name) for spec in self.specs}
        twins = [
            (named[twin], name)
            for twin, name in self._twins.items()
            if twin in named and named[twin] is not targets[name]
        ]
        return targets, twins

    def written(self, model: nn.Module) -> list[Tensor]:
        """The tensors to be written by pull_into(). Raises as targets()."""
        targets, twins = self.targets(model)
        return [*targets.values(), *(twin for twin, _ in twins)]

    def pull_into(
        self,
        model: nn.Module,
        client: EmaClient,
        run: str,
        *,
        snapshot: str | None = None,
        memory: Tensor | None = None,
        **wished: Unpack[Wished],
    ) -> WeightsInfo:
        """Write the EMA weights, or those of a snapshot, into the model's tensors, once all have come.

        memory, wished: see EmaClient.copy_to(). Returns what was written.

        Raises as targets().
        """
        targets, twins = self.targets(model)
        info = client.copy_to(run, targets, snapshot=snapshot, memory=memory, **wished)
        write([twin for twin, _ in twins], [targets[name] for _, name in twins])
        return info

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its tensors anew, in a model of its own.
        return {**self.__dict__, "_model": None, "_signature": [], "_positions": []}

    def _found(self, model: nn.Module) -> list[Tensor]:
        named = self._all_named(model)
        faults = self._missing(named) + self._new(model, named, untied=True)
        if not faults:
            present = {spec.name: self._at(named, spec.name) for spec in self.specs}
            faults = self._changed(present)
            if not faults:
                return list(state_of(present).values())
        raise _mismatch(faults)

    def _all_named(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameters, trained or not, and buffers if asked for, by all canonical names of each.

        Raises NameCollision; UsageError for a model that was sharded since the selection.
        """
        if is_sharded(model):
            raise UsageError(
                f"{type(model).__name__} was sharded after its RemoteEma was made",
                hint="make the RemoteEma when the model is sharded, or use the callback of ema_client.integrations",
            )
        named: dict[str, Tensor] = {}
        originals: dict[str, str] = {}
        parameters = list(model.named_parameters(remove_duplicate=False))
        for original, tensor in [*parameters, *(_saved_buffers(model) if self._buffers else ())]:
            name = bare_name(model, original)
            first = originals.setdefault(name, original)
            if named.setdefault(name, tensor) is not tensor:
                raise NameCollision(f"{first!r} and {original!r} are both {name!r} without wrappers' prefixes")
        return named

    def _missing(self, named: dict[str, Tensor]) -> list[str]:
        twins = set(self._twins.values())
        return [f"{n!r} is missing" for n in self._by_name if n not in named and n not in twins]

    def _at(self, named: dict[str, Tensor], name: str) -> Tensor:
        """The tensor averaged as ``name``, which a model that is wrapped otherwise may have by the tied name only."""
        if name in named:
            return named[name]
        twins = (twin for twin, averaged in self._twins.items() if averaged == name and twin in named)
        if (twin := next(twins, None)) is None:
            raise _mismatch([f"{name!r} is missing"])
        return named[twin]

    def _new(self, model: nn.Module, named: dict[str, Tensor], *, untied: bool) -> list[str]:
        """What is wrong with trained parameters that are not averaged.

        untied: also with parameters that were tied to an averaged parameter and are no longer.
        """
        averaged = {id(named[name]) for name in self._by_name if name in named}
        twins = set() if untied else set(self._twins)
        trained = (bare_name(model, name) for name, tensor in model.named_parameters() if tensor.requires_grad)
        new = [n for n in trained if n not in self._by_name and n not in twins and id(named[n]) not in averaged]
        return [
            f"{n!r} is no longer tied to {self._twins[n]!r}"
            if n in self._twins
            else f"{n!r} is new or no longer frozen"
            for n in new
        ]

    def _changed(self, present: dict[str, Tensor]) -> list[str]:
        now = {spec.name: self._sent(spec) for spec in specs_of(state_of(present))}
        faults = [
            f"{name!r} is {spec.dtype} {spec.shape}, was {was.dtype} {was.shape}"
            for name, spec in now.items()
            if spec != (was := self._by_name[name])
        ]
        if self._frozen_policy == "error":
            faults += [f"{name!r} is frozen" for name, tensor in present.items() if _is_frozen(tensor)]
        return faults

    def _sent(self, spec: TensorSpec) -> TensorSpec:
        # A copied tensor is to be the trainer's, bit for bit.
        if self._dtype is None or spec.name in self.copied:
            return spec
        return TensorSpec(spec.name, spec.shape, self._dtype)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers of a model, in the same order while the model is the same.

    Quicker than named_parameters().
    """
    seen = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        waiting += module._modules.values()
        for group in (module._parameters, module._buffers):
            for tensor in group.values():
                if tensor is not None:
                    yield tensor


def _chosen_buffers(model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The buffers to average or copy, each once, by canonical name; and names of those that no average can be made of.

    A buffer that holds an infinity, such as a mask, would have every update refused.
    """
    found: dict[str, Tensor] = {}
    seen = set()
    for name, buffer in _saved_buffers(model):
        if id(buffer) not in seen:
            seen.add(id(buffer))
            found[bare_name(model, name)] = buffer
    left_out = tuple(name for name, buffer in found.items() if not (is_lazy(buffer) or buffer.isfinite().all()))
    return {name: buffer for name, buffer in found.items() if name not in left_out}, left_out


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point buffers that are saved with the model: no counters, no tables that each start makes anew."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                yield (f"{path}.{name}" if path else name), buffer


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _check_choice(what: str, given: str, policy: Any) -> None:
    if given not in get_args(policy):
        raise UsageError(f"{what}={given!r} is unknown", hint=f"give one of {', '.join(map(repr, get_args(policy)))}")


def _mismatch(faults: list[str]) -> UsageError:
    return UsageError(
        f"the model's tensors are not those of the run: {listed(faults, '; ')}",
        hint="add and unfreeze parameters before the RemoteEma is made, or average frozen ones from the beginning "
        "(frozen='average'), or make a new run for the changed model",
    )
