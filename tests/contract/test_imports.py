"""The import rules of the two packages, read from their source (nothing is imported here).

Knows the layers and who may use which third-party package. Does not know what any module does.
"""

from __future__ import annotations

import ast
import graphlib
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"ema_service": ROOT / "ema_service", "ema_client": ROOT / "client" / "ema_client"}

# cli -> api -> {cluster, replica, dashboard} -> runs -> persistence -> {shadows, bodies} -> {memory, storage} ->
# averaging: a part may use what stands to its right, and shadows and bodies, memory and storage do without each other.
# settings, metrics, threads, machine_memory, descriptors, logs, addresses, address_file, readiness, sizes, tether, tls,
# tokens, values and tensors are leaves.
LEAVES = {
    *("settings", "metrics", "threads", "machine_memory", "descriptors", "logs", "addresses", "address_file"),
    *("readiness", "sizes", "tether", "tls", "tokens", "values", "tensors"),
}
SERVICE_PARTS: dict[str, set[str]] = {
    "": set(),
    "__main__": {"cli"},
    "cli": {"api", "cluster", "replica", "cluster_cli", "persistence", "storage", "demo", "bench"} | LEAVES,
    "cluster_cli": {"cluster", "dashboard"} | LEAVES,
    "api": {"cluster", "replica", "dashboard", "runs", "persistence", "shadows", "bodies"}
    | {"memory", "storage", "averaging"}
    | LEAVES,
    "dashboard": set(),
    "cluster": {"runs", "persistence", "memory", "storage", "averaging"} | LEAVES,
    "replica": {"runs", "shadows", "bodies", "memory", "averaging"} | LEAVES,
    "runs": {"persistence", "shadows", "bodies", "memory", "storage", "averaging"} | LEAVES,
    "persistence": {"shadows", "bodies", "memory", "storage", "averaging"} | LEAVES,
    "shadows": {"memory", "averaging"} | LEAVES,
    "bodies": {"memory", "averaging"} | LEAVES,
    "memory": LEAVES,
    "storage": LEAVES,
    "averaging": {"threads", "values", "tensors"},
    "settings": {"machine_memory"},
    "metrics": set(),
    "threads": set(),
    "machine_memory": set(),
    "descriptors": set(),
    "logs": set(),
    "addresses": set(),
    "address_file": set(),
    "readiness": set(),
    "sizes": set(),
    "tether": set(),
    "tls": set(),
    "tokens": set(),
    "values": {"tensors"},
    "tensors": {"threads", "values"},
    "demo": {"settings", "cluster"},
    "bench": {"settings", "sizes"},
}
#: Where parts of extras are loaded, by whoever asked for them: otel, and publish.
EXTRAS = {("ema_service.api.tracing", "opentelemetry"), ("ema_service.storage.objects", "fsspec")}
#: Whole modules that need an extra, and are loaded where somebody asks for them: whoever has no Ray has clusters too.
NEEDS_EXTRA = {("ema_service.cluster.launching.ray_launcher", "ray")}
#: Within api: what receives and sends knows no route, and no server.
TRANSFER = "ema_service.api.transfer"
#: Who decides, for a run and for the shards of a run: pure, with every module of ours that is run.
LEDGER = "ema_service.runs.ledger"
PURE = (LEDGER, "ema_service.cluster.decisions")
#: The program that decides for a run on several hosts, an application of its own; and all that are such programs.
COORDINATOR = "ema_service.cluster.coordinator"
CLUSTER_PROGRAMS = (
    COORDINATOR,
    *("ema_service.cluster.problems", "ema_service.cluster.serving", "ema_service.cluster.gateway.*"),
    "ema_service.cluster.hosting.lending",
)
#: Who asks over HTTP: the client, a host of a cluster its coordinators, and a gateway its hosts.
HTTPX = (
    "ema_client.http.control",
    *("ema_service.cluster.reaching", "ema_service.cluster.hosting.asking", "ema_service.cluster.gateway.*"),
)
#: What the ledger may need beyond the standard library: schedules are numbers.
LEDGER_THIRD_PARTY = {"numpy"}
#: What of the standard library a decision has no business with.
LEDGER_NEVER = {"os", "pathlib", "sqlite3", "socket", "threading", "time", "asyncio", "mmap", "random"}
#: These import torch at their top, or numba, and are imported where a call needs them: a server whose runs are float32,
#: on the CPU, does without both.
TORCH_MODULES = {"ema_service.tensors", "ema_service.averaging.by_torch"}
NUMBA_MODULES = {"ema_service.averaging.loops*"}
#: These play the trainer and the evaluator: they use the public client, and start the server as a process.
PARTS_OUTSIDE = {"demo", "bench"}
PROTOCOL = "ema_client.protocol"
CLIENT_MODULES_OF_SERVICE = {PROTOCOL, "ema_client.wire", "ema_client.errors"}
#: What the client may import beyond the standard library, and where. `pip install ./client` brings httpx2 alone.
CLIENT_THIRD_PARTY = {
    "httpx2": {"ema_client.http.control"},
    "xxhash": {"ema_client.http.digests"},
    "lightning": {"ema_client.integrations.lightning"},
    "pytorch_lightning": {"ema_client.integrations.lightning"},
    "transformers": {"ema_client.integrations.transformers"},
    # Parts of the command line, but not its __init__, which says what to install where these are missing.
    "typer": {"ema_client.cli.*"},
    "rich": {"ema_client.cli.*"},
    # Charts, where a user asks for them.
    "tensorboard": {"ema_client.reading.loggers"},
    "wandb": {"ema_client.reading.loggers"},
    # Where a call draws a picture.
    "matplotlib": {"ema_client.cli.plots"},
    # Where a URL names a cluster on Ray.
    "ray": {"ema_client.http.ray_actors"},
    # The extra publish, of which each place imports its own.
    "huggingface_hub": {"ema_client.publishing.hub"},
    "fsspec": {"ema_client.publishing.bucket"},
}

