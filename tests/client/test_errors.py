"""The error tree and its form on the wire."""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_client import errors
from ema_client.errors import (
    BY_CODE,
    Conflict,
    EmaError,
    Invalid,
    LayoutMismatch,
    NotFound,
    Overloaded,
    ProtocolError,
    RunNotFound,
    error_from_problem,
    listed,
)

CLASSES = sorted(
    (thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, EmaError)),
    key=lambda cls: cls.__name__,
)


def test_codes_are_unique_and_complete() -> None:
    """Each class has a code of its own, and each code leads to its class."""
    assert sorted(BY_CODE.values(), key=lambda cls: cls.__name__) == CLASSES
    assert {code: cls.code for code, cls in BY_CODE.items()} == {code: code for code in BY_CODE}


@pytest.mark.parametrize("cls", CLASSES)
def test_docstring_is_the_tree(cls: type[EmaError]) -> None:
    """The module's docstring shows every class."""
    assert cls.__name__ in (errors.__doc__ or "")


README = Path(__file__).resolve().parents[2] / "client" / "README.md"


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls not in (EmaError, Conflict)])
def test_readme_explains_every_error(cls: type[EmaError]) -> None:
    """The client's README has each class in its table of errors."""
    table = README.read_text().partition("## Errors")[2]

    assert f"`{cls.__name__}`" in table


def test_all_lists_every_class() -> None:
    """Every class can be imported from the module by ``*``."""
    assert {cls.__name__ for cls in CLASSES} <= set(errors.__all__)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.status])
def test_problem_becomes_the_same_error(cls: type[EmaError]) -> None:
    """What the server raises is what the client raises: class, detail and hint survive the wire."""
    sent = cls("the detail", hint="the hint")
    problem = sent.to_problem()

    received = error_from_problem(problem, problem["status"], retry_after=3.0)

    assert type(received) is cls
    assert (received.detail, received.hint, received.retry_after) == ("the detail", "the hint", 3.0)


def test_problem_has_the_members_of_the_protocol() -> None:
    """RFC 9457's members, and code, hint and retryable."""
    assert LayoutMismatch("w is missing").to_problem() == {
        "type": "urn:ema-service:error:layout_mismatch",
        "title": "Tensors differ from the run's layout",
        "status": 422,
        "detail": "w is missing",
        "code": "layout_mismatch",
        "hint": LayoutMismatch.default_hint,
        "retryable": False,
    }


@pytest.mark.parametrize(
    ("status", "cls"), [(404, NotFound), (409, Conflict), (422, Invalid), (503, Overloaded), (418, ProtocolError)]
)
def test_unknown_code_becomes_the_class_of_its_status(status: int, cls: type[EmaError]) -> None:
    """An older client understands a newer server's error as far as its status goes."""
    error = error_from_problem({"code": "from_the_future", "detail": "new"}, status)

    assert type(error) is cls
    assert error.detail == "new"


def test_code_of_another_status_is_not_believed() -> None:
    """A code that contradicts the status does not choose the class."""
    assert type(error_from_problem({"code": "run_not_found", "detail": "x"}, 422)) is Invalid


def test_empty_problem_still_says_something() -> None:
    """A problem without members names its status."""
    assert error_from_problem({}, 404).detail == "HTTP 404"


def test_text_is_detail_and_hint() -> None:
    """What a user sees in a traceback is what was wrong and what to do; a hint may be empty."""
    assert str(RunNotFound("there is no run 'x'", hint="make one")) == "there is no run 'x' (make one)"
    assert str(RunNotFound("there is no run 'x'", hint="")) == "there is no run 'x'"
    assert RunNotFound.default_hint in str(RunNotFound("there is no run 'x'"))


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), (list("abcde"), "a, b, c, d, e"), (list("abcdefg"), "a, b, c, d, e and 2 more")],
)
def test_long_lists_are_counted(names: list[str], text: str) -> None:
    """A message names the first few things and counts the others."""
    assert listed(names) == text
    assert listed(iter(names), "; ") == text.replace(", ", "; ")


def test_how_many_names_a_list_has() -> None:
    """A caller with long names lists fewer of them."""
    assert listed(["a", "b", "c"], most=1) == "a and 2 more"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain text, with ümlauts and 重み", "a plain text, with ümlauts and 重み"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("one line\nERROR another", r"one line\nERROR another"),
        ("\u202egnp.exe \ud800 \x9b1m", r"\u202egnp.exe \ud800 \x9b1m"),
    ],
)
def test_texts_of_errors_steer_no_terminal(text: str, shown: str) -> None:
    """Whatever an error quotes, escape sequences, new lines and turned writing are spelt out."""
    error = error_from_problem({"code": "non_finite", "detail": text, "hint": text}, 422)

    assert (error.detail, error.hint) == (shown, shown)
    assert str(EmaError(text)) == shown
