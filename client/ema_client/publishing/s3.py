"""A prefix of an S3 bucket as a place to publish to, by s3fs (fsspec's file system for S3).

Credentials, region and endpoint are those of every AWS tool: ``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL`` (MinIO, Ceph, R2), an instance's role.

Knows: s3fs, multipart uploads, what S3's refusals mean. Does not know: weights, formats, other places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, cast

from ema_client.errors import DestinationFailed, UsageError

__all__ = ["S3"]

#: Bytes of a part of an upload: so many, a few times over, are held in memory. S3 takes 5 MiB or more.
_PART_BYTES = 16 << 20
#: S3 takes 10,000 parts of an object.
_MOST_PARTS = 9_000


class S3:
    """The objects of a bucket whose keys begin with a prefix; a Store. Raises UsageError where s3fs is missing."""

    at_once = False

    def __init__(self, bucket: str, prefix: str) -> None:
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._root = f"{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        try:
            import s3fs
        except ModuleNotFoundError:
            raise UsageError("S3 needs s3fs, which is not installed", hint="pip install huggingface_hub s3fs") from None
        # Not an instance that other users of fsspec in this process share, with listings of its own memory.
        self._files: Any = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def names(self) -> frozenset[str]:
        with self._told():
            try:
                found = self._files.ls(self._root, detail=False)
            except FileNotFoundError as fault:
                # s3fs has one class for both: an answer of S3 stands behind it where the bucket is not there.
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
            file.closed = True
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
        """Raise DestinationFailed in place of what s3fs and the AWS library below raise in the block."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        try:
            yield
        except FileNotFoundError:
            raise DestinationFailed(f"{self.url}: there is no bucket {self._bucket!r}", hint="make it first") from None
        except (NoCredentialsError, PermissionError) as fault:
            raise DestinationFailed(
                f"{self.url}: {fault}",
                hint="give credentials that may write there, as for every AWS tool: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            ) from None
        except (OSError, BotoCoreError, ClientError) as fault:
            raise DestinationFailed(f"{self.url}: {fault}") from None


class _Telling:
    """A file of s3fs whose write() raises DestinationFailed."""

    def __init__(self, file: Any, told: Any) -> None:
        self._file = file
        self._told = told

    def write(self, piece: bytes | memoryview) -> int:
        with self._told():
            return cast(int, self._file.write(piece))
