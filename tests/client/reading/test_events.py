"""Events from text and from differences. Knows the format of server-sent events; nothing is asked here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ema_client.errors import ProtocolError
from ema_client.protocol import AverageInfo, RunInfo
from ema_client.reading.events import differences, parse, read_event

AVERAGES = (AverageInfo("ema", "litema", 0.5, None), AverageInfo("fast", "litema", 0.1, 0.1))
WORDS = ("r", "ready", 0.5, 7, None, True, "update", 3, "1.3", None, "memory", "refuse", AVERAGES)
INFO = RunInfo(*WORDS, 1, 3, 12, "cpu", "F32", 1.0, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:a\r\n\r\n", ["a"]),
        (b": comment\n\ndata: a\ndata: b\nid: 1\nevent: x\n\n", ["a\nb"]),
        (b"event: x\n\n", []),
        (b"data: a\n\ndata: unfinished\n", ["a"]),
        (b"data: \xff\n\n", ["\ufffd"]),
    ],
)
def test_parse(text: bytes, expected: list[str]) -> None:
    """Data lines up to an empty line are one event; comments and other fields are none; half an event is dropped."""
    assert list(parse(text.splitlines(keepends=True))) == expected


def test_the_first_answer_is_the_present_version() -> None:
    """Before there was an answer, a version is news; a run without weights has none to tell of."""
    assert [(event.kind, event.version, event.step) for event in differences(None, INFO)] == [("version", "1.3", 3)]
    assert list(differences(None, replace(INFO, version=None))) == []
    assert list(differences(INFO, INFO)) == []


def test_what_changed_is_told_by_kind() -> None:
    """A new version, a decay (of which average, and what it is now) and a counter that went back are told apart."""
    fast = replace(AVERAGES[1], decay=0.2)
    now = replace(INFO, version="1.4", step=4, num_updates=0, averages=(AVERAGES[0], fast))
    told = {event.kind: event for event in differences(INFO, now)}

    assert list(told) == ["version", "decay_changed", "num_updates_reset"]
    assert (told["version"].average, told["version"].decay) == ("ema", 0.5)
    assert (told["decay_changed"].average, told["decay_changed"].decay) == ("fast", 0.2)
    assert told["num_updates_reset"].num_updates == 0


@pytest.mark.parametrize("data", ["", "{", "[]", '{"kind": "version"}'])
def test_what_is_no_event(data: str) -> None:
    """Text that is no event is an error that names where it came from."""
    with pytest.raises(ProtocolError, match="http://here/events sent an event that is none"):
        read_event("http://here/events", data)


def test_event_without_end_is_no_event() -> None:
    """A stranger's stream cannot fill the memory: data beyond a thousand times an event's is refused."""
    endless = (b"data: " + b"x" * 1000 + b"\n" for _ in range(10_000))

    with pytest.raises(ProtocolError, match="more than"):
        list(parse(endless))
