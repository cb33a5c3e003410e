"""A server that speaks S3, for tests of what is published there.

Knows when it is started and ended. Does not know what is published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.s3 import S3Server, named_by_the_environment, needs_s3


@pytest.fixture(scope="module")
def start_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], S3Server]]:
    """Start servers of S3, which are ended after the module's tests."""
    needs_s3()
    started: list[S3Server] = []

    def start() -> S3Server:
        started.append(S3Server(tmp_path_factory.mktemp("s3") / "log"))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def s3(start_s3: Callable[[], S3Server]) -> Iterator[S3Server]:
    """One server of S3 for a module's tests, which the environment names while they run."""
    yield from named_by_the_environment(start_s3())
