"""What a trainer is given as its model: a module or, where there is none, tensors by name.

Knows modules and mappings. Does not know what is averaged, the service, or why a name is what it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ema_client.tensors.layout import Named, not_named, state_of

__all__ = ["Given", "Named"]


class Given:
    """Makes a module of what is given; the same module for the same tensors, so that their names are looked at once."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._module: nn.Module = nn.Module()

    def module(self, model: Named) -> nn.Module:
        """The module itself, or one that has a mapping's tensors, each trained or not, as its parameters.

        Raises UsageError for what has no names, and for a mapping that cannot be sent.
        """
        if isinstance(model, nn.Module):
            return model
        if not isinstance(model, Mapping):
            raise not_named(model)
        known = self._tensors
        if known.keys() != model.keys() or any(known[name] is not tensor for name, tensor in model.items()):
            self._tensors, self._module = dict(model), _NamedTensors(state_of(model))
        return self._module


class _NamedTensors(nn.Module):
    """A module whose parameters share the memory of ``tensors``, by their names, which may have dots."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        made: dict[int, nn.Parameter] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in made:
                is_trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
                made[id(tensor)] = tensor if is_trained else nn.Parameter(tensor.detach())  # type: ignore[assignment]
            # register_parameter() takes no dots.
            self._parameters[name] = made[id(tensor)]
