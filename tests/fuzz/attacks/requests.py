"""Requests that are wrong before their body matters: no HTTP, two meanings, impossible steps and names.

Knows what of each is wrong, and how it must be refused. Does not know how it is sent.
"""

from __future__ import annotations

import gzip

from tests.fuzz.attacks.forge import GOOD, INVALID, MALFORMED, MISMATCH, STEP, Attack, chunked, with_value, without

#: Refused by the HTTP parser itself, before there is a request.
NOT_HTTP = [
    Attack(
        "a length and chunks",
        400,
        "bad_request",
        "",
        chunked(GOOD),
        headers=(("Content-Length", str(len(GOOD))), ("Transfer-Encoding", "chunked")),
    ),
    Attack(
        "two lengths",
        400,
        "bad_request",
        "",
        GOOD,
        headers=(("Content-Length", str(len(GOOD))), ("Content-Length", "5")),
    ),
    Attack("a negative length", 400, "bad_request", "", GOOD, headers=(("Content-Length", "-5"),)),
    Attack("a length in words", 400, "bad_request", "", GOOD, headers=(("Content-Length", "many"),)),
    Attack("a length beyond 64 bits", 400, "bad_request", "", GOOD, headers=(("Content-Length", "9" * 30),)),
    Attack("an unknown transfer coding", 400, "bad_request", "", GOOD, headers=(("Transfer-Encoding", "gzip"),)),
    Attack(
        "a NUL in a header", 400, "bad_request", "", GOOD, headers=(("X", "a\0b"), ("Content-Length", str(len(GOOD))))
    ),
    Attack("a raw byte in the path", 400, "bad_request", "", GOOD, path="/v1/runs/\xff/updates/1"),
]

WRONG_STEPS = [
    Attack("step -1", 422, INVALID, "step", GOOD, path="/v1/runs/{run}/updates/-1"),
    Attack("step 2**63", 422, INVALID, "step", GOOD, path=f"/v1/runs/{{run}}/updates/{2**63}"),
    Attack("step of 5,000 digits", 422, INVALID, "step", GOOD, path=f"/v1/runs/{{run}}/updates/{'9' * 5000}"),
    Attack("step in words", 422, INVALID, "step", GOOD, path="/v1/runs/{run}/updates/abc"),
    Attack("step 8.5", 422, INVALID, "step", GOOD, path="/v1/runs/{run}/updates/8.5"),
    *(
        Attack(f"step {step}", 422, INVALID, "step", GOOD, path=f"/v1/runs/{{run}}/updates/{step}")
        for step in ("8.0", "+8", "%208", "8%20", "08", "8_0", "0x8", "8e0", "%EF%BC%98", "%0a8", "8%0a", "%D9%A8")
    ),
    Attack("step NaN", 422, INVALID, "step", GOOD, path="/v1/runs/{run}/updates/NaN"),
    Attack("no step", 404, "route_not_found", "", GOOD, path="/v1/runs/{run}/updates/"),
    Attack("an older step", 409, "stale_step", f"step {STEP - 1}", GOOD, path=f"/v1/runs/{{run}}/updates/{STEP - 1}"),
    Attack(
        "other bytes at the latest step",
        409,
        "step_conflict",
        f"step {STEP}",
        GOOD,
        path=f"/v1/runs/{{run}}/updates/{STEP}",
    ),
    Attack(
        "an update before the initial weights",
        409,
        "awaiting_weights",
        "initial weights",
        GOOD,
        path="/v1/runs/{fresh}/updates/1",
    ),
    Attack("initial weights again", 409, "weights_exist", "version", GOOD, path="/v1/runs/{run}/weights"),
    Attack(
        "initial weights with NaN",
        422,
        "non_finite",
        "b.bias",
        with_value("b.bias", float("nan")),
        path="/v1/runs/{fresh}/weights",
    ),
    Attack("initial weights that lack a tensor", 422, MISMATCH, "emb", without("emb"), path="/v1/runs/{fresh}/weights"),
    Attack("initial weights one byte short", 422, MALFORMED, "shorter", GOOD[:-1], path="/v1/runs/{fresh}/weights"),
    Attack(
        "initial weights broken off",
        0,
        "",
        "",
        GOOD[:-1],
        path="/v1/runs/{fresh}/weights",
        headers=(("Content-Length", str(len(GOOD))),),
        hang_up=True,
    ),
    Attack("a negative counter", 422, INVALID, "num_updates", GOOD, path="/v1/runs/{fresh}/weights?num_updates=-1"),
    Attack(
        "a counter beyond 64 bits",
        422,
        INVALID,
        "num_updates",
        GOOD,
        path=f"/v1/runs/{{fresh}}/weights?num_updates={2**63}",
    ),
    *(
        Attack(f"{name} {value}", 422, INVALID, name, GOOD, path=f"/v1/runs/{{fresh}}/weights?{name}={value}")
        for name in ("num_updates", "step")
        for value in ("1.0", "%2B5", "+5", "05", "")
    ),
    Attack("a negative initial step", 422, INVALID, "step", GOOD, path="/v1/runs/{fresh}/weights?step=-1"),
]

