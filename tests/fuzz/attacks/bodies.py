"""Bodies of weights that are not what they say, or not what the run is made of, or that break off.

Knows what of each is wrong, and how it must be refused. Does not know how it is sent.
"""

from __future__ import annotations

import gzip
import json
import pickle
import struct

import torch
from safetensors.torch import save

from tests.fuzz.attacks.forge import (
    CHUNKS,
    GOOD,
    HEADER,
    MALFORMED,
    MISMATCH,
    TENSORS,
    Attack,
    bias,
    body,
    chunked,
    entry,
    header_with,
    tensors_with,
    with_value,
    without,
)

NOT_THE_TENSORS = [
    Attack("a tensor is missing", 422, MISMATCH, "missing: emb", without("emb")),
    Attack("two tensors are missing", 422, MISMATCH, "missing: big, b.bias", without("big", "b.bias")),
    Attack("no tensor at all", 422, MISMATCH, "missing", body({}, b"")),
    Attack("a tensor too many", 422, MISMATCH, "extra", tensors_with("extra", torch.zeros(1))),
    Attack("a tensor too many of no bytes", 422, MISMATCH, "extra", tensors_with("extra", torch.zeros(0))),
    Attack(
        "a tensor renamed",
        422,
        MISMATCH,
        "b.bios",
        body({"b.bios" if k == "b.bias" else k: v for k, v in HEADER.items()}),
    ),
    Attack(
        "a NUL in a name", 422, MISMATCH, "emb\0", body({"emb\0" if k == "emb" else k: v for k, v in HEADER.items()})
    ),
    Attack(
        "a tensor of another size",
        422,
        MISMATCH,
        "b.bias is F32 [4], expected F32 [3]",
        tensors_with("b.bias", torch.zeros(4)),
    ),
    Attack(
        "a tensor transposed",
        422,
        MISMATCH,
        "a.weight is F32 [3, 4], expected F32 [4, 3]",
        tensors_with("a.weight", torch.zeros(3, 4)),
    ),
    Attack("a tensor flattened", 422, MISMATCH, "a.weight", tensors_with("a.weight", torch.zeros(12))),
    Attack("a dimension of one more", 422, MISMATCH, "b.bias", bias(shape=[3, 1])),
    Attack("fp16 for bf16", 422, MISMATCH, "emb is F16", tensors_with("emb", torch.zeros(5, dtype=torch.float16))),
    Attack(
        "integers for floats", 422, MISMATCH, "b.bias is I32", tensors_with("b.bias", torch.zeros(3, dtype=torch.int32))
    ),
    Attack(
        "float64 for float32",
        422,
        MISMATCH,
        "b.bias is F64",
        tensors_with("b.bias", torch.zeros(3, dtype=torch.float64)),
    ),
    Attack(
        "two tensors' sizes exchanged",
        422,
        MISMATCH,
        "a.weight",
        save({**TENSORS, "a.weight": TENSORS["b.bias"], "b.bias": TENSORS["a.weight"]}),
    ),
]

