"""A prefix of a bucket as a place to publish to, by fsspec's file system for the bucket.

    s3://bucket/prefix        Amazon S3, and what speaks S3    s3fs
    gs://bucket/prefix        Google Cloud Storage             gcsfs
    abfs://container/prefix   Azure Blob Storage               adlfs

Not any URL of fsspec: of these three nothing is seen of a file that is not finished. Credentials, region and endpoint
are those of every tool of the store, from the environment.

Knows: fsspec, uploads in parts, what the stores' refusals mean. Does not know: weights, formats, other places.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from ema_client.errors import DestinationFailed, UsageError

__all__ = ["KINDS", "Bucket", "Kind"]

#: Bytes of a part of an upload: so many, a few times over, are held in memory. S3 takes 5 MiB or more.
_PART_BYTES = 16 << 20
#: S3 takes 10,000 parts of an object.
_MOST_PARTS = 9_000


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of store. package: of fsspec's file system for it. credentials: where these are taken from."""

    name: str
    package: str
    credentials: str


#: By the scheme of a URL.
KINDS: Mapping[str, Kind] = {
    "s3": Kind("S3", "s3fs", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
    "gs": Kind(
        "Google Cloud Storage",
        "gcsfs",
        "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    ),
    "abfs": Kind(
        "Azure Blob Storage",
        "adlfs",
        "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or "
        "AZURE_STORAGE_SAS_TOKEN",
    ),
}
#: By module, what the file systems let through of the libraries below, beside OSError.
_FAULTS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}
#: What these libraries say where credentials are missing, or do not do.
_REFUSED = re.compile(
    r"credential|access ?denied|forbidden|signature|authenti|not authori|unauthori|InvalidAccessKeyId", re.IGNORECASE
)


class Bucket:
    """The objects of a bucket whose keys begin with a prefix; a Store. url: of one of KINDS.

    Raises UsageError where the package for such URLs is missing, DestinationFailed where it makes nothing of the
    environment.
    """

    at_once = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._kind = KINDS[urlsplit(url).scheme]
        package = self._kind.package
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise UsageError(
                f"{self._kind.name} needs {package}, which is not installed", hint=f"pip install {package}"
            ) from None
        from fsspec.core import url_to_fs

        # gcsfs logs what failed, with a traceback, which a program without handlers would show beside our error.
        logging.getLogger(package).addHandler(logging.NullHandler())
        # Not an instance that other users of fsspec in this process share, with listings of its own memory.
        with self._told():
            self._files, root = url_to_fs(unquote(url), skip_instance_cache=True, use_listings_cache=False)
        self._root = root.rstrip("/")
        self._bucket = self._root.partition("/")[0]

    def names(self) -> frozenset[str]:
        with self._told():
            try:
                found = self._files.ls(self._root, detail=False)
            except FileNotFoundError as fault:
                # Where the bucket is not there, s3fs has an answer of S3 behind this error. Of the other file systems
                # both errors are alike, and the first file that is written tells.
                if fault.__cause__ is not None:
                    raise
                return frozenset()
        return frozenset(path.removeprefix(f"{self._root}/") for path in found if path != self._root)

    def read(self, name: str) -> bytes:
        with self._told():
            return cast(bytes, self._files.cat_file(f"{self._root}/{name}"))

    @contextlib.contextmanager
    def writing(self, name: str, size: int) -> Iterator[BinaryIO]:
        with self._told():
            file = self._files.open(
                f"{self._root}/{name}",
                "wb",
                autocommit=False,
                block_size=max(_PART_BYTES, -(-size // _MOST_PARTS)),
            )
        try:
            yield cast(BinaryIO, _Telling(file, self._told))
        except BaseException:
            # A process that is killed leaves its parts to the bucket's rule for unfinished uploads.
            with contextlib.suppress(DestinationFailed), self._told():
                file.discard()
            file.closed = True  # or fsspec would finish the upload when the object is collected
            raise
        with self._told():
            file.close()
            file.commit()

    def finish(self, removed: Collection[str], said: str) -> None:
        del said
        with self._told():
            for name in removed:
                self._files.rm_file(f"{self._root}/{name}")

    def loads_from(self) -> tuple[str, dict[str, str]]:
        return self.url, {}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raise DestinationFailed in place of what fsspec and the libraries below raise in the block."""
        try:
            yield
        except _faults() as fault:
            said = " ".join(str(fault).split()) or type(fault).__name__
            # adlfs has its own error for all that fails in an upload.
            if isinstance(fault, FileNotFoundError) or "ContainerNotFound" in said:
                raise DestinationFailed(
                    f"{self.url}: there is no bucket {self._bucket!r}", hint="make it first"
                ) from None
            refused = isinstance(fault, PermissionError) or _REFUSED.search(f"{type(fault).__name__} {said}")
            given = f"give credentials that may write there, as for every tool of the store: {self._kind.credentials}"
            raise DestinationFailed(f"{self.url}: {said}", hint=given if refused else "") from None


def _faults() -> tuple[type[Exception], ...]:
    """What fsspec and the libraries below raise, of those that are loaded; RuntimeError and ValueError are raised by
    gcsfs and adlfs."""
    loaded = ((sys.modules.get(module), names) for module, names in _FAULTS.items())
    found = (getattr(module, name) for module, names in loaded if module for name in names)
    return OSError, RuntimeError, ValueError, *found


class _Telling:
    """A file of fsspec whose write() raises DestinationFailed."""

    def __init__(self, file: Any, told: Any) -> None:
        self._file = file
        self._told = told

    def write(self, piece: bytes | memoryview) -> int:
        with self._told():
            return cast(int, self._file.write(piece))
