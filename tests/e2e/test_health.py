"""What the pages say is wrong with a run, and what to do: the function behind them, in a real browser.

Knows runs, histories and what should be found in them. Does not know how the findings are shown.
"""

from __future__ import annotations

from typing import Any

import pytest

from ema_client.cli.app import app
from tests.e2e.browser import NEEDS_CHROMIUM

pytestmark = NEEDS_CHROMIUM

NOW = 1_000_000.0
AVERAGE = {"name": "ema", "schedule": "litema", "decay": 0.9999, "effective_decay": 0.9999, "num_updates": 5000}
#: A run in the midst of its training, with an update every two seconds.
RUN = {
    "run": "r",
    "status": "ready",
    "decay": 0.9999,
    "effective_decay": 0.9999,
    "step": 5000,
    "version": "1.5000",
    "durable_step": 5000,
    "durability": "process",
    "averages": [AVERAGE],
    "shadow_dtype": "F32",
    "created_at": NOW - 10_000,
    "updated_at": NOW - 2,
}
SERVER = {
    "disk_free_bytes": 500 << 30,
    "disk_total_bytes": 900 << 30,
    "memory_bytes": 1 << 30,
    "memory_limit_bytes": 9 << 30,
}
POINTS = 40


def history(**columns: Any) -> dict[str, Any]:
    """A history whose columns go evenly from one value to another, or by a function of 0..1; None: not measured."""
    healthy = {"distance": (0.02, 0.021), "shadow_norm": (9, 9.1), "parameter_norm": (9, 9.1), "rate": (0.5, 0.5)}
    healthy["effective_decay"] = (0.9999, 0.9999)
    wanted = {"time": (NOW - 8000, NOW - 2), **healthy, **columns}
    return {
        "columns": {name: [_at(column, i / (POINTS - 1)) for i in range(POINTS)] for name, column in wanted.items()}
    }


def _at(column: Any, share: float) -> float | None:
    if column is None:
        return None
    return column(share) if callable(column) else column[0] + (column[1] - column[0]) * share


@pytest.fixture(scope="module")
def found(browser: Any, server: Any) -> Any:
    """The findings of cases, each (run, history, server): lists of (level, title, the line to type)."""
    page = browser.new_page()
    page.goto(f"{server.url}/docs", wait_until="commit")
    script = """async ([cases, now]) => {
        const { findings } = await import("/assets/health.js");
        return cases.map((each) => findings(...each, now).map(({ level, title, command, why, remedy }) => {
            if (!why || !remedy) throw new Error(title);
            return [level, title, command];
        }));
    }"""

    def find(
        *cases: tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None],
    ) -> list[list[tuple[str, str, Any]]]:
        answers = page.evaluate(script, [[list(case) for case in cases], NOW])
        return [[tuple(finding) for finding in answer] for answer in answers]

    yield find
    page.close()


def test_healthy_runs(found: Any) -> None:
    """Nothing is wrong with a run in its training, at its very beginning, before its first update, or with a history
    that is short, empty, or measured without distances."""
    empty = {"columns": {name: [] for name in history()["columns"]}}
    early = {**RUN, "step": None, "version": "1.0", "effective_decay": None, "durable_step": None}
    early["averages"] = [{**AVERAGE, "effective_decay": None, "num_updates": 0}]
    first = {**RUN, "step": 1, "version": "1.1", "durable_step": 1, "effective_decay": 0.1818, "created_at": NOW - 5}
    awaiting = {**early, "status": "awaiting_weights", "version": None, "created_at": NOW - 5}
    unmeasured = history(distance=None, shadow_norm=None, parameter_norm=None)
    mended = history(
        distance=(0.02, 0.2), shadow_norm=(9, 9), effective_decay=lambda share: 0.9999 if share > 0.9 else 1
    )
    cases = [
        (RUN, mended, SERVER),
        (RUN, history(), SERVER),
        (RUN, None, None),
        (RUN, empty, SERVER),
        (RUN, unmeasured, {"version": "1"}),
    ]
    cases += [(early, empty, SERVER), (first, empty, SERVER), (awaiting, empty, SERVER)]

    assert found(*cases) == [[]] * len(cases)


