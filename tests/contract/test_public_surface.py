"""What a module offers is what its ``__all__`` says, and every module says what it knows.

Knows the source files of both packages. Does not know who may import whom (test_imports.py).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import warnings
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"ema_service": ROOT / "ema_service", "ema_client": ROOT / "client" / "ema_client"}


FRAMEWORKS = {"lightning", "transformers"}
#: Modules that need an extra, and are loaded where somebody asks for them.
NEEDS_EXTRA = {"ema_service.cluster.launching.ray_launcher": "ray"}


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
    """The module; one that needs a framework or an extra only where that is installed."""
    if name.startswith("ema_client.integrations."):
        framework = name.rpartition(".")[2]
        with warnings.catch_warnings():
            # Frameworks warn of each other when they are imported.
            warnings.simplefilter("ignore")
            if framework in FRAMEWORKS:
                pytest.importorskip(framework, reason=f"{framework} is not installed: pip install -e '.[integrations]'")
            return importlib.import_module(name)
    if name in NEEDS_EXTRA:
        extra = NEEDS_EXTRA[name]
        pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e '.[{extra}]'")
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


# --- the size of classes --------------------------------------------------------------------------------------------

MOST_METHODS, MOST_ATTRIBUTES = 20, 12
_SAYS_WHY = {
    "methods": re.compile(r"more than twenty methods", re.IGNORECASE),
    "attributes": re.compile(r"more than a dozen\s+attributes", re.IGNORECASE),
}


def oversized(source: str) -> list[str]:
    """Classes with many methods or attributes of their own whose docstring has no sentence that says why."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            text = ast.get_docstring(node) or ""
            for kind, count, most in (
                ("methods", _methods(node), MOST_METHODS),
                ("attributes", _attributes(node), MOST_ATTRIBUTES),
            ):
                if count > most and not _SAYS_WHY[kind].search(text):
                    found.append(f"{node.name} has {count} {kind}: split it, or begin a sentence with 'More than ...'")
    return found


def _methods(node: ast.ClassDef) -> int:
    return sum(isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) for child in node.body)


def _attributes(node: ast.ClassDef) -> int:
    stored = (
        each
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    )
    return len({each.attr for each in stored})


def test_large_classes_say_why() -> None:
    """A class does one thing; where it takes more than twenty methods or a dozen attributes, its docstring says why."""
    found = {name: oversized(path.read_text()) for name, path in MODULES.items()}

    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize("many", ["methods", "attributes"])
def test_large_class_is_seen(many: str) -> None:
    """A class over the line is found, and not once it says why."""
    body = {
        "methods": [f"    def m{i}(self): ..." for i in range(MOST_METHODS + 1)],
        "attributes": ["    def m(self):", *(f"        self.a{i} = 0" for i in range(MOST_ATTRIBUTES + 1))],
    }[many]
    said = {
        "methods": "More than twenty methods: a route each.",
        "attributes": "More than a dozen attributes: so it is.",
    }

    assert oversized("\n".join(["class C:", *body])) != []
    assert oversized("\n".join(["class C:", f'    """{said[many]}"""', *body])) == []
