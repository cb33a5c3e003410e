"""What a module offers is what its ``__all__`` says, and every module says what it knows.

Knows the source files of both packages. Does not know who may import whom (test_imports.py).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import warnings
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"ema_service": ROOT / "ema_service", "ema_client": ROOT / "client" / "ema_client"}


FRAMEWORKS = {"lightning", "transformers"}


def _modules() -> dict[str, Path]:
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    }


MODULES = _modules()


def _with_all() -> list[str]:
    return [name for name, path in MODULES.items() if _defines_all(ast.parse(path.read_text()))]


def _defines_all(tree: ast.Module) -> bool:
    targets = (t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets)
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def _imported(name: str) -> ModuleType:
    """The module; of an integration only where its framework is installed."""
    if name.startswith("ema_client.integrations."):
        framework = name.rpartition(".")[2]
        with warnings.catch_warnings():
            # Frameworks warn of each other when they are imported.
            warnings.simplefilter("ignore")
            if framework in FRAMEWORKS:
                pytest.importorskip(framework, reason=f"{framework} is not installed: pip install -e '.[integrations]'")
            return importlib.import_module(name)
    return importlib.import_module(name)


def _order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions, each by name: the order ruff's RUF022 keeps."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def _defined_in(module: ModuleType) -> set[str]:
    """Public classes and functions whose definition stands in the module itself."""
    tree = ast.parse(MODULES[module.__name__].read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    return {node.name for node in nodes if not node.name.startswith("_") and not _registered(node)}


def _registered(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether a decorator hands it to a router or a command line, which then offers it: ``@router.get(...)``."""
    return any(isinstance(d, ast.Call) and isinstance(d.func, ast.Attribute) for d in node.decorator_list)


def test_modules_are_found() -> None:
    """Both packages have modules, so the parametrized tests below are not empty."""
    assert {name.partition(".")[0] for name in MODULES} == {"ema_service", "ema_client"}
    assert {"ema_client", "ema_client.errors"} <= set(_with_all())


@pytest.mark.parametrize("name", _with_all())
def test_all_is_sorted_and_true(name: str) -> None:
    """``__all__`` is sorted, names nothing twice, and every name in it can be had."""
    module = _imported(name)
    listed = list(module.__all__)

    assert listed == sorted(set(listed), key=_order)
    assert [entry for entry in listed if not hasattr(module, entry)] == []


@pytest.mark.parametrize("name", _with_all())
def test_all_is_complete(name: str) -> None:
    """Every public class and function that a module defines stands in its ``__all__``."""
    module = _imported(name)

    assert _defined_in(module) - set(module.__all__) == set()


def _offered_by_client() -> list[str]:
    """Its classes and functions; a constant or a module is explained where it stands."""
    client = importlib.import_module("ema_client")
    return [name for name in client.__all__ if callable(getattr(client, name))]


@pytest.mark.parametrize("name", _offered_by_client())
def test_public_names_have_a_docstring(name: str) -> None:
    """What ``ema_client`` offers, with the public methods of its classes, is explained where it is defined."""
    offered = getattr(importlib.import_module("ema_client"), name)
    methods = {}
    if inspect.isclass(offered):
        methods = {f"{name}.{key}": value for key, value in vars(offered).items() if _is_public_method(key, value)}

    assert [key for key, value in {name: offered, **methods}.items() if not _own_docstring(value)] == []


def _is_public_method(key: str, value: object) -> bool:
    return not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod))


def _own_docstring(thing: object) -> bool:
    text = thing.__doc__ or ""
    # A dataclass without a docstring is given its signature as one.
    generated = inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")
    return bool(text.strip()) and not generated


@pytest.mark.parametrize("name", MODULES)
def test_module_says_what_it_knows(name: str) -> None:
    """A module opens with what it is about; one that holds logic says what it knows (and so what it does not)."""
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""

    assert docstring
    if MODULES[name].name != "__init__.py":
        assert "know" in docstring.lower()
