"""diffusers: a pipeline whose unet or transformer has the EMA weights of a run.

    load_ema(pipeline, "my-unet")            # for good; says which version the weights are of
    with ema_scope(pipeline, "my-unet"):     # and the pipeline's own weights after the block
        pipeline(...)

Knows: what diffusers, accelerate and peft do to a component of a pipeline, and which of these leave no parameters that
could be written to; how names of a run differ from names of a component. Does not know: how weights are read or
written. Imports no framework: a pipeline is what has its parts in ``components``.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ema_client.client import EmaClient
from ema_client.errors import UsageError, listed
from ema_client.protocol import RunLayout, WeightsInfo
from ema_client.targets import Wished
from ema_client.tensors.wrappers import bare_names
from ema_client.training.aside import SetAside

__all__ = ["ema_scope", "load_ema"]

#: The parts of a pipeline that a training trains as a rule: unet, transformer, and the second of a pipeline with two.
_DENOISER = re.compile(r"(?:unet|transformer)(?:_\d+)?\Z")
#: In front of every name of a model of peft's get_peft_model(); diffusers' add_adapter() puts nothing there.
_PEFT_PREFIX = "base_model.model."
#: The dtypes in which parameters are numbers, and not codes of a quantization.
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: A parameter of an adapter, and the adapter's name behind that of the parameter: ``to_q.lora_A.default.weight``.
_OF_ADAPTER = re.compile(r"(?<=\.)((?:lora|lokr|hada|ia3|oft|boft|vera)_\w+|modules_to_save)\.([^.]+)(?=\.|\Z)")


def load_ema(
    pipeline: Any,
    run: str,
    *,
    component: str | None = None,
    average: str | None = None,
    snapshot: str | None = None,
    url: str | None = None,
    token: str | None = None,
    client: EmaClient | None = None,
    **wished: Unpack[Wished],
) -> WeightsInfo:
    """Write the EMA weights of a run into the unet or transformer of a diffusers pipeline; says what the weights are.

    Devices and dtypes of the pipeline stay: weights are moved and cast. What a run does not average, such as the layers
    below a LoRA, stays as well. Nothing is written before all weights have come and, whatever is raised, nothing was.

    Args:
        pipeline: a DiffusionPipeline, or anything with its parts in ``components``.
        run: the run's name.
        component: "unet", "transformer", "text_encoder" or another part of the pipeline; by default the only unet or
            transformer. Of a run that averages several parts (``unet.…`` and ``text_encoder.…``) name the part.
        average, snapshot, wished: as for EmaClient.pull(): ``sigma_rel=0.1`` of a run with ``posthoc``, for one.
        url, token: as for EmaClient.
        client: an EmaClient to use instead of a new one.

    The names of run and component may differ by what trainings put in front (``model.unet.``, ``base_model.model.``),
    by wrappers (torch.compile, DDP), and by the name of the only adapter.

    Raises UsageError, naming tensors, where the run is not of that component, and for a component whose parameters are
    not its own any more: quantized, offloaded layer by layer or in groups, cast layer by layer, with projections or a
    LoRA fused. Besides, what EmaClient.pull() raises.
    """
    with _service(url, token, client) as service:
        part = _found(pipeline, component, service.layout(run))
        return service.copy_to(run, part.targets, average=average, snapshot=snapshot, prefix=part.prefix, **wished)


@contextlib.contextmanager
def ema_scope(
    pipeline: Any,
    run: str,
    *,
    component: str | None = None,
    average: str | None = None,
    snapshot: str | None = None,
    url: str | None = None,
    token: str | None = None,
    client: EmaClient | None = None,
    **wished: Unpack[Wished],
) -> Iterator[WeightsInfo]:
    """load_ema() inside the block, and the pipeline's own weights again after the block, whatever the block raises.

    The block is given what load_ema() returns. The own weights lie meanwhile beside the EMA, on the same device. Raises
    as load_ema(), before anything is overwritten.
    """
    aside = SetAside()
    with _service(url, token, client) as service:
        part = _found(pipeline, component, service.layout(run))
        tensors = list(part.targets.values())
        aside.store(tensors)
        try:
            yield service.copy_to(run, part.targets, average=average, snapshot=snapshot, prefix=part.prefix, **wished)
        finally:
            aside.restore(tensors)


@dataclass(frozen=True, slots=True)
class _Part:
    """A component's tensors to write, by their names in the run; prefix: of these names, where the run has others."""

    targets: dict[str, Tensor]
    prefix: str | None


def _service(url: str | None, token: str | None, client: EmaClient | None) -> AbstractContextManager[EmaClient]:
    if client is None:
        return EmaClient(url, token=token)
    if url is not None or token is not None:
        raise UsageError("both a client and a url or token are given", hint="give one: a client has its own url")
    return contextlib.nullcontext(client)