BAD_NAMES = {
    "..": 422,
    ".": 422,
    "%2e%2e": 422,
    "%2e%2e%2f%2e%2e%2fetc": 404,
    "..%5c..": 422,
    ".hidden": 422,
    "-flag": 422,
    "a%00b": 422,
    "a%0a": 422,
    "a%20b": 422,
    "n" * 129: 422,
    "caf%C3%A9": 422,
    "%FF": 422,
    "a%2Fb": 404,  # a slash ends the name: there is no such route
    "a/b": 404,
    "%2e%2e%2f": 404,
    "%252e%252e": 422,  # decoded once, and once only
    "..;": 422,
    "a%5C..%5Cb": 422,
    "~root": 422,
    "$HOME": 422,
    "a:b": 422,
    "a*": 422,
    "%E2%80%AEfdp": 422,  # turns the reading direction
    "%EF%BC%8E%EF%BC%8E": 422,  # full-width dots
    "con%0d%0aX:y": 422,
    "": 404,
}
WRONG_NAMES = [
    Attack(
        f"{what} named {name[:30] or 'nothing'}",
        status,
        INVALID if status == 422 else "route_not_found",
        "",
        payload,
        path=path,
    )
    for name, status in BAD_NAMES.items()
    for what, path, payload in [
        ("a run", f"/v1/runs/{name}/updates/8", GOOD),
        ("a snapshot", f"/v1/runs/{{run}}/snapshots/{name}", b""),
    ]
]

NOT_THERE = [
    Attack("an update of an unknown run", 404, "run_not_found", "nobody", GOOD, path="/v1/runs/nobody/updates/1"),
    Attack("weights of an unknown run", 404, "run_not_found", "nobody", GOOD, path="/v1/runs/nobody/weights"),
    Attack(
        "an unknown average", 404, "average_not_found", "none", method="GET", path="/v1/runs/{run}/weights?average=none"
    ),
    Attack(
        "a removal of an unknown average",
        404,
        "average_not_found",
        "none",
        method="DELETE",
        path="/v1/runs/{run}/averages/none",
    ),
    Attack("an average named ..", 422, INVALID, "average", method="GET", path="/v1/runs/{run}/weights?average=.."),
    Attack(
        "an unknown snapshot", 404, "snapshot_not_found", "none", method="DELETE", path="/v1/runs/{run}/snapshots/none"
    ),
    Attack(
        "a read before the initial weights", 409, "awaiting_weights", "", method="GET", path="/v1/runs/{fresh}/weights"
    ),
    Attack("a snapshot before the initial weights", 409, "awaiting_weights", "", path="/v1/runs/{fresh}/snapshots/s"),
    Attack(
        "a reset before the initial weights",
        409,
        "awaiting_weights",
        "",
        method="POST",
        path="/v1/runs/{fresh}/reset-num-updates",
    ),
    Attack("updates posted", 405, "method_not_allowed", "POST", GOOD, method="POST"),
    Attack("a method nobody knows", 405, "method_not_allowed", "", method="TRACE", path="/v1/runs"),
]

CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(GOOD)
IN_CHUNKS = CHUNKED + chunked(GOOD)


def two_meanings(name: str, lines: bytes) -> Attack:
    """A shape that two readers of HTTP take for two requests: one in front of this server might see another end."""
    return Attack(name, 400, "bad_request", "HTTP/1.1", lines=lines)


