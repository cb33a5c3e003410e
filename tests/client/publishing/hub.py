"""A test double of a foreign service: as much of the Hugging Face Hub's HTTP API as publishing a model asks for.

The real huggingface_hub speaks to the double, by the LFS way (HF_HUB_DISABLE_XET): repositories, branches, uploads by
hash, commits of many files at once, listing and reading. What the real Hub refuses beyond that (quotas, licences, names
that are taken) is not played here.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["TOKEN", "Hub"]

TOKEN = "hf_of-this-test"


class Hub:
    """The double, listening. branches: by model and branch, the files of the newest commit; commits: their summaries.

    objects: what was uploaded, by hash. private: of each model. refuse: asked of each request for a status to refuse
    it with, None to answer.
    """

    def __init__(self) -> None:
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.refuse: Callable[[str, str], int | None] = lambda _method, _path: None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                _answer(hub, self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _answer(hub: Hub, request: http.server.BaseHTTPRequestHandler) -> None:
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    path = unquote(urlsplit(request.path).path)
    uploaded = path.startswith("/objects/")
    status = hub.refuse(request.command, path)
    if status is None and not uploaded and request.headers.get("Authorization") != f"Bearer {TOKEN}":
        status = 401
    headers: dict[str, str] = {}
    said: Any = {"error": "refused by the test"}
    if status is None:
        status, said, headers = _done(hub, request.command, path, body)
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    request.send_response(status)
    for name, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(raw)


def _done(hub: Hub, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
    words = path.strip("/").split("/")
    if path == "/api/repos/create":
        return _create(hub, json.loads(body))
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}, {}
    if words[0] == "objects":
        hub.objects[words[1]] = body
        return (200 if hashlib.sha256(body).hexdigest() == words[1] else 400), {}, {}
    if path.endswith(".git/info/lfs/objects/batch"):
        wanted = json.loads(body)["objects"]
        return 200, {"objects": [_upload(hub, each) for each in wanted]}, {}
    if words[2:3] == ["resolve"]:
        return _resolve(hub, "/".join(words[:2]), words[3], "/".join(words[4:]))
    model, act, branch = "/".join(words[2:4]), words[4], "/".join(words[5:])
    if act == "branch":
        return _branch(hub, model, branch)
    files = hub.branches.get((model, branch))
    if files is None:
        return _missing(model in hub.private)
    if act == "tree":
        return 200, [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files], {}
    if act == "preupload":
        return 200, {"files": [_mode(each) for each in json.loads(body)["files"]]}, {}
    assert (method, act) == ("POST", "commit"), path
    return _commit(hub, model, branch, [json.loads(line) for line in body.splitlines()])


def _missing(known: bool) -> tuple[int, Any, dict[str, str]]:
    return 404, {"error": "not there"}, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}


def _create(hub: Hub, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    model = f"{asked['organization']}/{asked['name']}"
    url = {"url": f"{hub.url}/{model}"}
    if model in hub.private:
        return 409, url, {}
    private = asked.get("private", asked.get("visibility") == "private")
    hub.private[model], hub.branches[model, "main"] = private, {".gitattributes": b"*.safetensors filter=lfs"}
    return 200, url, {}


def _branch(hub: Hub, model: str, branch: str) -> tuple[int, Any, dict[str, str]]:
    there = (model, branch) in hub.branches
    hub.branches.setdefault((model, branch), dict(hub.branches[model, "main"]))
    return (409 if there else 200), {}, {}


def _upload(hub: Hub, wanted: dict[str, Any]) -> dict[str, Any]:
    known = {"oid": wanted["oid"], "size": wanted["size"]}
    if wanted["oid"] in hub.objects:
        return known
    return {**known, "actions": {"upload": {"href": f"{hub.url}/objects/{wanted['oid']}"}}}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _resolve(hub: Hub, model: str, branch: str, name: str) -> tuple[int, Any, dict[str, str]]:
    content = hub.branches[model, branch].get(name)
    if content is None:
        return 404, {}, {"X-Error-Code": "EntryNotFound"}
    return 200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}


def _commit(hub: Hub, model: str, branch: str, lines: list[dict[str, Any]]) -> tuple[int, Any, dict[str, str]]:
    files = dict(hub.branches[model, branch])
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
        else:
            hub.commits.append(value["summary"])
    hub.branches[model, branch] = files
    oid = f"{len(hub.commits):040x}"
    return 200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{model}/commit/{oid}"}, {}