def _found(pipeline: Any, component: str | None, layout: RunLayout) -> _Part:
    """The tensors of the component that the run is of. Raises UsageError."""
    name, module = _component(pipeline, component)
    what = f"{name} ({type(module).__name__})"
    _check_own(what, module)
    tensors = _named(module)
    said = [spec.name for spec in layout.layout]
    prefix = _prefix(said, tensors)
    names = [each for each in said if each.startswith(prefix)]
    adapter = _adapter(what, names, tensors)
    own = {each: _renamed(each.removeprefix(prefix), adapter) for each in names}
    faults = [f"{each!r} is not in {what}" for each, bare in own.items() if bare not in tensors]
    if component is None:
        faults += [f"{each!r} is of another part" for each in said if not each.startswith(prefix)]
    if faults:
        raise UsageError(
            f"run {layout.run!r} is not of {name}: {listed(faults, '; ')}; nothing was written",
            hint=_hint(said, tensors),
        )
    targets = {each: tensors[bare] for each, bare in own.items()}
    _check_writable(what, targets)
    return _Part(targets, prefix if len(names) < len(said) else None)


# --- the component --------------------------------------------------------------------------------------------------


def _component(pipeline: Any, wanted: str | None) -> tuple[str, nn.Module]:
    """A part of a pipeline and its name; by default the only one that is a unet or transformer."""
    parts = getattr(pipeline, "components", None)
    if not isinstance(parts, Mapping):
        raise UsageError(
            f"a diffusers pipeline is needed, not a {type(pipeline).__name__}",
            hint="of a model by itself: EmaClient().copy_to(run, model)",
        )
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    found = [wanted] if wanted is not None else [name for name in modules if _DENOISER.match(name)]
    if len(found) != 1 or found[0] not in modules:
        what = f"no component {wanted!r}" if wanted is not None else f"{len(found)} components that may be meant"
        raise UsageError(
            f"{type(pipeline).__name__} has {what}",
            hint=f"name one by component=: {', '.join(map(repr, modules)) or 'this pipeline has no models'}",
        )
    return found[0], modules[found[0]]


def _named(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a component by their names without wrappers."""
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    bare = bare_names(module, tensors)
    return {name.removeprefix(_PEFT_PREFIX): tensors[original] for original, name in bare.items()}


def _check_own(what: str, module: nn.Module) -> None:
    """Raises UsageError where something else than the module's parameters is what the module computes with."""
    for part in module.modules():
        if getattr(part, "fused_projections", False):
            raise UsageError(
                f"{what} has fused projections, which are copies of the parameters",
                hint="call pipeline.unfuse_qkv_projections() first, and fuse_qkv_projections() after it",
            )
        if getattr(part, "merged_adapters", None):
            raise UsageError(
                f"{what} has a LoRA fused into its parameters",
                hint="call pipeline.unfuse_lora() first, and fuse_lora() after it",
            )
        hooks = getattr(part, "_diffusers_hook", None)
        for hook, made_by in {"group_offloading": "group_offload", "layerwise_casting": "layerwise_casting"}.items():
            if hooks is not None and hooks.get_hook(hook) is not None:
                raise UsageError(
                    f"{what} keeps its parameters elsewhere (enable_{made_by}())",
                    hint=f"load the EMA first, and call enable_{made_by}() after it",
                )


def _check_writable(what: str, targets: Mapping[str, Tensor]) -> None:
    """Raises UsageError for tensors that hold no numbers of their own."""
    for name, tensor in targets.items():
        if tensor.is_meta:
            raise UsageError(
                f"{name!r} of {what} is on the meta device: its values are kept elsewhere (sequential offload, disk)",
                hint="load the EMA first, and call enable_sequential_cpu_offload() after it",
            )
        if type(tensor.data) is not torch.Tensor or tensor.dtype not in _FLOATS:
            raise UsageError(
                f"{name!r} of {what} is quantized: {type(tensor).__name__} of {tensor.dtype}",
                hint="load the EMA into the pipeline as it was before quantization, and quantize it after that",
            )


# --- names ----------------------------------------------------------------------------------------------------------


def _prefix(said: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """What stands in front of the most names of the run that are then the component's; the shortest of several."""
    known = {_without_adapter(name) for name in tensors}
    votes: Counter[str] = Counter()
    for name in said:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        votes.update(name[:start] for start in starts if _without_adapter(name[start:]) in known)
    return min(votes, key=lambda prefix: (-votes[prefix], len(prefix)), default="")


def _adapter(what: str, said: Iterable[str], tensors: Iterable[str]) -> str | None:
    """The component's name for the only adapter of the run, where the two differ; else None."""
    (theirs, ours) = ({match[2] for name in names for match in _OF_ADAPTER.finditer(name)} for names in (said, tensors))
    if theirs <= ours or len(theirs) != 1 or not ours:
        return None
    if len(ours) > 1:
        raise UsageError(
            f"{what} has adapters {listed(sorted(ours))}, and the run averages {listed(sorted(theirs))}",
            hint="give the adapter the name that the run has for it, or unload the others",
        )
    return ours.pop()


def _renamed(name: str, adapter: str | None) -> str:
    return name if adapter is None else _OF_ADAPTER.sub(rf"\1.{adapter}", name)


def _without_adapter(name: str) -> str:
    return _OF_ADAPTER.sub(r"\1", name)


def _hint(said: Iterable[str], tensors: Iterable[str]) -> str:
    (theirs, ours) = (any(_OF_ADAPTER.search(name) for name in names) for names in (said, tensors))
    if theirs and not ours:
        return "the run averages an adapter: give the component one of that configuration first (add_adapter())"
    if ours and not theirs:
        return "the component has an adapter, and the run averages whole layers: call pipeline.unload_lora_weights()"
    return "name the part by component=, or use a pipeline of the model that was trained"
