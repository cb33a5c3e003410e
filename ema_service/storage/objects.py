"""Object stores: files under a URL that other machines reach too, such as a prefix of an S3 bucket, or a folder.

A bucket is spoken to by fsspec's file system for its URL (s3fs for ``s3://``), with the credentials that its tools take
from the environment; a folder by its own name, without fsspec.

Knows URLs, fsspec, and what its file systems raise. Does not know snapshots, nor when something is written or removed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import unquote, urlsplit

from ema_service.storage.files import TensorFile, remove_tree, write_whole

__all__ = [
    "ObjectFile",
    "ObjectGone",
    "ObjectStore",
    "ObjectStoreFailed",
    "ObjectStoreUnusable",
    "open_objects",
    "shown",
]

#: Bytes of one part of an upload. S3 takes 5 MiB or more, and 10,000 parts of an object.
_PART_BYTES = 16 << 20
_MOST_PARTS = 9_000
#: Most bytes of one read: of a store that gives 100 MB/s after 30 ms, a reader has 57 MB/s, and holds 4 MiB.
READ_AHEAD_BYTES = 4 << 20
#: Most headers fit into the first read.
_HEAD_BYTES = 64 << 10
#: By the name of a file system, what it is made with: a store that does not answer fails within half a minute, and the
#: caller tries again.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 1}}},
}
#: How often s3fs tries a request itself, within a second: whoever waits for a store that is away is to be told.
_TRIES = 3
#: By the name of a file system, what to install for it.
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
#: By module, what fsspec's file systems let through of the libraries below, beside OSError.
_FAULTS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}
#: Messages of the libraries below that mean credentials.
_REFUSED = re.compile(
    r"credential|access ?denied|forbidden|signature|authenti|not authori|unauthori|InvalidAccessKeyId", re.IGNORECASE
)
#: By package, by which names its store's tools find credentials in the environment.
_CREDENTIALS = {
    "s3fs": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gcsfs": "GOOGLE_APPLICATION_CREDENTIALS",
    "adlfs": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY",
}


class ObjectStoreUnusable(RuntimeError):
    """A URL that no object store can be opened by: another scheme, or a package that is missing."""


class ObjectStoreFailed(OSError):
    """An object store cannot be reached, or refuses what was asked. The message says what to do, where that is
    known."""


class ObjectGone(ObjectStoreFailed):
    """An object is not there."""


class ObjectStore(Protocol):
    """Files under one URL. Paths are relative to the URL. Each method may raise ObjectStoreFailed. Thread-safe.

    url: for messages, without a password.
    """

    url: str

    def names(self) -> list[str]:
        """The names of the files and folders right below the URL. Raises ObjectStoreFailed where the store does not
        answer, or lets nobody look."""

    def write(self, path: str, pieces: Iterable[bytes | memoryview], size: int) -> None:
        """Write a file of ``size`` bytes. What ``pieces`` raises is raised, and then there may be part of the file."""

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer where the file ends before. Raises ObjectGone."""

    def remove(self, folder: str, first: str) -> None:
        """Remove a folder with all its files, of which that named ``first`` goes first; nothing where it is gone."""

    def find(self, name: str) -> list[str]:
        """The paths of all files of this name, in any folder."""


def open_objects(url: str) -> ObjectStore:
    """The object store of a URL, or of a folder's path. Nothing is asked of the store yet.

    Raises ObjectStoreUnusable.
    """
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return _Folder(Path(unquote(parts.path) if parts.scheme else url))
    package = _PACKAGES.get(parts.scheme, "fsspec")
    try:
        from fsspec.core import url_to_fs

        options = {**_OPTIONS.get(parts.scheme, {}), "skip_instance_cache": True, "use_listings_cache": False}
        files, root = url_to_fs(url, **options)
    except ImportError as fault:
        raise ObjectStoreUnusable(
            f"the snapshot store {shown(url)} needs {package}, which is not installed ({fault}): pip install {package}"
        ) from None
    except (ValueError, TypeError, OSError) as fault:
        told = f": {_wanted(package)}" if _REFUSED.search(str(fault)) else ""
        raise ObjectStoreUnusable(f"the snapshot store {shown(url)} cannot be opened: {fault}{told}") from None
    # gcsfs logs each try that fails, with a traceback; whoever asked is told once.
    logging.getLogger(package).setLevel(logging.CRITICAL)
    if hasattr(files, "retries"):
        files.retries = _TRIES
    return _Bucket(files, root.rstrip("/"), shown(url), _wanted(package))


