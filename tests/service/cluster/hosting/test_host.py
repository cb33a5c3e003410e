"""One host of a cluster, without sockets: the order in which its talks begin, and what its token's file may lack.

Knows that the directory's talk adds and ends runs on a thread of its own. Does not know coordinators (test_servers).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from ema_service.cluster.hosting.host import Host
from ema_service.cluster.token import read_cluster_token


def test_the_directory_begins_last() -> None:
    """From its first word on runs are added and ended: nobody may be going through them any more."""
    host, begun = Host.__new__(Host), list[str]()

    def talk(name: str) -> SimpleNamespace:
        return SimpleNamespace(reporting=SimpleNamespace(start=lambda: begun.append(name)))

    host.__dict__.update(
        _shards={"a": talk("a"), "b": talk("b")}, _directory=talk("directory"), _lease=SimpleNamespace(start=list)
    )
    host.start()
    assert begun == ["a", "b", "directory"]


def test_a_token_that_cannot_be_read(tmp_path: Path) -> None:
    """Which file, why, and what to do, in words and not as a number of the system's."""
    for path in (tmp_path / "nobody", tmp_path):
        with pytest.raises(OSError, match=r"--cluster-token-file .*openssl rand") as told:
            read_cluster_token(path)
        assert str(path) in str(told.value)
        assert "Errno" not in str(told.value)