LYING_HEADERS = [
    Attack("overlapping tensors", 422, MALFORMED, "overlaps", body(header_with("b.bias", entry(offsets=[60, 72])))),
    Attack(
        "two tensors in one place",
        422,
        MALFORMED,
        "overlaps",
        body(header_with("b.bias", entry(shape=[12], offsets=[16, 64]))),
    ),
    Attack(
        "a gap between tensors",
        422,
        MALFORMED,
        "gap",
        body(header_with("emb", entry("BF16", [5], [78, 88])), bytes(88)),
    ),
    Attack("a gap at the front", 422, MALFORMED, "gap", body({"b.bias": entry(offsets=[4, 16])}, bytes(16))),
    Attack(
        "offsets far out of range",
        422,
        MALFORMED,
        "gap",
        body(header_with("emb", entry("BF16", [5], [2**62, 2**62 + 10]))),
    ),
    Attack(
        "offsets beyond 64 bits",
        422,
        MALFORMED,
        "data_offsets",
        body(header_with("emb", entry("BF16", [5], [2**64, 2**64 + 10]))),
    ),
    Attack("offsets back to front", 422, MALFORMED, "b.bias", bias(data_offsets=[76, 64])),
    Attack("negative offsets", 422, MALFORMED, "b.bias", bias(data_offsets=[-12, 0])),
    Attack("offsets too far apart", 422, MALFORMED, "b.bias", bias(data_offsets=[64, 80])),
    Attack("one offset", 422, MALFORMED, "data_offsets", bias(data_offsets=[64])),
    Attack("three offsets", 422, MALFORMED, "data_offsets", bias(data_offsets=[64, 76, 86])),
    Attack("offsets are fractions", 422, MALFORMED, "data_offsets", bias(data_offsets=[64.0, 76.0])),
    Attack("offsets are null", 422, MALFORMED, "data_offsets", bias(data_offsets=None)),
    Attack(
        "a name twice",
        422,
        MALFORMED,
        "'emb' twice",
        body(json.dumps(HEADER).encode()[:-1] + b', "emb": ' + json.dumps(HEADER["emb"]).encode() + b"}"),
    ),
    Attack(
        "a member twice",
        422,
        MALFORMED,
        "'dtype' twice",
        body(json.dumps(HEADER).encode().replace(b'{"dtype": "F64"', b'{"dtype": "F32", "dtype": "F64"')),
    ),
    Attack("a member too many", 422, MALFORMED, "b.bias", bias(stride=[1])),
    Attack("a member missing", 422, MALFORMED, "b.bias", body(header_with("b.bias", {"dtype": "F32", "shape": [3]}))),
    Attack("an entry that is a list", 422, MALFORMED, "b.bias", body(header_with("b.bias", ["F32", [3], [64, 76]]))),
    Attack("an entry that is null", 422, MALFORMED, "b.bias", body(header_with("b.bias", None))),
    Attack("an unknown dtype", 422, MALFORMED, "F4", bias(dtype="F4")),
    Attack("dtype is null", 422, MALFORMED, "dtype", bias(dtype=None)),
    Attack("dtype is an object", 422, MALFORMED, "dtype", bias(dtype={"F32": 1})),
    Attack("a negative size", 422, MALFORMED, "shape", bias(shape=[-3])),
    Attack("two negative sizes", 422, MALFORMED, "shape", bias(shape=[-3, -1])),
    Attack("true for a size", 422, MALFORMED, "shape", bias(shape=[3, True])),
    Attack("a fraction for a size", 422, MALFORMED, "shape", bias(shape=[3.0])),
    Attack("text for a size", 422, MALFORMED, "shape", bias(shape=["3"])),
    Attack("text for a shape", 422, MALFORMED, "shape", bias(shape="3")),
    Attack("33 dimensions", 422, MALFORMED, "shape", bias(shape=[3] + [1] * 32)),
    Attack("a size beyond 64 bits", 422, MALFORMED, "shape", bias(shape=[10**30])),
    Attack("sizes whose product is beyond 64 bits", 422, MALFORMED, "b.bias", bias(shape=[2**62, 2**62])),
    Attack(
        "sizes whose product wraps around to the right one",
        422,
        MALFORMED,
        "b.bias",
        bias(shape=[2**32 + 1, 2**32 + 1]),
    ),
    Attack(
        "a size of 5,000 digits",
        422,
        MALFORMED,
        "not JSON",
        body(json.dumps(HEADER).encode().replace(b"[3]", b"[" + b"9" * 5000 + b"]")),
    ),
    Attack(
        "a size of infinity", 422, MALFORMED, "shape", body(json.dumps(HEADER).encode().replace(b"[3]", b"[1e999]"))
    ),
    Attack("an empty name", 422, MALFORMED, "name", body(header_with("", entry(shape=[0], offsets=[0, 0])))),
    Attack(
        "a name of 1,025 characters",
        422,
        MALFORMED,
        "1025",
        body(header_with("n" * 1025, entry(shape=[0], offsets=[0, 0]))),
    ),
    Attack(
        "half a surrogate pair in a name",
        422,
        MALFORMED,
        "Unicode",
        body(header_with("\ud800", entry(shape=[0], offsets=[0, 0]))),
    ),
    Attack("half a surrogate pair in a dtype", 422, MALFORMED, "dtype", bias(dtype="\ud800")),
    Attack(
        "half a surrogate pair in metadata",
        422,
        MALFORMED,
        "__metadata__",
        body({**HEADER, "__metadata__": {"\udfff": "x"}}),
    ),
    Attack("metadata that is a list", 422, MALFORMED, "__metadata__", body({**HEADER, "__metadata__": []})),
    Attack("metadata that is a number", 422, MALFORMED, "__metadata__", body({**HEADER, "__metadata__": {"step": 1}})),
    Attack("metadata twice", 422, MALFORMED, "twice", body(b'{"__metadata__": {}, "__metadata__": {}}', b"")),
    Attack(
        "metadata nested 100,000 deep",
        422,
        MALFORMED,
        "not JSON",
        body(b'{"__metadata__": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    ),
    Attack(
        "lists nested 100,000 deep",
        422,
        MALFORMED,
        "not JSON",
        body(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ),
    Attack("nested 100,000 deep and cut", 422, MALFORMED, "not JSON", body(b'{"a":' * 100_000)),
    Attack(
        "header is not UTF-8", 422, MALFORMED, "not JSON", body(json.dumps(HEADER).encode().replace(b"emb", b"em\xff"))
    ),
    Attack("header is UTF-16", 422, MALFORMED, "begin", body(json.dumps(HEADER).encode("utf-16"))),
    Attack(
        "header has a byte order mark", 422, MALFORMED, "begin", body(b"\xef\xbb\xbf" + json.dumps(HEADER).encode())
    ),
    Attack("header begins with a blank", 422, MALFORMED, "begin", body(b" " + json.dumps(HEADER).encode())),
    Attack("header is a list", 422, MALFORMED, "begin", body(b"[]")),
    Attack("header is null", 422, MALFORMED, "begin", body(b"null")),
    Attack("header is cut", 422, MALFORMED, "not JSON", body(json.dumps(HEADER).encode()[:-1])),
    Attack(
        "something follows the header's object", 422, MALFORMED, "not JSON", body(json.dumps(HEADER).encode() + b"{}")
    ),
    Attack("header is NULs", 422, MALFORMED, "begin", body(bytes(64))),
]

LYING_LENGTHS = [
    Attack("no body", 422, MALFORMED, "ends", b""),
    Attack("seven bytes", 422, MALFORMED, "ends", GOOD[:7]),
    Attack("a length and no header", 422, MALFORMED, "header claims", struct.pack("<Q", 400)),
    Attack("a header of 0 bytes", 422, MALFORMED, "claims 0", body(b"", length=0)),
    Attack("a header of 1 byte", 422, MALFORMED, "claims 1", body(b"{", length=1)),
    Attack("a header of 2**63 bytes", 422, MALFORMED, str(2**63), body(HEADER, length=2**63)),
    Attack("a header of 2**64 - 1 bytes", 422, MALFORMED, str(2**64 - 1), body(HEADER, length=2**64 - 1)),
    Attack("a header just over the limit", 422, MALFORMED, "100000001", body(HEADER, length=100_000_001)),
    Attack("a header longer than the body", 422, MALFORMED, "claims 9000", body(HEADER, length=9000)),
    Attack(
        "a header that reaches into the data",
        422,
        MALFORMED,
        "not JSON",
        body(HEADER, length=len(json.dumps(HEADER)) + 8),
    ),
    Attack("a body one byte short", 422, MALFORMED, "shorter", GOOD[:-1]),
    Attack("a body without data", 422, MALFORMED, "shorter", body(HEADER, b"")),
    Attack("a body one byte long", 422, MALFORMED, "longer", GOOD + b"\0"),
    Attack("a body twice", 422, MALFORMED, "longer", GOOD + GOOD),
    Attack("a forged body one byte long", 422, MALFORMED, "longer", body(HEADER, bytes(87))),
    Attack("an announced terabyte", 413, "body_too_large", str(2**40), headers=(("Content-Length", str(2**40)),)),
]

NOT_SAFETENSORS = [
    Attack("a pickle", 422, MALFORMED, "header claims", pickle.dumps({"emb": [1.0] * 100})),
    Attack("a web page", 422, MALFORMED, "header claims", b"<!DOCTYPE html><html><body>hello</body></html>"),
    Attack("JSON", 422, MALFORMED, "header claims", json.dumps({"big": [1.5, -2.5]}).encode()),
    Attack("a gzipped body", 422, MALFORMED, "header claims", gzip.compress(GOOD)),
    Attack("NULs", 422, MALFORMED, "claims 0", bytes(1000)),
    Attack("0xff", 422, MALFORMED, "header claims", b"\xff" * 1000),
]

NOT_FINITE = [
    Attack(f"{value} in {name}", 422, "non_finite", name, with_value(name, value, index))
    for name in TENSORS
    for value, index in ((float("nan"), 0), (float("inf"), -1), (float("-inf"), 1))
]

IN_CHUNKS = [
    Attack(f"in chunks: {name}", 422, code, word, chunked(payload), headers=CHUNKS)
    for name, code, word, payload in [
        ("no body", MALFORMED, "ends", b""),
        ("seven bytes", MALFORMED, "ends", GOOD[:7]),
        ("a header cut", MALFORMED, "ends", GOOD[:100]),
        ("one byte short", MALFORMED, "ends", GOOD[:-1]),
        ("one byte long", MALFORMED, "longer", GOOD + b"\0"),
        ("100 KB long", MALFORMED, "longer", GOOD + bytes(100_000)),
        ("absurd header length", MALFORMED, str(2**63), body(HEADER, length=2**63)),
        ("a header of 100 MB that never comes", MALFORMED, "header claims", body(HEADER, length=100_000_000)),
        ("a tensor missing", MISMATCH, "emb", without("emb")),
        ("overlapping tensors", MALFORMED, "overlaps", body(header_with("b.bias", entry(offsets=[60, 72])))),
        ("NaN", "non_finite", "emb", with_value("emb", float("nan"))),
        ("a pickle", MALFORMED, "header claims", pickle.dumps({"emb": [1.0] * 100})),
    ]
]

BROKEN_OFF = [
    Attack("hangs up after the headers", 0, "", "", b"", headers=(("Content-Length", str(len(GOOD))),), hang_up=True),
    Attack("hangs up in the header", 0, "", "", GOOD[:50], headers=(("Content-Length", str(len(GOOD))),), hang_up=True),
    Attack("hangs up in the data", 0, "", "", GOOD[:-40], headers=(("Content-Length", str(len(GOOD))),), hang_up=True),
    Attack(
        "hangs up before the last byte",
        0,
        "",
        "",
        GOOD[:-1],
        headers=(("Content-Length", str(len(GOOD))),),
        hang_up=True,
    ),
    Attack("hangs up in a chunk", 0, "", "", chunked(GOOD)[:-30], headers=CHUNKS, hang_up=True),
    Attack("hangs up before the last chunk", 0, "", "", chunked(GOOD, end=False), headers=CHUNKS, hang_up=True),
]

BODIES = [
    *NOT_THE_TENSORS,
    *LYING_HEADERS,
    *LYING_LENGTHS,
    *NOT_SAFETENSORS,
    *NOT_FINITE,
    *IN_CHUNKS,
    *BROKEN_OFF,
]