# --- the client's floors -------------------------------------------------------------------------------------------
# remote_ema -> training -> client -> reading -> tensors -> http -> {protocol, wire, errors}; above: integrations, cli,
# checkpoints, publishing. A part may use the parts named here, in type-only imports too.
CLIENT_WORDS = {"protocol", "wire", "errors", "schedules", "targets"}
CLIENT_PARTS: dict[str, set[str]] = {
    "errors": set(),
    "protocol": {"errors"},
    "wire": {"protocol", "errors"},
    "schedules": {"protocol", "errors"},
    "targets": {"protocol", "errors"},
    "atomic": {"errors"},
    "forks": {"errors"},
    "ending": set(),
    "scratch": {"ending"},
    "http": {"forks", "protocol", "errors"},
    "tensors": {"http"} | CLIENT_WORDS,
    "arguments": {"http", "protocol", "errors"},
    "reading": {"arguments", "tensors", "http", "forks", "atomic", "scratch"} | CLIENT_WORDS,
    "hosts": {"reading", "tensors", "http", "forks"} | CLIENT_WORDS,
    "stretched": {"hosts", "http", "forks"} | CLIENT_WORDS,
    "pushing": {"stretched", "hosts", "http", "forks"} | CLIENT_WORDS,
    "steps": {"forks", "protocol", "errors"},
    "states": {"reading", "tensors", "http"} | CLIENT_WORDS,
    "lifecycle": {"arguments", "steps", "http", "protocol", "errors"},
    "client": {"arguments", "steps", "states", "lifecycle", "hosts", "pushing", "reading", "tensors", "http"}
    | CLIENT_WORDS,
    "training": {"client", "reading", "tensors", "http", "forks"} | CLIENT_WORDS,
    "remote_ema": {"training", "client", "reading", "tensors"} | CLIENT_WORDS,
    "checkpoints": {"tensors", "atomic"} | CLIENT_WORDS,
    "integrations": {"remote_ema", "training", "client", "reading", "tensors", "atomic"} | CLIENT_WORDS,
    "publishing": {"client", "atomic"} | CLIENT_WORDS,
    "cli": {"", "atomic", "checkpoints", "client", "ending", "publishing", "reading", "scratch"} | CLIENT_WORDS,
    "__main__": {"cli"},
    # What a user imports from the package itself.
    "": {"remote_ema", "client", "reading", "http"} | CLIENT_WORDS,
}
#: These handle tensors, and import torch at their top. The others do without: they import these parts, and torch, only
#: where a call needs them.
CLIENT_TORCH_PARTS = {"tensors", "training", "remote_ema", "checkpoints", "integrations"}
# --- end of the client's floors -------------------------------------------------------------------------------------

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {canonicalize_name(Requirement(text).name) for text in _PROJECT["dependencies"]}
DEMO_DEPENDENCIES = {canonicalize_name(Requirement(text).name) for text in _PROJECT["optional-dependencies"]["demo"]}
#: import name -> the distributions that bring it (sklearn -> scikit-learn)
DISTRIBUTIONS = {name: {canonicalize_name(dist) for dist in dists} for name, dists in packages_distributions().items()}


