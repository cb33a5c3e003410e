"""What refers to itself lives until a garbage collection, and the memory that it refers to with it: gigabytes here.

Two ways lead there by accident: a function within a function that knows itself, and the raising of a fault that a
variable of the same function refers to, for the fault's traceback refers to the variables. Knows the sources' syntax.
Does not know what is large (tests/e2e/test_memory_returns.py looks at the memory itself).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "ema_service").rglob("*.py"), *(ROOT / "client" / "ema_client").rglob("*.py")])
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, *, nested: bool = False) -> Iterator[tuple[Function, bool]]:
    """Every function, and whether it is made within another one."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, Function):
            yield child, nested
            yield from functions(child, nested=True)
        else:
            yield from functions(child, nested=nested and not isinstance(child, ast.ClassDef))


def names_read(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def raised_and_kept(tree: ast.AST, goes: frozenset[str] = frozenset()) -> Iterator[ast.Raise]:
    """Each raising of a variable that lives on in its function. goes: variables that end before."""
    for child in ast.iter_child_nodes(tree):
        ends = goes
        if isinstance(child, ast.Try):
            deleted = (node for last in child.finalbody for node in ast.walk(last) if isinstance(node, ast.Delete))
            ends |= {name.id for each in deleted for name in each.targets if isinstance(name, ast.Name)}
        if isinstance(child, ast.ExceptHandler) and child.name:
            ends |= {child.name}
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Name):
            name = child.exc.id
            if name not in ends and not name.lstrip("_")[0].isupper():
                yield child
        yield from raised_and_kept(child, ends)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_refers_to_itself(path: Path) -> None:
    """No nested function reads its own name, and who raises a variable deletes it (``finally: del``)."""
    tree = ast.parse(path.read_text())
    closures = [found.name for found, nested in functions(tree) if nested and found.name in names_read(found)]
    raised = [f"line {each.lineno}: {ast.unparse(each)}" for each in raised_and_kept(tree)]

    assert closures == []
    assert raised == []


@pytest.mark.parametrize(
    ("source", "closures", "raised"),
    [
        ("def f():\n def g():\n  later(g)\n return g", 1, 0),
        ("def f():\n def g():\n  later(f)\n return g", 0, 0),
        ("def f(fault):\n raise fault", 0, 1),
        ("def f(fault):\n try:\n  raise fault\n finally:\n  del fault", 0, 0),
        ("try:\n f()\nexcept OSError as fault:\n raise fault from None", 0, 0),
        ("def f():\n raise StopIteration", 0, 0),
    ],
)
def test_both_are_seen(source: str, closures: int, raised: int) -> None:
    """Each of the two, and what looks like it."""
    tree = ast.parse(source)

    assert len([found for found, nested in functions(tree) if nested and found.name in names_read(found)]) == closures
    assert len(list(raised_and_kept(tree))) == raised
