"""The documents are true: links lead somewhere, flags and named code exist, snippets run against a real server.

Snippets of README.md, client/README.md, client/AVERAGES.md and of the stories are run as a reader would, each file from
top to bottom in one empty folder:
```python blocks share one namespace, ```bash and ```console blocks are run if they call `curl` or `ema`. A block inside
an HTML comment, `<!-- python` to `-->`, is run too: preparation that the page need not show.

Knows Markdown, as far as links and code blocks go. Does not know what the snippets are about.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_URL = "http://127.0.0.1:8470"


def _documents() -> list[str]:
    """All Markdown files of the project, leaving out hidden folders and what was installed or built."""
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(
        str(path)
        for path in paths
        if not any(part.startswith(".") or part in {"node_modules", "dist", "build"} for part in path.parts[:-1])
    )


DOCUMENTS = _documents()
DESIGNS = [document for document in DOCUMENTS if document.endswith("DESIGN.md")]
#: Most characters of a line, but for tables and code.
WIDTH = 120
# Where a reader sees a refusal on the screen, the test has to fail.
STRICT_CURL = 'set -euo pipefail\ncurl() { command curl --fail -sS --max-time 60 "$@"; }\n'
WITH_SNIPPETS = ["README.md", "client/README.md", "client/AVERAGES.md"]
#: The stories take half a minute together, most of it for importing torch and Lightning.
STORIES = [document for document in DOCUMENTS if re.match(r"client/stories/(?!README)", document)]


def _prose(text: str) -> str:
    """The text without its code, where brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def _anchor(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def _anchors(path: Path) -> set[str]:
    without_code = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)}


def test_documents_are_found() -> None:
    """The documents that this file is about exist."""
    named = {"README.md", "CHANGELOG.md", "client/README.md", "client/PROTOCOL.md", "tests/benchmarks/RESULTS.md"}
    wings = ("api", "averaging", "cluster", "memory", "persistence", "runs", "shadows")
    designs = {"ema_service/DESIGN.md", *(f"ema_service/{wing}/DESIGN.md" for wing in wings)}

    assert (named | designs) - set(DOCUMENTS) == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document: str) -> None:
    """Every relative link leads to a file of the project, and to a heading that the file has."""
    page = ROOT / document
    links = re.findall(r'\]\(([^)\s]+)|(?:src|href)="([^"]+)"', _prose(page.read_text()))
    targets = [markdown or html for markdown, html in links]
    broken = [target for target in targets if "://" not in target and not _resolves(page, target)]

    assert broken == []


def _resolves(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    path = page if not name else (page.parent / name).resolve()
    if not path.exists() or not path.is_relative_to(ROOT):
        return False
    return not anchor or path.suffix != ".md" or anchor in _anchors(path)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_path_of_one_machine(document: str) -> None:
    """No document names a folder that only one machine has."""
    assert re.findall(r"(?<![\w.])/(?:home|root|Users|work|mnt)/\S*", (ROOT / document).read_text()) == []


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_lines_are_wrapped(document: str) -> None:
    """No line is longer than 120 characters, but for rows of tables and code."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > WIDTH and not line.startswith("|")]

    assert long == []


# --- code that a design names ---------------------------------------------------------------------------------------


def _named_code(text: str) -> set[tuple[str, str]]:
    """``path.py: Class.method``, in code spans and in drawings, as (path, name); a path alone has the name ""."""
    named = re.findall(r"(?<![\w./])([\w./]+\.py): (\w+(?:\.\w+)*)", text)
    return {*named, *((path, "") for path in re.findall(r"`([\w./]+\.py)`", text))}


def _code_file(path: str) -> Path | None:
    """The file that a design calls ``path``: below the service's folder, or below the project's."""
    return next((root / path for root in (ROOT / "ema_service", ROOT) if (root / path).is_file()), None)


def _names(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Functions, classes and constants of a module, methods and attributes of its classes with the class in front."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from _names(child, f"{prefix}{child.name}.")
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("document", DESIGNS)
def test_named_code_exists(document: str) -> None:
    """Each `path.py` is a file, and each `path.py: name` is defined in it."""
    missing = []
    for path, name in sorted(_named_code((ROOT / document).read_text())):
        file = _code_file(path)
        if file is None or (name and name not in set(_names(ast.parse(file.read_text())))):
            missing.append(f"{path}: {name}")

    assert missing == []


def test_missing_code_is_seen() -> None:
    """A path and a name are found in spans and in drawings; names of classes and of their methods are known."""
    text = (
        "`runs/run.py: Run._settle`, `runs/run.py: Run.gone`, `cli.py`\n```\n v runs/ledger.py: Ledger.judge:  x\n```"
    )
    run = set(_names(ast.parse((ROOT / "ema_service" / "runs" / "run.py").read_text())))

    assert _named_code(text) == {
        ("runs/run.py", "Run._settle"),
        ("runs/run.py", "Run.gone"),
        ("cli.py", ""),
        ("runs/ledger.py", "Ledger.judge"),
    }
    assert {"Run", "Run._settle", "Keeper.every", "_SMALL_BYTES"} <= run
    assert "Run.gone" not in run


@pytest.mark.parametrize("document", DESIGNS)
def test_quoted_code_is_in_the_service(document: str) -> None:
    """What a design quotes in a Python block stands so in one of the service's files."""
    quoted = [block.text.strip() for block in blocks((ROOT / document).read_text()) if block.language == "python"]
    sources = [path.read_text() for path in (ROOT / "ema_service").rglob("*.py")] if quoted else []

    assert [text for text in quoted if not any(text in source for source in sources)] == []


# --- flags ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serve_flags() -> set[str]:
    return _flags(sys.executable, "-m", "ema_service", "serve", "--help") - {"--help"}


def _flags(*command: str) -> set[str]:
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env)
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", done.stdout))