@dataclass(frozen=True)
class Import:
    """One imported module; ``top``: at module level, ``typing``: under TYPE_CHECKING, so never executed."""

    target: str
    line: int
    top: bool
    typing: bool

    @property
    def root(self) -> str:
        return self.target.partition(".")[0]


@dataclass(frozen=True)
class Module:
    name: str
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def part(self) -> str:
        return part_of(self.name)


def part_of(name: str) -> str:
    """The part of its package that a module belongs to: ema_service.api.routes.runs -> api."""
    return name.split(".")[1] if "." in name else ""


def module_names() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def read(name: str, source: str, known: set[str]) -> Module:
    return Module(name, tuple(_imports(ast.parse(source), known)))


def _imports(node: ast.AST, known: set[str], *, top: bool = True, typing: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, top, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(target, child.lineno, top, typing) for target in _from_targets(child, known))
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _imports(child, known, top=top, typing=True)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, known, top=top and not inside, typing=typing)


def _from_targets(node: ast.ImportFrom, known: set[str]) -> set[str]:
    """`from a import b` imports a.b where that is a module of ours, else a."""
    base = "." * node.level + (node.module or "")
    return {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    paths = module_names()
    for package in PACKAGES:
        assert any(name.startswith(package) for name in paths), f"no module of {package} was found"
    return [read(name, path.read_text(), set(paths)) for name, path in paths.items()]


# --- the rules: each yields one sentence for each breach ------------------------------------------------------------


def relative(module: Module) -> Iterator[str]:
    yield from (f"line {i.line}: relative import {i.target}" for i in module.imports if i.target.startswith("."))


def service_layers(module: Module) -> Iterator[str]:
    if module.package != "ema_service":
        return
    if module.part not in SERVICE_PARTS:
        yield f"{module.part} is a new part of the service: give it its place in SERVICE_PARTS"
        return
    may = SERVICE_PARTS[module.part] | {module.part}
    for imported in module.imports:
        part = part_of(imported.target)
        if imported.root == "ema_service" and part not in may:
            yield f"line {imported.line}: {module.part} must not import {imported.target}"


def transfer_knows_no_route(module: Module) -> Iterator[str]:
    if module.name != TRANSFER and not module.name.startswith(f"{TRANSFER}."):
        return
    for imported in module.imports:
        ours = imported.target.startswith("ema_service.api.") and not imported.target.startswith(TRANSFER)
        if ours or imported.target.startswith("ema_service.runs"):
            yield f"line {imported.line}: {module.name} must not import {imported.target}"


def service_uses_of_client(module: Module) -> Iterator[str]:
    if module.package != "ema_service" or module.part in PARTS_OUTSIDE:
        return
    for imported in module.imports:
        if imported.root == "ema_client" and imported.target not in CLIENT_MODULES_OF_SERVICE:
            yield f"line {imported.line}: the service must not import {imported.target}"


def client_is_alone(module: Module) -> Iterator[str]:
    if module.package == "ema_client":
        for imported in module.imports:
            if imported.root == "ema_service":
                yield f"line {imported.line}: the client must not import {imported.target}"


def client_third_party(module: Module) -> Iterator[str]:
    if module.package != "ema_client":
        return
    for imported in module.imports:
        own = imported.root in sys.stdlib_module_names or imported.root in PACKAGES
        places = CLIENT_THIRD_PARTY.get(imported.root, ())
        if not own and imported.root != "torch" and not any(fnmatchcase(module.name, place) for place in places):
            yield f"line {imported.line}: {module.name} must not import {imported.target}"


def client_floors(module: Module) -> Iterator[str]:
    if module.package != "ema_client":
        return
    if module.part not in CLIENT_PARTS:
        yield f"{module.part} is a new part of the client: give it its place in CLIENT_PARTS"
        return
    may = CLIENT_PARTS[module.part] | {module.part}
    for imported in module.imports:
        part = part_of(imported.target)
        if imported.root == "ema_client" and part not in may:
            yield f"line {imported.line}: {module.part} must not import {imported.target}"


def client_torch(module: Module) -> Iterator[str]:
    if module.package != "ema_client" or module.part in CLIENT_TORCH_PARTS:
        return
    for imported in module.imports:
        tensors = imported.root == "ema_client" and part_of(imported.target) in CLIENT_TORCH_PARTS
        if (imported.root == "torch" or tensors) and imported.top and not imported.typing:
            yield f"line {imported.line}: {module.name} must do without {imported.target} when it is imported"


def one_httpx(module: Module) -> Iterator[str]:
    if not _fits(module.name, HTTPX):
        yield from (
            f"line {i.line}: {i.root} belongs to {' and '.join(HTTPX)}"
            for i in module.imports
            if i.root in ("httpx", "httpx2")
        )


def heavy_imports_wait(module: Module) -> Iterator[str]:
    """torch takes 0.9 s and 200 MiB, numba 0.25 s and 75 MiB."""
    heavy = *TORCH_MODULES, *NUMBA_MODULES
    if module.package != "ema_service" or module.part in PARTS_OUTSIDE or _fits(module.name, heavy):
        return
    for imported in module.imports:
        late = imported.root in ("torch", "numba") or _fits(imported.target, heavy)
        if late and imported.top and not imported.typing:
            yield f"line {imported.line}: {module.name} must do without {imported.target} when it is imported"


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def fastapi_in_its_place(module: Module) -> Iterator[str]:
    programs = _fits(module.name, CLUSTER_PROGRAMS)
    if (module.package == "ema_service" and module.part in {"api", "dashboard"}) or programs:
        return
    for imported in module.imports:
        if imported.root in {"fastapi", "starlette"}:
            yield f"line {imported.line}: {imported.root} belongs under api/ and dashboard/, and in {CLUSTER_PROGRAMS}"


def coordinator_is_a_program(module: Module) -> Iterator[str]:
    """Who talks to a coordinator, or decides as one does, loads no web framework."""
    if module.name != "ema_service.cluster_cli" and not _fits(module.name, CLUSTER_PROGRAMS):
        for imported in module.imports:
            if imported.target == COORDINATOR:
                yield f"line {imported.line}: {module.name} must not import {imported.target}"


def service_third_party(module: Module) -> Iterator[str]:
    """What only happens to be installed because something else brought it is missing one day."""
    if module.package != "ema_service":
        return
    declared = DEPENDENCIES | (DEMO_DEPENDENCIES if module.part == "demo" else set())
    for imported in module.imports:
        own = imported.root in sys.stdlib_module_names or imported.root in PACKAGES
        own |= (module.name, imported.root) in EXTRAS and not imported.top
        own |= (module.name, imported.root) in NEEDS_EXTRA
        if not own and not DISTRIBUTIONS.get(imported.root, set()) & declared:
            yield f"line {imported.line}: {imported.root} is no dependency in pyproject.toml"


def ray_in_one_file(module: Module) -> Iterator[str]:
    """Ray places processes and does nothing else: no part of a cluster needs Ray, nor whoever starts one without."""
    for imported in module.imports:
        launcher = _fits(imported.target, [name for name, _ in NEEDS_EXTRA])
        if launcher and imported.top and not imported.typing:
            yield f"line {imported.line}: {module.name} must do without {imported.target} when it is imported"
        if imported.root == "ray" and module.package == "ema_service" and (module.name, "ray") not in NEEDS_EXTRA:
            yield f"line {imported.line}: ray belongs to {[name for name, _ in NEEDS_EXTRA]}"
        if imported.root == "ray" and module.package == "ema_client" and imported.top:
            yield f"line {imported.line}: {module.name} must do without ray when it is imported"


def shared_words_are_stdlib_only(module: Module) -> Iterator[str]:
    """protocol, wire and errors are what both sides load: they cost nobody a dependency."""
    if not _is_of_protocol(module.name) and module.name not in CLIENT_MODULES_OF_SERVICE:
        return
    for imported in module.imports:
        shared = _is_of_protocol(imported.target) or imported.target in CLIENT_MODULES_OF_SERVICE
        if imported.root not in sys.stdlib_module_names and not shared:
            yield f"line {imported.line}: {module.name} must not import {imported.target}"


def protocol_by_its_name(module: Module) -> Iterator[str]:
    """What is of the protocol is asked of the package alone, wherever in the package it lies."""
    for imported in module.imports:
        if _is_of_protocol(imported.target) and not (_is_of_protocol(module.name) or module.name == PROTOCOL):
            yield f"line {imported.line}: import {imported.target} from {PROTOCOL}"


def _is_of_protocol(name: str) -> bool:
    return name.startswith(f"{PROTOCOL}.")


Rule = Callable[[Module], Iterator[str]]
RULES: list[Rule] = [
    relative,
    service_layers,
    transfer_knows_no_route,
    service_uses_of_client,
    client_is_alone,
    client_third_party,
    client_floors,
    client_torch,
    heavy_imports_wait,
    service_third_party,
    one_httpx,
    fastapi_in_its_place,
    coordinator_is_a_program,
    ray_in_one_file,
    shared_words_are_stdlib_only,
    protocol_by_its_name,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_everywhere(rule: Rule, modules: list[Module]) -> None:
    """Every module of both packages keeps the rule."""
    assert [f"{module.name}, {breach}" for module in modules for breach in rule(module)] == []


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (relative, "ema_service.runs.run", "from . import arena"),
        (service_layers, "ema_service.runs.run", "def f():\n    from ema_service.api import app"),
        (service_layers, "ema_service.averaging.kernel", "import ema_service.settings"),
        (service_layers, "ema_service.persistence.versions", "if TYPE_CHECKING:\n    from ema_service.runs import Run"),
        (service_layers, "ema_service.shadows.passes", "import ema_service.bodies"),
        (service_layers, "ema_service.memory.staging", "import ema_service.storage"),
        (service_layers, "ema_service.novelty", ""),
        (transfer_knows_no_route, "ema_service.api.transfer.filling", "from ema_service.api.context import Context"),
        (transfer_knows_no_route, "ema_service.api.transfer", "import ema_service.runs"),
        (service_uses_of_client, "ema_service.api.app", "from ema_client.client import EmaClient"),
        (service_uses_of_client, "ema_service.cli", "import ema_client"),
        (client_is_alone, "ema_client.cli", "import ema_service"),
        (client_third_party, "ema_client.tensors.names", "import numpy"),
        (client_third_party, "ema_client.client", "import rich"),
        (client_third_party, "ema_client.cli", "import typer"),
        (
            client_floors,
            "ema_client.reading.watching",
            "if TYPE_CHECKING:\n    from ema_client.client import EmaClient",
        ),
        (client_floors, "ema_client.http.transport", "def f():\n    from ema_client.tensors.body import encode"),
        (client_floors, "ema_client.training.queue", "from ema_client.remote_ema import RemoteEma"),
        (client_floors, "ema_client.checkpoints.files", "import ema_client"),
        (client_floors, "ema_client.novelty", ""),
        (client_torch, "ema_client.client", "try:\n    import torch\nexcept ImportError:\n    pass"),
        (client_torch, "ema_client.reading.laned", "from ema_client.tensors.body import Landing"),
        (service_third_party, "ema_service.runs.run", "import matplotlib"),
        (service_third_party, "ema_service.runs.run", "import idna"),
        (one_httpx, "ema_service.demo.evaluator", "import httpx"),
        (fastapi_in_its_place, "ema_service.runs.run", "from fastapi import Request"),
        (fastapi_in_its_place, "ema_service.cluster.conversation", "from fastapi import Request"),
        (coordinator_is_a_program, "ema_service.cluster", "import ema_service.cluster.coordinator"),
        (ray_in_one_file, "ema_service.cluster.hosting.host", "def f():\n    import ray"),
        (ray_in_one_file, "ema_service.cluster_cli", "from ema_service.cluster.launching.ray_launcher import up"),
        (ray_in_one_file, "ema_client.http.ray_actors", "import ray"),
        (shared_words_are_stdlib_only, "ema_client.wire", "import torch"),
        (shared_words_are_stdlib_only, "ema_client.protocol.runs", "from ema_client import retry"),
        (protocol_by_its_name, "ema_client.client", "from ema_client.protocol.runs import RunInfo"),
    ],
)
def test_rule_sees_a_breach(rule: Rule, name: str, source: str) -> None:
    """The rule fires on a module that breaks it, so its silence above means something."""
    assert list(rule(read(name, source, {"ema_service.api.app"})))


