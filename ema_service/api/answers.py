"""Answers of JSON that a reader asks for again and again: told by their tag, and packed.

Knows HTTP's conditional requests and its encodings. Does not know what an answer says.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import fields
from typing import Any

from fastapi import Request, Response

__all__ = ["CONDITION", "is_known", "json_answer", "json_bytes", "not_modified", "tagged"]

#: The header of a conditional request, for the API's documentation: routes read the header themselves.
CONDITION: dict[str, Any] = {
    "name": "If-None-Match",
    "in": "header",
    "required": False,
    "description": "ETags: answer 304, without a body, where the answer is still that",
    "schema": {"type": "string"},
}
_TAG = {"ETag": {"description": "Names this very answer", "required": True, "schema": {"type": "string"}}}

#: What packing costs is more than what it saves below so many bytes.
_WORTH_PACKING_BYTES = 1024
#: Of the bytes that level 6 saves, level 1 saves nine tenths, in a quarter of the time.
_LEVEL = 1


def tagged(model: type) -> dict[int | str, dict[str, Any]]:
    """The documented answers of a route of JSON with a tag. model: of its body."""
    return {
        200: {"model": model, "headers": _TAG},
        304: {"description": "The answer named by If-None-Match is still the current one", "headers": _TAG},
    }


def is_known(request: Request, tag: str) -> bool:
    """Whether If-None-Match, a list of tags, weak or not, or ``*``, names the tag."""
    tags = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    return tag in tags or tags == ["*"]


def not_modified(tag: str) -> Response:
    """The answer to a reader who has it already."""
    return Response(status_code=304, headers=_headers(tag))


def json_bytes(body: Any) -> bytes:
    """The JSON of a dataclass of the protocol: that of to_json(), which would copy each number first."""
    return json.dumps(body, default=_members, separators=(",", ":"), ensure_ascii=False).encode()


def _members(body: Any) -> dict[str, Any]:
    return {each.name: getattr(body, each.name) for each in fields(body)}


def json_answer(request: Request, raw: bytes, tag: str) -> Response:
    """An answer of JSON with its tag, packed where the reader takes gzip. Takes milliseconds for 200 KB."""
    headers = _headers(tag)
    if len(raw) >= _WORTH_PACKING_BYTES and _takes_gzip(request):
        raw, headers = gzip.compress(raw, _LEVEL, mtime=0), {**headers, "Content-Encoding": "gzip"}
    return Response(raw, media_type="application/json", headers=headers)


def _headers(tag: str) -> dict[str, str]:
    # no-cache: to be kept, and asked about each time.
    return {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding, Authorization"}


def _takes_gzip(request: Request) -> bool:
    for each in request.headers.get("accept-encoding", "").split(","):
        name, _, weight = each.partition(";")
        if name.strip().lower() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
