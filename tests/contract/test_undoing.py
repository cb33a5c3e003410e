"""What a function has taken, and gives back where it fails, goes back whatever the error is.

A clean-up that stands in a handler of some errors is left out by the next one: memory counted that nobody has, a file
that nobody knows. A clean-up stands in ``finally``, in a ``with``, or on an ExitStack whose pop_all() ends the danger.
Knows the sources' syntax, and how this project calls its clean-ups. Does not know which errors there are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "ema_service").rglob("*.py"), *(ROOT / "client" / "ema_client").rglob("*.py")])

CLEAN_UPS = frozenset({"close", "free", "give_back", "release", "remove", "remove_tree", "rmtree", "trim", "unlink"})


def called(tree: ast.AST) -> Iterator[str]:
    """The last name of each function that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    yield name


def whatever(tree: ast.Try) -> bool:
    """Whether a last handler is for any error."""
    last = tree.handlers[-1].type
    return isinstance(last, ast.Name) and last.id == "BaseException"


def left_out(tree: ast.AST) -> list[str]:
    """Each handler of some errors alone that cleans up and raises."""
    return [
        f"line {handler.lineno}: except {ast.unparse(handler.type)}"
        for tried in ast.walk(tree)
        if isinstance(tried, ast.Try) and tried.handlers and not whatever(tried)
        for handler in tried.handlers
        if handler.type and isinstance(handler.body[-1], ast.Raise)
        for cleaned in [CLEAN_UPS.intersection(name.lstrip("_") for name in called(handler))]
        if cleaned
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_clean_up_is_for_every_error(path: Path) -> None:
    """No handler of some errors cleans up and raises."""
    assert left_out(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("try:\n f()\nexcept OSError:\n b.give_back(1)\n raise", 1),
        ("try:\n f()\nexcept OSError as fault:\n self._remove(p)\n raise Other() from fault", 1),
        ("try:\n f()\nexcept OSError:\n tell()\n raise", 0),
        ("try:\n f()\nexcept OSError:\n b.give_back(1)", 0),
        ("try:\n f()\nexcept OSError:\n s.close()\n raise\nexcept BaseException:\n s.close()\n raise", 0),
        ("try:\n f()\nfinally:\n s.close()", 0),
    ],
)
def test_it_is_seen(source: str, found: int) -> None:
    """A handler that leaves errors out, and what looks like one."""
    assert len(left_out(ast.parse(source))) == found
