"""Numbers in paths, queries and headers: one spelling each, whichever route takes them.

Knows the OpenAPI document, which has every route and parameter. Does not know what a route does with a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from ema_service.api import create_app
from ema_service.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

#: What Python's int() or pydantic take for a number, or a person writes for one. U+FF11 is a wide 1.
WHOLE = ("1.0", "+1", " 1", "1 ", "1_0", "\uff11", "1e3", "01", "0x1", "-0", "")
DECIMAL = ("+1", " 1", "1 ", "1_0", "\uff11", "0x1", "nan", "inf", "-0", "1e", "")
SPELLINGS = {"integer": WHOLE, "number": DECIMAL}
METHODS = {"get", "put", "post", "patch", "delete", "head"}


def numbers() -> Iterator[tuple[str, str, list[dict[str, Any]], dict[str, Any]]]:
    """Each number that a route takes: method, path, the route's parameters, and the number's among them."""
    for path, operations in create_app(Settings(data_dir=None)).openapi()["paths"].items():
        for method in METHODS & operations.keys():
            parameters = operations[method].get("parameters", [])
            for each in parameters:
                if each["schema"].get("type") in SPELLINGS:
                    yield method, path, parameters, each


NUMBERS = {
    f"{method.upper()} {path} {each['name']}": (method, path, parameters, each)
    for method, path, parameters, each in sorted(numbers(), key=lambda found: (found[1], found[0], found[3]["name"]))
}


def plain(parameter: dict[str, Any]) -> str:
    """A value that the parameter may have."""
    schema = parameter["schema"]
    return str(schema.get("minimum", 1)) if schema.get("type") in SPELLINGS else "r"


@pytest.mark.parametrize("number", NUMBERS)
def test_one_spelling(number: str, server: ServerProcess) -> None:
    """A number that is not written in decimal digits is refused, with the parameter's name and what is expected."""
    method, path, parameters, tried = NUMBERS[number]
    places: dict[str, dict[str, str]] = {"path": {}, "query": {}, "header": {}}
    for each in parameters:
        if each["required"] or each is tried:
            places[each["in"]][each["name"]] = plain(each)
    with server.http() as http:

        def ask(spelling: str) -> Any:
            places[tried["in"]][tried["name"]] = spelling
            url = path.format(**places["path"])
            return http.request(method, url, params=places["query"], headers=places["header"])

        assert "decimal digits" not in refusal_of(ask(plain(tried)))
        for spelling in SPELLINGS[tried["schema"]["type"]]:
            if spelling == "" and tried["in"] == "path":
                continue  # another route's URL, or none's
            if tried["in"] == "header" and (not spelling.isascii() or spelling.strip() != spelling):
                continue  # HTTP knows no such value: spaces around a value are none of it
            answer = ask(spelling)
            assert answer.status_code == 422, (spelling, answer.text)
            if method != "head":
                assert "decimal digits" in refusal_of(answer), (spelling, answer.text)
                assert tried["name"] in refusal_of(answer), (spelling, answer.text)


def refusal_of(answer: Any) -> str:
    """What an answer says of the request's parameters, empty where it says nothing of them."""
    return str(answer.json()["detail"]) if answer.status_code == 422 and answer.content else ""


def test_every_kind_of_number_is_there() -> None:
    """The document has numbers in paths, queries and headers."""
    found = {(each["in"], each["schema"]["type"]) for _, _, _, each in NUMBERS.values()}
    assert found >= {("path", "integer"), ("query", "integer"), ("header", "integer"), ("query", "number")}