def impurities(modules: list[Module]) -> list[str]:
    """What the modules that decide, or modules of ours that run when they do, import and must not."""
    known = {module.name: module for module in modules}
    waiting, seen, found = [name for name in PURE if name in known], set(), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for imported in known[name].imports:
            if imported.typing:
                continue
            if imported.target in known:
                waiting.append(imported.target)
            elif imported.root in LEDGER_NEVER or not (
                imported.root in sys.stdlib_module_names or imported.root in LEDGER_THIRD_PARTY
            ):
                found.append(f"{name}, line {imported.line}: {imported.target}")
    return found


def test_deciding_is_pure(modules: list[Module]) -> None:
    """No torch, no file, no clock, no lock and no chance in what decides, nor in any module of ours it runs."""
    assert set(PURE) <= {module.name for module in modules}
    assert impurities(modules) == []


@pytest.mark.parametrize("source", ["import torch", "from pathlib import Path", "import time"])
def test_impurity_is_seen(source: str) -> None:
    """An import that the ledger must not have is found, also at one remove."""
    known = {LEDGER, "ema_service.shadows.state"}
    ledger = read(LEDGER, "from ema_service.shadows import state", known)

    assert impurities([ledger, read("ema_service.shadows.state", source, known)]) != []


def test_imports_have_no_cycle(modules: list[Module]) -> None:
    """No module imports itself through others, not even from inside a function."""
    assert find_cycle(modules) == []


def test_cycle_is_seen() -> None:
    """Two modules that import each other, one of them lazily, are found; a type-only import is none."""
    known = {"ema_client.a", "ema_client.b"}
    lazy = read("ema_client.a", "def f():\n    from ema_client import b", known)
    type_only = read("ema_client.a", "if TYPE_CHECKING:\n    from ema_client import b", known)
    back = read("ema_client.b", "import ema_client.a", known)

    assert find_cycle([lazy, back]) != []
    assert find_cycle([type_only, back]) == []


def find_cycle(modules: list[Module]) -> list[str]:
    names = {module.name for module in modules}
    graph = {m.name: {i.target for i in m.imports if not i.typing and i.target in names} for m in modules}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as cycle:
        return list(cycle.args[1])
    return []