def _wanted(package: str) -> str:
    """What to do where credentials are missing, or do not do."""
    names = f" ({_CREDENTIALS[package]})" if package in _CREDENTIALS else ""
    return (
        "give the server credentials that may read, write and delete there, in its environment, as for every tool of "
        f"that store{names}"
    )


class ObjectFile(TensorFile):
    """A safetensors file in an object store. Reads are positional, and served from memory where they follow each other:
    each that goes on where the one before ended asks the store for more, up to READ_AHEAD_BYTES at once.

    identity: as told to the constructor: that of the file it was written from.
    """

    slow = True

    def __init__(self, objects: ObjectStore, path: str, size: int, identity: str) -> None:
        """Raises ObjectStoreFailed, ObjectGone; MalformedBody where the file is not whole."""
        self._objects = objects
        self._path = path
        self._identity = identity
        self._whole = size
        #: Bytes of the file that were read last, and where they begin. Replaced as one: threads share the file.
        self._block: tuple[int, bytes] = 0, objects.read(path, 0, min(size, _HEAD_BYTES))
        self._measure(size)

    def _pread(self, buffer: memoryview, at: int) -> int:
        begin, block = self._block
        if not begin <= at < begin + len(block):
            follows = at == begin + len(block)
            wanted = max(len(buffer), min(4 * len(block), READ_AHEAD_BYTES) if follows else 0)
            begin, block = at, self._objects.read(self._path, at, min(at + wanted, self._whole))
            self._block = begin, block
        found = memoryview(block)[at - begin : at - begin + len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    @property
    def name(self) -> str:
        return f"{self._objects.url}/{self._path}"

    @property
    def identity(self) -> str:
        return self._identity

    def close(self) -> None:
        self._block = 0, b""


class _Folder:
    """A folder as an object store, such as one on a file server. The folder itself must be there: of a disk that is not
    mounted nothing but the empty place is."""

    def __init__(self, root: Path) -> None:
        self.url = str(root.absolute())
        self._root = root.absolute()

    def names(self) -> list[str]:
        with self._told():
            return [path.name for path in self._root.iterdir()]

    def write(self, path: str, pieces: Iterable[bytes | memoryview], size: int) -> None:
        del size
        self._check()
        place = self._root / path
        with self._told():
            for folder in reversed([each for each in place.parents if each.is_relative_to(self._root)]):
                folder.mkdir(exist_ok=True)
            write_whole(place, pieces)

    def read(self, path: str, start: int, stop: int) -> bytes:
        with self._told(), (self._root / path).open("rb") as file:
            return os.pread(file.fileno(), stop - start, start)

    def remove(self, folder: str, first: str) -> None:
        self._check()
        place = self._root / folder
        with self._told():
            (place / first).unlink(missing_ok=True)
        remove_tree(place)
        with contextlib.suppress(OSError):  # another snapshot of the run is there
            place.parent.rmdir()
        if place.exists():
            raise ObjectStoreFailed(f"{place} cannot be removed: look at its permissions")

    def find(self, name: str) -> list[str]:
        self._check()
        # os.walk: leaves out what another server removes meanwhile.
        folders = (Path(folder) for folder, _, names in os.walk(self._root) if name in names)
        return sorted(str((folder / name).relative_to(self._root)) for folder in folders)

    def _check(self) -> None:
        with self._told(), os.scandir(self._root) as found:
            next(found, None)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as fault:
            if self._root.is_dir():
                raise ObjectGone(f"{fault.filename} is not there") from None
            raise ObjectStoreFailed(f"the folder {self._root} is not there: make it, or mount its disk") from None
        except OSError as fault:
            if isinstance(fault, ObjectStoreFailed):
                raise
            raise ObjectStoreFailed(f"{self._root}: {fault}") from fault


class _Bucket:
    """What fsspec reaches at a URL. wanted: what to do where credentials are missing."""

    def __init__(self, files: Any, root: str, url: str, wanted: str) -> None:
        self.url = url.rstrip("/")
        self._wanted = wanted
        self._files = files
        self._root = root

    def names(self) -> list[str]:
        with self._told():
            try:
                found = cast(list[str], self._files.ls(self._root, detail=False))
            except FileNotFoundError as fault:
                # Of s3fs both a bucket and a prefix that are not there; behind that of a bucket an answer stands.
                if fault.__cause__ is not None:
                    raise ObjectStoreFailed(f"{self.url}: there is no such bucket: make it first") from None
                found = []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def write(self, path: str, pieces: Iterable[bytes | memoryview], size: int) -> None:
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        with self._told():
            file = self._files.open(f"{self._root}/{path}", "wb", block_size=part, autocommit=False)
        try:
            for piece in pieces:
                with self._told():
                    file.write(piece)
            with self._told():
                file.close()
                file.commit()
        except BaseException:
            # A process that is killed leaves its parts to the bucket's rule for unfinished uploads.
            with contextlib.suppress(ObjectStoreFailed, NotImplementedError), self._told():
                file.discard()
            file.closed = True  # or fsspec would finish the upload when the object is collected
            raise

    def read(self, path: str, start: int, stop: int) -> bytes:
        with self._told():
            try:
                return cast(bytes, self._files.cat_file(f"{self._root}/{path}", start=start, end=stop))
            except OSError as fault:
                if fault.errno != errno.EINVAL:
                    raise
                return b""  # the range begins where the object has ended

    def remove(self, folder: str, first: str) -> None:
        with self._told():
            for path in sorted(self._found(folder), key=lambda path: path.rpartition("/")[2] != first):
                self._files.rm_file(path)

    def find(self, name: str) -> list[str]:
        with self._told():
            paths = (path.removeprefix(f"{self._root}/") for path in self._found(""))
            return sorted(path for path in paths if path.rpartition("/")[2] == name)

    def _found(self, folder: str) -> list[str]:
        try:
            return cast(list[str], self._files.find(f"{self._root}/{folder}".rstrip("/")))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raise ObjectStoreFailed in place of what fsspec and the libraries below raise in the block."""
        try:
            yield
        except FileNotFoundError as fault:
            raise ObjectGone(f"{self.url}: {fault}: the bucket, or the object, is not there") from None
        except ObjectStoreFailed:
            raise
        except _faults() as fault:
            said = f"{self.url}: {' '.join(str(fault).split()) or type(fault).__name__}"
            if isinstance(fault, PermissionError) or _REFUSED.search(f"{type(fault).__name__} {fault}"):
                said += f": {self._wanted}"
            raise ObjectStoreFailed(said) from None


def _faults() -> tuple[type[Exception], ...]:
    """What fsspec and the libraries below raise, of those that are loaded; RuntimeError and ValueError are raised by
    gcsfs and adlfs, for answers of a store too."""
    loaded = ((sys.modules.get(module), names) for module, names in _FAULTS.items())
    found = (getattr(module, name) for module, names in loaded if module for name in names)
    return OSError, RuntimeError, ValueError, *found


def shown(url: str) -> str:
    """A URL without user and password."""
    return re.sub(r"//[^/@]*@", "//", url)
