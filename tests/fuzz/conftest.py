"""How long the random tests go on.

Knows pytest's options. Does not know what is tested.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=float, default=0.0, metavar="SECONDS", help="go on with random lives for so long")


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    """Seconds to go on for after the short round; 0 unless --soak was given."""
    return float(request.config.getoption("--soak"))
