"""A model on the Hugging Face Hub as a place to publish to, by huggingface_hub.

Every publish is one commit. A shard is spooled to a temporary file ($TMPDIR), as the Hub wants its hash ahead of its
bytes, sent, and removed: no more than one shard lies on this machine's disk. The token is that of every program of the
Hub: ``HF_TOKEN``, or what ``hf auth login`` has saved.

Knows: huggingface_hub, the names of the Hub. Does not know: weights, formats, other places.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ema_client.errors import DestinationFailed, UsageError

__all__ = ["Hub", "hub_of"]

#: The Hub keeps larger files outside of git, so that they are sent ahead of the commit.
_MOST_IN_GIT = 16 << 20
_URL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+?))?/?\Z", re.ASCII)


def hub_of(url: str, *, public: bool) -> Hub:
    """The place of ``hf://owner/name[@revision][/folder]``; a / of a revision is written %2F. Raises UsageError."""
    found = _URL.match(url)
    if not found:
        raise UsageError(f"{url!r} names no model on the Hub", hint="write hf://owner/name, or hf://owner/name@branch")
    model, revision, folder = found.groups()
    return Hub(model, None if revision is None else revision.replace("%2F", "/"), folder or "", public=public)


class Hub:
    """A model on the Hub, or a folder of one; a Store. Raises UsageError where huggingface_hub is missing.

    revision: the branch to commit to, made where there is none; None: the main branch. public: a model that is not
    there yet is made for everybody to read; else for its owner alone. A model that is there stays what it is.
    """

    at_once = True

    def __init__(self, model: str, revision: str | None, folder: str, *, public: bool) -> None:
        self._model = model
        self._revision = revision
        self._front = f"{folder}/" if folder else ""
        self._public = public
        self.url = f"hf://{model}{f'@{revision}' if revision else ''}{f'/{folder}' if folder else ''}"
        try:
            import huggingface_hub
        except ModuleNotFoundError:
            hint = "pip install huggingface_hub s3fs"
            raise UsageError("the Hub needs huggingface_hub, which is not installed", hint=hint) from None
        self._hub: Any = huggingface_hub
        self._api: Any = huggingface_hub.HfApi(library_name="ema-client")
        self._added: list[Any] = []
        #: The branch whose files are there: a branch that is not made yet will begin with those of the main one.
        self._seen = revision
        self._made = False

    def names(self) -> frozenset[str]:
        with self._told():
            found = self._listed()
        inside = (path.removeprefix(self._front) for path in found if path.startswith(self._front))
        return frozenset(name for name in inside if "/" not in name)

    def read(self, name: str) -> bytes:
        with self._told(), tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self._model, f"{self._front}{name}", revision=self._seen, local_dir=folder)
            return Path(path).read_bytes()

    def _listed(self) -> list[str]:
        errors = self._hub.errors
        try:
            return cast(list[str], self._api.list_repo_files(self._model, revision=self._revision))
        except errors.RevisionNotFoundError:
            self._seen = None
            return cast(list[str], self._api.list_repo_files(self._model))
        except errors.RepositoryNotFoundError:
            return []

    def _make(self) -> None:
        """Make the model and the branch where they are not there, with the first file: not for weights that never
        come."""
        if not self._made:
            with self._told():
                self._api.create_repo(self._model, private=not self._public, exist_ok=True)
                if self._revision:
                    self._api.create_branch(self._model, branch=self._revision, exist_ok=True)
            self._made = True

    @contextlib.contextmanager
    def writing(self, name: str, size: int) -> Iterator[BinaryIO]:
        self._make()
        descriptor, spooled = tempfile.mkstemp(prefix="ema-publish-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield cast(BinaryIO, file)
            with self._told():
                # A small file may go to git, with the commit: its bytes must outlive the temporary file.
                content = spooled if size > _MOST_IN_GIT else Path(spooled).read_bytes()
                added = self._hub.CommitOperationAdd(f"{self._front}{name}", content)
                self._api.preupload_lfs_files(self._model, [added], revision=self._revision)
            self._added.append(added)
        finally:
            Path(spooled).unlink(missing_ok=True)

    def finish(self, removed: Collection[str], said: str) -> str:
        deleted = [self._hub.CommitOperationDelete(f"{self._front}{name}") for name in removed]
        with self._told():
            commit = self._api.create_commit(
                self._model, [*self._added, *deleted], commit_message=said, revision=self._revision
            )
        return cast(str, commit.oid)

    def loads_from(self) -> tuple[str, dict[str, str]]:
        given = {"revision": self._revision, "subfolder": self._front.rstrip("/")}
        return self._model, {name: value for name, value in given.items() if value}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raise DestinationFailed in place of what huggingface_hub and the HTTP library below raise in the block."""
        from huggingface_hub.errors import HfHubHTTPError

        utils = self._hub.utils
        silent = utils.are_progress_bars_disabled()
        # The HTTP library is another one from version to version of huggingface_hub: its base class is the first here.
        http_error = HfHubHTTPError.__bases__[0]
        try:
            utils.disable_progress_bars()  # the caller draws the only bar
            yield
        except (http_error, OSError, RuntimeError, ValueError) as fault:
            status = getattr(getattr(fault, "response", None), "status_code", None)
            login = "log in by `hf auth login`, or set HF_TOKEN, with a token that may write to the model"
            hint = login if status in (401, 403) or "oken" in str(fault) else ""
            # huggingface_hub tells which file it was sending, and why that failed as the cause.
            why = f": {fault.__cause__}" if isinstance(fault, RuntimeError) and fault.__cause__ else ""
            said = " ".join(f"{str(fault).rstrip('.') or type(fault).__name__}{why}".split())
            raise DestinationFailed(f"{self.url}: {said}", hint=hint) from None
        finally:
            if not silent:
                utils.enable_progress_bars()
