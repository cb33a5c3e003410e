"""The forger's tools: bodies, chunks and requests of any shape, true or not.

Knows the run under attack, the safetensors format and HTTP/1.1. Does not know which forgery must be refused how.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

#: The run under attack: its tensors in canonical order, its latest step.
TENSORS = {
    "big": torch.tensor([1.5, -2.5], dtype=torch.float64),
    "a.weight": torch.arange(12.0).reshape(4, 3),
    "b.bias": torch.tensor([0.25, 0.5, 0.75]),
    "emb": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.bfloat16),
}
STEP = 7
NEXT = f"/v1/runs/{{run}}/updates/{STEP + 1}"
HEADER: dict[str, Any] = {
    "big": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]},
    "a.weight": {"dtype": "F32", "shape": [4, 3], "data_offsets": [16, 64]},
    "b.bias": {"dtype": "F32", "shape": [3], "data_offsets": [64, 76]},
    "emb": {"dtype": "BF16", "shape": [5], "data_offsets": [76, 86]},
}
DATA = bytes(86)


def body(header: dict[str, Any] | bytes, data: bytes = DATA, *, length: int | None = None) -> bytes:
    """A safetensors body with any header, true or not; ``length`` is what the first 8 bytes claim."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (3,), offsets: Any = (64, 76), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def header_with(name: str, value: Any) -> dict[str, Any]:
    """The right header with one entry replaced or added."""
    return {**HEADER, name: value}


def bias(**changes: Any) -> bytes:
    """A body whose entry ``b.bias`` has these members."""
    return body(header_with("b.bias", {**HEADER["b.bias"], **changes}))


def without(*names: str) -> bytes:
    """A well-formed body that lacks these tensors."""
    return save({name: tensor for name, tensor in TENSORS.items() if name not in names})


def tensors_with(name: str, tensor: torch.Tensor) -> bytes:
    """A well-formed body with one tensor replaced or added."""
    return save({**TENSORS, name: tensor})


def with_value(name: str, value: float, index: int = -1) -> bytes:
    """A well-formed body with one element set to ``value``."""
    tensor = TENSORS[name].clone()
    tensor.view(-1)[index] = value
    return tensors_with(name, tensor)


def chunked(payload: bytes, size: int = 7, *, end: bool = True) -> bytes:
    """``payload`` in chunked transfer coding."""
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if end else b"")


GOOD = save(TENSORS)
MISMATCH, MALFORMED, INVALID = "layout_mismatch", "malformed_body", "invalid_request"
CHUNKS = (("Transfer-Encoding", "chunked"),)


@dataclass(frozen=True)
class Attack:
    """One hostile request and what must come back: the status, the code, a word of the detail.

    path: ``{run}`` is the run under attack, ``{fresh}`` one that awaits its initial weights. payload: sent after the
    headers as it is. lines: the header fields and what follows them, as they are, instead of headers and payload.
    hang_up: close instead of reading an answer (status 0).
    """

    name: str
    status: int
    code: str
    word: str
    payload: bytes = b""
    method: str = "PUT"
    path: str = NEXT
    headers: tuple[tuple[str, str], ...] | None = None
    hang_up: bool = False
    lines: bytes | None = None

    def request(self, run: str, fresh: str) -> bytes:
        path = self.path.replace("{run}", run).replace("{fresh}", fresh)
        if self.lines is not None:
            return f"{self.method} {path} HTTP/1.1\r\nHost: localhost\r\n".encode("latin-1") + self.lines
        headers = (("Content-Length", str(len(self.payload))),) if self.headers is None else self.headers
        lines = [f"{self.method} {path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in headers]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.payload


_JSON = "application/json"


def json_attack(name: str, word: str, payload: object, method: str = "POST", path: str = "/v1/runs") -> Attack:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    headers = (("Content-Type", _JSON), ("Content-Length", str(len(raw))))
    return Attack(name, 422, INVALID, word, raw, method, path, headers)
