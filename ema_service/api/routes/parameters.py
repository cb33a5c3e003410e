"""Parameters that several routes take, each with its check and its line in the API's documentation.

Knows FastAPI and the protocol's limits. Does not know what a route does with a parameter.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request
from pydantic import BeforeValidator

from ema_client.protocol import HEADER_KEY, HEADER_PUSH, HEADER_WRITER, KEY_PATTERN, MAX_STEP, NAME_PATTERN
from ema_service.api.context import Context

__all__ = [
    "DECIMAL",
    "VERSION_PATTERN",
    "CreatedAt",
    "Decimal",
    "Key",
    "Number",
    "PushKey",
    "Replaces",
    "RunName",
    "Server",
    "SnapshotName",
    "Step",
    "WriterNumber",
]

_NUMBER = re.compile(r"(0|[1-9][0-9]*)\Z", re.ASCII)
#: A number that need not be whole, as JSON and Python write one that is not negative.
DECIMAL = re.compile(r"([0-9]{1,18}(\.[0-9]{0,24})?|\.[0-9]{1,24})([eE][+-]?[0-9]{1,2})?\Z", re.ASCII)


# async: FastAPI would call a plain function on a thread, for each request.
async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


def _plain_number(value: object) -> object:
    """The value, if it is written as a plain number: a lenient parser would take ``1.0``, ``+5`` and ``007`` as well.

    Each step has one way to be written, so that a step has one URL.
    """
    if isinstance(value, str) and not _NUMBER.match(value):
        raise ValueError("a number in decimal digits, without sign, point or leading zeros, is expected")
    return value


def _plain_decimal(value: object) -> object:
    """The value, if it is written as a number in JSON is: a lenient parser would take ``1_0``, ``+5`` and ``nan`` as
    well."""
    if isinstance(value, str) and not DECIMAL.match(value):
        raise ValueError("a number in decimal digits, without sign, such as 12.5, is expected")
    return value


#: A number in a path, query or header, and one that need not be whole. No parameter is a plain int or float.
Number = Annotated[int, BeforeValidator(_plain_number)]
Decimal = Annotated[float, BeforeValidator(_plain_decimal)]

Server = Annotated[Context, Depends(_context)]
RunName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the run", examples=["cogview3-base"])]
SnapshotName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the snapshot", examples=["epoch-10"])]
WriterNumber = Annotated[
    Number | None, Header(alias=HEADER_WRITER, ge=1, le=MAX_STEP, description="What attaching gave this trainer")
]

Key = Annotated[
    str | None,
    Header(alias=HEADER_KEY, pattern=KEY_PATTERN, description="The same in all tries of one call: it is applied once"),
]
PushKey = Annotated[
    str | None,
    Header(
        alias=HEADER_PUSH,
        pattern=KEY_PATTERN,
        description="To one host of a cluster: the same for all hosts' slices of one push, and in all tries",
    ),
]
CreatedAt = Annotated[
    Decimal | None, Query(description="Only the one that was created at that time, and none made since in its place")
]
#: Of a version's name: decimal digits.
VERSION_PATTERN = r"^[0-9]{1,19}\.[0-9]{1,19}$"
Replaces = Annotated[
    str | None,
    Query(
        pattern=VERSION_PATTERN,
        description="Initial weights given anew, before the first update: the run's version, in whose place they come",
        examples=["1.0"],
    ),
]


Step = Annotated[Number, Path(ge=0, le=MAX_STEP, description="The trainer's step", examples=[1000])]
