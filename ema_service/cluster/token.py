"""The cluster token: a secret that the coordinator and all shards share, and nobody else has.

Whoever has it can have a run's updates committed or aborted, so a coordinator answers nobody without. Users' tokens
(ema_service.tokens) are other ones, and open nothing here.

A host says in a header beside which *number* its process has: that of its data dir (storage/files.py: FolderLock),
larger than that of every earlier process of the host. So a coordinator hears no host that was replaced.

Knows these headers, and the file that has the token, on one line. The token is never logged, and stands in no message
of an error.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

__all__ = ["HEADER_NUMBER", "ClusterToken", "read_cluster_token"]

#: Of a host's requests to a coordinator: which number the host's process has.
HEADER_NUMBER = "Ema-Host-Number"

#: Characters that a bearer token may have (RFC 6750), and so many that nobody guesses it.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,}=*\Z")


class ClusterToken:
    """The token of one cluster."""

    def __init__(self, token: str, number: int | None = None) -> None:
        """number: of the host's process that shows the token, None for whoever is no host. Raises ValueError, which
        does not quote the token, where it is too short or cannot stand in a header."""
        if not _TOKEN.match(token):
            raise ValueError(
                "the cluster token: expected at least 16 letters, digits or characters of ._~+/-; "
                "`openssl rand -hex 32` makes one"
            )
        self._token = token
        self._header = f"Bearer {token}"
        self._number = number

    def __repr__(self) -> str:
        return "ClusterToken(...)"

    @property
    def header(self) -> str:
        """The value of the header Authorization."""
        return self._header

    @property
    def headers(self) -> dict[str, str]:
        """What a request to a coordinator says of its sender."""
        number = {} if self._number is None else {HEADER_NUMBER: str(self._number)}
        return {"Authorization": self._header, **number}

    def of_number(self, number: int) -> ClusterToken:
        """The same token, shown by the host's process that has this number."""
        return ClusterToken(self._token, number)

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
