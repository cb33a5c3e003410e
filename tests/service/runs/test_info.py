"""What is told of a run: how its pushes come. (What RunInfo says of a run's state is tested with the run.)"""

from __future__ import annotations

from ema_service.runs.info import Links


def test_links_say_how_the_latest_push_came() -> None:
    """Nothing before the first push; then the latest, and why not through shared memory until that works."""
    links = Links()
    assert str(links) == ""
    links.refused("another user")
    assert str(links) == "", "the push that was refused has not come"
    links.came("TCP on this host")
    links.came("Unix socket")
    assert str(links) == "Unix socket; shared memory was refused: another user"
    links.shared()
    assert str(links) == "shared memory"
    links.came("TCP")
    assert str(links) == "TCP"
