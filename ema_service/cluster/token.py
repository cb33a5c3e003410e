"""The cluster token: a secret that the coordinator and all shards share, and nobody else has.

Whoever has it can have a run's updates committed or aborted, so a coordinator answers nobody without. Users' tokens
(ema_service.tokens) are other ones, and open nothing here.

Knows the header that carries the token, and the file that has it, on one line. The token is never logged, and stands in
no message of an error.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

__all__ = ["ClusterToken", "read_cluster_token"]

#: Characters that a bearer token may have (RFC 6750), and so many that nobody guesses it.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,}=*\Z")


class ClusterToken:
    """The token of one cluster."""

    def __init__(self, token: str) -> None:
        """Raises ValueError, which does not quote the token, where it is too short or cannot stand in a header."""
        if not _TOKEN.match(token):
            raise ValueError(
                "the cluster token: expected at least 16 letters, digits or characters of ._~+/-; "
                "`openssl rand -hex 32` makes one"
            )
        self._header = f"Bearer {token}"

    def __repr__(self) -> str:
        return "ClusterToken(...)"

    @property
    def header(self) -> str:
        """The value of the header Authorization."""
        return self._header

    def fits(self, header: bytes) -> bool:
        """Whether a request has the token. header: the value of its Authorization. Takes as long for any value."""
        own, given = (hashlib.sha256(value).digest() for value in (self._header.encode(), header))
        return hmac.compare_digest(own, given)


def read_cluster_token(path: Path) -> ClusterToken:
    """The token in a file, without the spaces and the line's end around it. Raises OSError, which says what to do;
    ValueError as ClusterToken(), with the file's name."""
    try:
        return ClusterToken(path.read_text(encoding="ascii").strip())
    except OSError as fault:
        raise OSError(
            f"the cluster's token cannot be read from {path} ({fault.strerror}): give --cluster-token-file a file of "
            "one line that this user may read, the same on all hosts; `openssl rand -hex 32` makes one"
        ) from None
    except ValueError as fault:  # of bytes that are no ASCII, too, whose error would quote them
        why = "it has bytes that are no ASCII" if isinstance(fault, UnicodeDecodeError) else str(fault)
        raise ValueError(f"{path}: {why}") from None
