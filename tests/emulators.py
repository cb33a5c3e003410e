"""Emulators of Google Cloud Storage and Azure Blob Storage, for tests of what is kept there: programs of their own.

Neither emulator is asked of anybody: where one is missing, or the file system that speaks to it, tests are skipped and
say by which command they would not be.

Knows gcp-storage-emulator and Azurite, which forget everything when they end. Does not know what is kept.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until

__all__ = ["EMULATED", "Emulator", "emulator"]

#: The schemes of URLs whose stores are emulated.
EMULATED = ("gs", "abfs")

_GCS = """
import time
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True)
server.start()
print(f"listens at http://127.0.0.1:{server._api._httpd.server_port}", flush=True)
time.sleep(3600)
"""
_AZURITE = ("azurite-blob", "--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry")
#: Every Azurite's, and no secret: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_LISTENS = re.compile(r"listens (?:at|on) (http://127\.0\.0\.1:\d+)")


class Emulator:
    """A store of a kind of EMULATED as a process. environ: what the store's tools are told of it by."""

    def __init__(self, kind: str, words: tuple[str, ...], log: Path) -> None:
        self.kind = kind
        with log.open("wb") as out:
            self._process = subprocess.Popen(words, stdout=out, stderr=out, cwd=log.parent)
        try:
            wait_until(lambda: _LISTENS.search(log.read_text()), f"the emulator's start: {log}")
        except BaseException:
            self.kill()
            raise
        self.environ = _environ_of(kind, _LISTENS.findall(log.read_text())[0])

    def files(self) -> Any:
        """fsspec's view of the store, without a memory, which none of our code shares."""
        import fsspec

        return fsspec.filesystem(self.kind, skip_instance_cache=True, use_listings_cache=False)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def emulator(kind: str, folder: Path) -> Iterator[Emulator]:
    """An emulator that the environment names inside the block. Skips the test where there is none."""
    running = Emulator(kind, _words(kind), folder / "log")
    with pytest.MonkeyPatch.context() as patched:
        for name, value in running.environ.items():
            patched.setenv(name, value)
        try:
            yield running
        finally:
            running.kill()


def _words(kind: str) -> tuple[str, ...]:
    package, made_by = {"gs": ("gcsfs", "gcp_storage_emulator"), "abfs": ("adlfs", "azurite-blob")}[kind]
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    if kind == "gs":
        pytest.importorskip(made_by, reason=f"{made_by} is not installed: pip install gcp-storage-emulator")
        return sys.executable, "-c", _GCS
    if not shutil.which(made_by):
        pytest.skip(f"{made_by} is not there: npm install -g azurite")
    return _AZURITE


def _environ_of(kind: str, url: str) -> Mapping[str, str]:
    if kind == "gs":
        return {"STORAGE_EMULATOR_HOST": url, "GCSFS_DEFAULT_PROJECT": "tests", "NO_GCE_CHECK": "true"} | {
            # Or gcsfs asks Google, by another way, of which kind each bucket is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    where = f"AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={url}/{_ACCOUNT};"
    return {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{where}"}
