"""Which pages the documentation's site has: the Markdown files of the project, where they stand, and nothing copied.

A page keeps its path in the project, so that what links from page to page on GitHub does so on the site. A link to a
file of code, or to a folder, leads to a page that shows the file, or lists the folder.

Knows: the order of the pages, links in Markdown, which modules the reference shows. Does not know: how pages look, or
what is written in them. For mkdocs, which calls the functions that begin with ``on_``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

__all__ = ["on_config", "on_files", "on_page_markdown"]

ROOT = Path(__file__).resolve().parents[2]

#: Title of a section -> its pages, in this order, by path; of a pattern, in the order of their paths. The first section
#: that a page fits has it, and the last has what is left.
SECTIONS = {
    "Stories": [
        "client/stories/README.md",
        *(
            f"client/stories/{story}.md"
            for story in ("litema-on-slurm", "lightning-ddp", "fsdp2", "evaluation-farm", "post-hoc-sweep")
        ),
        "client/stories/*.md",
    ],
    "Trainers and evaluators": ["client/README.md", "client/AVERAGES.md", "client/PROTOCOL.md"],
    "Operation": ["ema_service/OPERATIONS.md", "docker/README.md", "docker/*.md"],
    "Reference": ["reference/*.md"],
    "How it works": ["ema_service/DESIGN.md", "ema_service/*.md", "client/DESIGN.md"],
    "More": ["tests/benchmarks/RESULTS.md", "CHANGELOG.md", "*.md"],
}
#: What a search finds last: pages that name everything and explain little.
_FOUND_LAST = {"CHANGELOG.md", "tests/benchmarks/RESULTS.md"}
#: Not for readers of the site: folders of what was built or installed, and other people's words.
_LEFT_OUT = ("build", "dist", "node_modules", "site", "vendor")
_PICTURES = {".png", ".svg", ".jpg"}

#: The reference: page -> its title, and the classes and modules that it shows.
REFERENCE = {
    "reference/RemoteEma.md": ("RemoteEma", ["ema_client.remote_ema.RemoteEma", "ema_client.training.tally.Stats"]),
    "reference/EmaClient.md": ("EmaClient", ["ema_client.client.EmaClient", "ema_client.reading.weights.Weights"]),
    "reference/schedules.md": ("Schedules", ["ema_client.schedules", "ema_client.targets.Wished"]),
    "reference/integrations.md": (
        "Integrations",
        [
            "ema_client.integrations.lightning.RemoteEmaCallback",
            "ema_client.integrations.transformers.RemoteEmaCallback",
            "ema_client.integrations.diffusers",
        ],
    ),
    "reference/answers.md": (
        "Answers",
        [
            f"ema_client.protocol.{name}"
            for name in (
                "RunInfo",
                "AverageInfo",
                "AverageConfig",
                "Posthoc",
                "UpdateResult",
                "WeightsInfo",
                "SnapshotInfo",
                "RunEvent",
                "History",
                "HistoryColumns",
                "Distances",
                "Timeline",
                "ProfileInfo",
            )
        ],
    ),
    "reference/errors.md": ("Errors", ["ema_client.errors"]),
}

#: A link or picture, but none in a code span: its target, up to the anchor.
_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s]+)(?P<after>(?:#[^)\s]*)?\))")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_NESTED = re.compile(r"(?<=\n) +(?=[-*] )")
_HEADING = re.compile(r"^# (.+)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: each page once."""
    left = [*_documents(), *REFERENCE]
    left.remove("README.md")
    nav: list[Any] = [{"Home": "README.md"}]
    for section, patterns in SECTIONS.items():
        pages = []
        for pattern in patterns:
            pages += [page for page in left if page not in pages and fnmatchcase(page, pattern)]
        left = [page for page in left if page not in pages]
        nav.append({section: [{_title(page): page} for page in pages]})
    config["nav"] = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Documents, the pictures that they show, the files and folders that they link to, and the reference."""
    for page in _documents():
        files.append(_there(config, page))
    for page, (title, names) in REFERENCE.items():
        shown = "\n\n".join(_documented(name) for name in names)
        files.append(File.generated(config, page, content=f"# {title}\n\n{shown}\n"))
    linked = {target for page in _documents() for target in _linked(page)}
    for path in sorted(linked):
        if PurePosixPath(path).suffix in _PICTURES:
            files.append(_there(config, path))
        else:
            files.append(File.generated(config, _page_of(path), content=_shown(path), inclusion=_NO_NAV))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with links to code and folders that lead to their pages, and lists as Python-Markdown reads lists."""
    here = PurePosixPath(page.file.src_uri).parent
    if page.file.src_uri in _FOUND_LAST:
        page.meta["search"] = {"boost": 0.2}
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]

    def led(link: re.Match[str]) -> str:
        path = _path(here, link["target"])
        if path is None or path.endswith(".md") or PurePosixPath(path).suffix in _PICTURES:
            return link[0]
        up = "../" * len(here.parts)
        return f"{link['before']}{up}{_page_of(path)})"

    return _outside_code(markdown, lambda prose: _LINK.sub(led, _deeper(prose)))


#: Reached by links alone.
_NO_NAV = InclusionLevel.NOT_IN_NAV


def _documented(name: str) -> str:
    """What mkdocstrings makes a documentation of. Callbacks of several frameworks have one name, so theirs is whole."""
    whole = "\n    options:\n      show_root_full_path: true" if ".integrations." in name else ""
    return f"::: {name}{whole}"


def _there(config: MkDocsConfig, path: str) -> File:
    """A file of the project at its own path."""
    # Also in folders that begin with a dot, which mkdocs leaves out otherwise.
    return File.generated(config, path, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.INCLUDED)


def _documents() -> list[str]:
    """Paths of the project's pages, by their names."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(
        path.as_posix()
        for path in found
        if not any(part.startswith(".") or part in _LEFT_OUT for part in path.parts[:-1])
    )


def _title(page: str) -> str:
    if page in REFERENCE:
        return REFERENCE[page][0]
    heading = _HEADING.search((ROOT / page).read_text())
    return re.sub(r"[`*]", "", heading[1]) if heading else page


def _linked(page: str) -> Iterator[str]:
    """Paths of what a page links to, or shows, and is no page."""
    prose = _CODE.sub("", (ROOT / page).read_text())
    for link in _LINK.finditer(prose):
        path = _path(PurePosixPath(page).parent, link["target"])
        if path is not None and not path.endswith(".md"):
            yield path


def _path(here: PurePosixPath, target: str) -> str | None:
    """The path in the project that a relative link names; None for other links."""
    if ":" in target or target.startswith("/"):
        return None
    path = normpath(str(here / target))
    return path if (ROOT / path).exists() else None


def _page_of(path: str) -> str:
    """The page that shows a file, or lists a folder."""
    return f"{path}/index.md" if (ROOT / path).is_dir() else f"{path}.md"


def _shown(path: str) -> str:
    source = ROOT / path
    front = f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    if source.is_dir():
        return front + "\n".join(f"- `{each.name}`" for each in sorted(source.iterdir()) if each.is_file()) + "\n"
    return f"{front}````{source.suffix.lstrip('.')}\n{source.read_text().rstrip()}\n````\n"


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """The text with ``change`` made of everything between code blocks and code spans."""
    parts, at = [], 0
    for code in _CODE.finditer(markdown):
        parts += [change(markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, change(markdown[at:])])


def _deeper(prose: str) -> str:
    """Lists within lists by four blanks, which Python-Markdown wants, where GitHub is content with two."""
    return _NESTED.sub(lambda blanks: 2 * blanks[0], prose)