SICK = {
    "degraded": (
        {"status": "degraded", "reason": "version 1.5001 was damaged", "remedy": "go back to a snapshot (ema rewind)"},
        {},
        {},
        ("bad", "Degraded", "ema rewind r SNAPSHOT"),
    ),
    "no room": (
        {"status": "degraded", "reason": "version 1.5001 could not be kept", "remedy": "give the disk room"},
        {},
        {},
        ("bad", "Degraded", None),
    ),
    "not a number": (
        {"refused": "tensor 'w' has NaN"},
        {},
        {},
        ("bad", "Updates are refused", "ema show r"),
    ),
    "never begun": (
        {
            "status": "awaiting_weights",
            "step": None,
            "version": None,
            "created_at": NOW - 3600,
            "updated_at": NOW - 3600,
        },
        {},
        {},
        ("warn", "No weights yet", "ema delete r"),
    ),
    "decay of 1": (
        {"effective_decay": 1, "averages": [{**AVERAGE, "effective_decay": 1}]},
        {"distance": (0.1, 0.5)},
        {},
        ("bad", "Frozen", "ema set-decay r 0.9999"),
    ),
    "lost to rounding": (
        {"effective_decay": 0.9999999},
        {"distance": (0.02, 0.2), "shadow_norm": (9, 9)},
        {},
        ("bad", "Frozen", "ema set-decay r 0.9999"),
    ),
    "left behind": (
        {},
        {"distance": lambda share: 0.01 * 200**share},
        {},
        ("warn", "Running away", "ema set-decay r 0.999"),
    ),
    "blown up": (
        {},
        {"parameter_norm": lambda share: 10 ** (6 * share)},
        {},
        ("bad", "The training blows up", "ema rewind r SNAPSHOT"),
    ),
    "no average": ({"effective_decay": 0.2}, {}, {}, ("warn", "Hardly an average", "ema set-decay r 0.999")),
    "trainer gone": ({"updated_at": NOW - 600}, {}, {}, ("warn", "Stalled", "ema snapshot r final")),
    "over": (
        {"updated_at": NOW - 600, "ended_at": NOW - 590},
        {},
        {},
        ("note", "Ended", "ema snapshot r final"),
    ),
    "long done": (
        {"updated_at": NOW - 9e5, "created_at": NOW - 9.1e5},
        {},
        {},
        ("note", "Quiet", "ema snapshot r final"),
    ),
    "not kept": ({"durable_step": None}, {}, {}, ("warn", "Not durable", "ema pull r -o r.safetensors")),
    "only in memory": (
        {"durable_step": None, "durability": "memory"},
        {},
        {},
        ("note", "Not durable", "ema snapshot r final"),
    ),
    "ring": ({"ring": {"trouble": "the disk is full"}}, {}, {}, ("warn", "The ring takes no snapshots", None)),
    "full disk": ({}, {}, {"disk_free_bytes": 1 << 30}, ("bad", "The disk is full", "ema snapshots r")),
    "short memory": ({}, {}, {"memory_bytes": 9 << 30}, ("warn", "Memory is short", None)),
}


def test_lines_to_type() -> None:
    """Each line is one that the command takes."""
    commands = app().commands  # type: ignore[attr-defined]
    for *_, (_, _, line) in SICK.values():
        if line is not None:
            program, name, *words = line.split()
            assert program == "ema"
            commands[name].make_context(name, words)


def test_each_sickness(found: Any) -> None:
    """Each sickness is found, alone, with its level and the line to type; the worst comes first where there are two."""
    cases = [({**RUN, **run}, history(**columns), {**SERVER, **server}) for run, columns, server, _ in SICK.values()]
    two = ({**RUN, "updated_at": NOW - 600, "status": "degraded"}, history(), SERVER)
    *single, both = found(*cases, two)

    assert dict(zip(SICK, single, strict=True)) == {name: [finding] for name, (*_, finding) in SICK.items()}
    assert [title for _, title, _ in both] == ["Degraded", "Stalled"]
