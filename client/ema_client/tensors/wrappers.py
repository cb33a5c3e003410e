"""Which modules are wrappers, and so which components of a parameter's name say how a model is run, not what it is.

The word alone does not tell: a model of its own may have a part called ``module``. Wrappers that keep the model as
``module`` are known by their class; those with a word of their own (Fabric's ``_forward_module``, Opacus' ``_module``)
by having nothing else.

Knows: wrappers, by the names of their classes and attributes; none is imported. Does not know: tensors, HTTP, runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ema_client.tensors.names import distinct, is_wrappers_word

__all__ = ["bare_name", "bare_names"]

#: Classes, of torch and others, that have the model they wrap as ``module``.
_CLASSES = frozenset({"DataParallel", "DistributedDataParallel", "AveragedModel", "DeepSpeedEngine", "Float16Module"})
#: Attributes by which wrappers that have nothing else have the model.
_WORDS = frozenset({"_forward_module", "_module", "_original_module"})


def bare_name(model: nn.Module, name: str) -> str:
    """The name of a parameter or buffer of ``model`` without the components of wrappers.

    The last component is the tensor's own name and stays, whatever that name is.
    """
    *path, last = name.split(".")
    bare = []
    module: nn.Module | None = model
    for component in path:
        if not (is_wrappers_word(component) or (module is not None and _is_wrapped(module, component))):
            bare.append(component)
        # None: FSDP1 leaves wrappers out of its names, and a mapping's names are of no modules.
        module = None if module is None else module._modules.get(component)
    return ".".join([*bare, last])


def bare_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """name -> bare name, in the order given. Raises NameCollision where two names share a bare name."""
    return distinct(((name, bare_name(model, name)) for name in names), "without wrappers' prefixes")


def _is_wrapped(module: nn.Module, component: str) -> bool:
    """Whether ``component`` is the attribute by which ``module``, a wrapper, has the model."""
    if component == "module":
        return any(each.__name__ in _CLASSES for each in type(module).__mro__)
    return component in _WORDS and module._modules.keys() <= _WORDS and not (module._parameters or module._buffers)
