"""The README's pictures of the pages: five runs are trained for a minute, one of them sick, and looked at.

``python -m tests.e2e.screenshots`` writes .github/pictures/, and needs Chromium and the package playwright.

Knows how the pictures come about. Does not know the pages: test_dashboard.py and test_run_page.py test them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from playwright.sync_api import Browser, sync_playwright
from torch import Tensor

from ema_client import EmaClient
from tests.e2e.browser import CHROMIUM, QUIET

PICTURES = Path(__file__).parents[2] / ".github" / "pictures"
SECONDS = 60.0
URL = "http://127.0.0.1:8479"
#: By run: pauses between two updates in seconds, and how the run is made.
RUNS = {
    "vae-kl-f8": (0.9, {}),
    "flow-matching-xl-bs4096-lr1e-4": (0.35, {"durability": "disk"}),
    "sdxl-lora-watercolour": (0.2, {"decay": 1.0, "use_num_updates": False}),
    "cogview3-finetune": (0.5, {"decay": 0.9995}),
    "unet-ablation-7": (0.12, {"posthoc": True, "decay": 0.999}),
}
BLOCKS = [f"{half}.{i}" for half in ("down_blocks", "up_blocks") for i in range(3)]
SHAPES = {
    "conv_in.weight": (64, 4, 3, 3),
    "time_embed.weight": (256, 64),
    **{f"{block}.attn.to_q.weight": (128, 128) for block in [*BLOCKS, "mid_block"]},
    **{f"{block}.resnet.conv.weight": (64, 64, 3, 3) for block in [*BLOCKS, "mid_block"]},
    "conv_out.weight": (4, 64, 3, 3),
}


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with service(), EmaClient(URL) as client:
        trainers = [threading.Thread(target=train, args=(run, *how)) for run, how in RUNS.items()]
        for trainer in trainers:
            trainer.start()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            time.sleep(SECONDS / 2)
            client.snapshot("sdxl-lora-watercolour", "epoch-1")
            time.sleep(SECONDS / 2)
            look(browser, URL, "runs.png", height=650)
            look(browser, f"{URL}/runs/sdxl-lora-watercolour", "run.png", height=1150)
            browser.close()
        for trainer in trainers:
            trainer.join()


@contextmanager
def service() -> Iterator[None]:
    """A server on a data dir of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ema_service", "serve", "--port", URL.rpartition(":")[2], "--data-dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        assert "listens on" in server.stdout.readline()
        yield
        server.terminate()
        server.wait()


def train(run: str, pause: float, how: dict[str, object]) -> None:
    """Push parameters that go from their beginning to where a training would lead, with noise, until time is up."""
    random = torch.Generator().manual_seed(len(run))
    begin, end = ({name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()} for _ in range(2))
    until, step = time.monotonic() + SECONDS + 20, 0
    with EmaClient(URL) as client:
        client.create_run(run, begin, **how)  # type: ignore[arg-type]
        while time.monotonic() < until:
            step += 10
            pushed = {name: moved(begin[name], end[name], step * (1 + i % 5), random) for i, name in enumerate(begin)}
            client.push(run, pushed, step=step)
            time.sleep(pause)


def moved(begin: Tensor, end: Tensor, step: int, random: torch.Generator) -> Tensor:
    share = 1 - 1 / (1 + step / 4000)
    return begin + share * (end - begin) + 0.02 * torch.randn(begin.shape, generator=random)


def look(browser: Browser, url: str, name: str, *, height: int) -> None:
    """Take a picture of a page that had some seconds to look at the service."""
    page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
    page.goto(url)
    time.sleep(5)
    page.screenshot(path=PICTURES / name)
    page.close()


if __name__ == "__main__":
    main()