def _flags_of_serve_in(text: str) -> set[str]:
    """Flags in commands `ema-service serve ...`, and in the first column of a table."""
    commands = re.findall(r"ema-service serve([^`\n|]*)", text.replace("\\\n", " "))
    rows = re.findall(r"^\|\s*(`--[^|]*)\|", text, re.MULTILINE)
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(commands + rows)))


def test_readme_names_every_flag(serve_flags: set[str]) -> None:
    """Each flag of `ema-service serve` stands in the README."""
    text = (ROOT / "README.md").read_text()

    assert {flag for flag in serve_flags if not re.search(rf"{flag}(?![\w-])", text)} == set()


@pytest.mark.parametrize("document", ["README.md", *DESIGNS, "docker/README.md"])
def test_documented_flags_exist(document: str, serve_flags: set[str]) -> None:
    """Each flag that a document gives to `ema-service serve` is one that it takes."""
    assert _flags_of_serve_in((ROOT / document).read_text()) - serve_flags == set()


# --- snippets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, and the line of the document on which the text begins."""

    language: str
    text: str
    line: int


_BLOCK = re.compile(r"^(?:```(\w+)[^\n]*\n(.*?)^```|<!-- (python)\n(.*?)^-->)$", re.MULTILINE | re.DOTALL)
_RUN_IN_SHELL = re.compile(r"^(curl|ema) ", re.MULTILINE)


def blocks(text: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(text):
        language, code = match[1] or match[3], match[2] or match[4] or ""
        yield Block(language, code, text[: match.start()].count("\n") + 2)


def commands(block: Block) -> str:
    """What a reader types of a shell block: of ```console the lines after `$ ` (and those they continue on)."""
    if block.language != "console":
        return block.text
    typed, more = [], False
    for line in block.text.splitlines():
        if line.startswith("$ ") or more:
            typed.append(line.removeprefix("$ "))
            more = line.endswith("\\")
    return "\n".join(typed) + "\n"


def program(document: str, text: str) -> str:
    """One Python program that does what the document's blocks do, in order; errors point at the document's lines."""
    steps = ["namespace = {'__name__': '__main__'}", "import subprocess"]
    for block in blocks(text):
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text
            steps.append(f"exec(compile({source!r}, {document!r}, 'exec'), namespace)")
        elif block.language in {"bash", "console"} and _RUN_IN_SHELL.search(commands(block)):
            steps.append(f"print({f'{document}:{block.line}'!r}, flush=True)")
            steps.append(f"subprocess.run(['bash', '-c', {STRICT_CURL + commands(block)!r}], check=True, timeout=90)")
    return "\n".join(steps)


def test_program_keeps_order_and_lines() -> None:
    """The harness runs Python, hidden Python and curl in order, leaves out the rest, and keeps line numbers."""
    page = (
        "# Title\n```python\na = 1\n```\n```bash\nmake demo\n```\n"
        "```console\n$ WORD=-V\n$ curl $WORD \\\n    -q\noutput\n```\n"
        "<!-- python\nb = a\n-->\n```python title\nd = b + c\n```\n"
    )

    found = list(blocks(page))
    assert [block.language for block in found] == ["python", "bash", "console", "python", "python"]
    assert [block.line for block in found] == [3, 6, 9, 15, 18]
    assert commands(found[2]) == "WORD=-V\ncurl $WORD \\\n    -q\n"
    assert "make demo" not in program("page.md", page)
    with pytest.raises(NameError) as error:
        exec(program("page.md", page.replace("$ curl", "$ curl() { :; }; curl")))
    assert error.traceback[-1].lineno + 1 == 18


@pytest.mark.timeout(240)
@pytest.mark.parametrize("document", [*WITH_SNIPPETS, *(pytest.param(s, marks=pytest.mark.soak) for s in STORIES)])
def test_snippets_run(document: str, server: Any, tmp_path: Path) -> None:
    """A reader who types the document from top to bottom beside a running server meets no error and no warning."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed, and the document's shell snippets use it")
    text = (ROOT / document).read_text()
    script = tmp_path / "snippets.py"
    script.write_text(program(str(ROOT / document), text.replace(DEFAULT_URL, server.url)))
    folder = tmp_path / "reader"
    folder.mkdir()
    # What README.md says the reader has.
    save_file({"w": torch.arange(6.0).reshape(2, 3)}, folder / "weights.safetensors")

    # Nothing of this shell's settings reaches the reader but where programs are.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"PATH": path, "HOME": str(tmp_path), "EMA_SERVICE_URL": server.url, "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=220, check=False)

    assert any(block.language == "python" for block in blocks(text))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert all(load_file(path) for path in folder.glob("*.safetensors"))


def test_guarantees_name_tests_that_exist() -> None:
    """Every promise in DESIGN.md is attacked by tests, and each that is named there is one."""
    text = (ROOT / "ema_service" / "DESIGN.md").read_text()
    section = text.partition("## What is guaranteed")[2].partition("\n## ")[0]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", section)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    promises = {line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")} - {"", "promise"}
    assert missing == []
    assert promises >= {
        "Exactly once",
        "All or nothing",
        "One version per read",
        "Nothing acknowledged is lost",
        "Bounded memory",
        "Bounded disk",
        "The trainer never waits and never dies of us",
        "No stranger",
    }
