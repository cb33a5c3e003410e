"""Canonical and dotless names. Knows names as strings; real wrappers of torch are in test_tensors.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_client.errors import NameCollision
from ema_client.tensors.names import canonical_names, dotless_names, in_front

COMPONENTS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "conv", "0", "weight"]


def canonical_name(name: str) -> str:
    """Of a file that holds nothing else."""
    return canonical_names([name])[name]


DOTTED = st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=8).map(".".join)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv.weight", "conv.weight"),
        ("weight", "weight"),
        ("module.conv.weight", "conv.weight"),
        ("module.module.conv.weight", "conv.weight"),
        ("_orig_mod.conv.weight", "conv.weight"),
        ("module._orig_mod.conv.weight", "conv.weight"),
        ("_orig_mod.module.conv.weight", "conv.weight"),
        ("layers.0._checkpoint_wrapped_module.conv.weight", "layers.0.conv.weight"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module._orig_mod.weight", "layers.0.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("_forward_module.module.weight", "weight"),
        ("_module.conv.weight", "conv.weight"),
        ("conv._module.weight", "conv._module.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("modules.weight", "modules.weight"),
        ("module", "module"),
        ("_orig_mod._orig_mod", "_orig_mod"),
    ],
)
def test_wrappers_components_are_removed(name: str, expected: str) -> None:
    """Wrappers' components go wherever they are, ``module`` only in front, and the parameter's own name never."""
    assert canonical_name(name) == expected


@given(DOTTED)
def test_canonical_name_is_a_fixed_point(name: str) -> None:
    """A canonical name is its own canonical name: a run can be resumed with whatever wrapping."""
    assert canonical_name(canonical_name(name)) == canonical_name(name)


@given(DOTTED, st.sampled_from(["_orig_mod", "module", "_fsdp_wrapped_module"]))
def test_one_more_wrapper_changes_nothing(name: str, wrapper: str) -> None:
    """Wrapping a model once more leaves its canonical names as they were."""
    assert canonical_name(f"{wrapper}.{name}") == canonical_name(name)


def test_canonical_names_keep_the_order_given() -> None:
    """The answer maps each original to its canonical name, in the order of the originals."""
    names = canonical_names(["module.b", "module.a.x"])

    assert list(names.items()) == [("module.b", "b"), ("module.a.x", "a.x")]


@pytest.mark.parametrize("word", ["module", "_module", "_forward_module"])
def test_words_in_front_of_some_names_are_the_models_own(word: str) -> None:
    """A wrapper is in front of all names; where it may be either, it is told, and can be kept."""
    own = [f"{word}.weight", "head.weight", "head._orig_mod.bias"]
    assert list(canonical_names(own).values()) == [f"{word}.weight", "head.weight", "head.bias"]
    assert in_front(own) == ""
    wrapped = [f"{word}.{name}" for name in own]
    assert list(canonical_names(wrapped).values()) == [f"{word}.weight", "head.weight", "head.bias"]
    assert in_front(wrapped) == f"{word}."
    kept = canonical_names(wrapped, as_named=True)
    assert list(kept.values()) == [f"{word}.{word}.weight", f"{word}.head.weight", f"{word}.head.bias"]
    assert (canonical_names([]), in_front([])) == ({}, "")


def test_collision_names_both_originals() -> None:
    """Two parameters that are one without prefixes are refused, and both are named."""
    with pytest.raises(NameCollision) as refused:
        canonical_names(["_orig_mod.a.weight", "b", "a._orig_mod.weight"])

    assert "'a._orig_mod.weight'" in refused.value.detail
    assert "'_orig_mod.a.weight'" in refused.value.detail


def test_dotless_names_are_litemas() -> None:
    """LitEma's buffer name is the parameter's name without dots."""
    assert dotless_names(["a.b.weight", "c"]) == {"a.b.weight": "abweight", "c": "c"}


def test_dotless_collision_names_both_originals() -> None:
    """Where LitEma would let two parameters share a buffer, both are named."""
    with pytest.raises(NameCollision, match=r"'a\.bc' and 'ab\.c'"):
        dotless_names(["a.bc", "ab.c"])


@pytest.mark.parametrize("name", ["decay", "num_updates", "de.cay", "num_.updates"])
def test_dotless_names_leave_litemas_own_buffers_alone(name: str) -> None:
    """A parameter whose buffer would overwrite LitEma's decay or counter is refused by its name."""
    with pytest.raises(NameCollision, match=name.replace(".", r"\.")):
        dotless_names(["conv.weight", name])