SMUGGLING = [
    two_meanings("one length twice", LENGTH + LENGTH + b"\r\n" + GOOD),
    two_meanings("a list of lengths", b"Content-Length: 5, 5\r\n\r\n" + GOOD),
    two_meanings("a length with a plus", LENGTH.replace(b": ", b": +") + b"\r\n" + GOOD),
    two_meanings("a length in hexadecimal", b"Content-Length: 0x5\r\n\r\n" + GOOD),
    two_meanings("a blank in a length", b"Content-Length: 1 5\r\n\r\n" + GOOD),
    two_meanings("a blank before the colon", LENGTH.replace(b":", b" :") + b"\r\n" + GOOD),
    two_meanings("chunks, then a length", b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + chunked(GOOD)),
    two_meanings("chunked twice", b"Transfer-Encoding: chunked\r\n" + IN_CHUNKS),
    two_meanings("chunked, then gzip", IN_CHUNKS.replace(b"chunked", b"chunked, gzip", 1)),
    two_meanings("a coding that ends like chunked", IN_CHUNKS.replace(b"chunked", b"xchunked", 1)),
    two_meanings("a tab of another kind before chunked", IN_CHUNKS.replace(b" chunked", b" \x0bchunked", 1)),
    two_meanings("a folded header line", b"X: a\r\n b\r\n" + LENGTH + b"\r\n" + GOOD),
    two_meanings("a folded length", LENGTH.replace(b": ", b":\r\n ") + b"\r\n" + GOOD),
    two_meanings("a folded coding", IN_CHUNKS.replace(b": ", b":\r\n ", 1)),
    two_meanings("a line that ends in LF", b"X: a\n" + LENGTH + b"\r\n" + GOOD),
    two_meanings("a line that ends in CR", b"X: a\r" + LENGTH + b"\r\n" + GOOD),
    two_meanings("a head that ends in LF", LENGTH + b"\n" + GOOD),
    two_meanings("a line without a colon", b"nonsense\r\n" + LENGTH + b"\r\n" + GOOD),
    two_meanings("a header without a name", b": a\r\n" + LENGTH + b"\r\n" + GOOD),
    two_meanings("a chunk of negative size", CHUNKED + b"-5\r\n" + GOOD),
    two_meanings("a chunk beyond 64 bits", CHUNKED + b"f" * 17 + b"\r\n" + GOOD),
    two_meanings("a chunk with 0x", CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n"),
    two_meanings("a chunk longer than it says", CHUNKED + b"5\r\nhello, world\r\n0\r\n\r\n"),
    two_meanings("chunks whose lines end in LF", CHUNKED + b"5\nhello\n0\n\n"),
    Attack("a tunnel", 400, "bad_request", "HTTP/1.1", b"", "CONNECT", "evil:443"),
]

TOO_LONG = [
    Attack("a header of 70 KB", 431, "head_too_large", "65536", lines=b"X: " + b"a" * 70_000 + b"\r\n\r\n"),
    Attack("10,000 headers", 431, "head_too_large", "65536", lines=b"X: abcdefg\r\n" * 10_000 + b"\r\n"),
    Attack("a header that never ends", 431, "head_too_large", "65536", lines=b"X: " + b"a" * 700_000),
    Attack("a path that never ends", 431, "head_too_large", "65536", lines=b"", path="/" + "a" * 700_000),
    Attack("a trailer that never ends", 431, "head_too_large", "65536", lines=CHUNKED + b"0\r\nX: " + b"a" * 700_000),
]

ENCODED = [
    *(
        Attack(
            f"a body in {coding}",
            415,
            "unsupported_encoding",
            coding,
            gzip.compress(GOOD),
            headers=(("Content-Encoding", coding), ("Content-Length", str(len(gzip.compress(GOOD))))),
        )
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, identity", "x" * 30)
    ),
    Attack(
        "chunks of gzip",
        415,
        "unsupported_encoding",
        "gzip, chunked",
        chunked(gzip.compress(GOOD)),
        headers=(("Transfer-Encoding", "gzip, chunked"),),
    ),
    Attack(
        "a config in gzip",
        415,
        "unsupported_encoding",
        "gzip",
        gzip.compress(b" " * 10_000_000),
        method="POST",
        path="/v1/runs",
        headers=(
            ("Content-Type", "application/json"),
            ("Content-Encoding", "gzip"),
            ("Content-Length", str(len(gzip.compress(b" " * 10_000_000)))),
        ),
    ),
]

REQUESTS = [
    *NOT_HTTP,
    *SMUGGLING,
    *TOO_LONG,
    *ENCODED,
    *WRONG_STEPS,
    *WRONG_NAMES,
    *NOT_THERE,
]
