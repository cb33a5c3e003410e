"""Manifests of a cluster, with components of its kustomization or without: what a container is given of them, and the
programs started as their pods would be.

Knows what a component does to a manifest, as `kubectl kustomize` has it, in so far as these components say it; and
commands, environment, volumes and probes. Does not know schemas, or who schedules, mounts and kills.
"""

from __future__ import annotations

import copy
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ema_service.tokens import create_token
from tests.forked import Forked
from tests.waiting import wait_until

__all__ = ["DOCKERFILE", "Manifests", "Pods", "objects_in", "with_component"]

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
#: A pod's own number, as Kubernetes writes it since 1.28.
POD_INDEX = "metadata.labels['apps.kubernetes.io/pod-index']"

Object = dict[str, Any]


def objects_in(path: Path) -> list[Object]:
    """The objects of a file."""
    return list(yaml.safe_load_all(path.read_text()))


# --- components ------------------------------------------------------------------------------------------------------


def with_component(objects: Iterable[Object], folder: Path) -> list[Object]:
    """The objects as they are with the component of a folder."""
    (component,) = objects_in(folder / "kustomization.yaml")
    more = (each for name in component.get("resources", ()) for each in objects_in(folder / name))
    found = {(each["kind"], each["metadata"]["name"]): copy.deepcopy(each) for each in (*objects, *more)}
    for patch in component["patches"]:
        said = yaml.safe_load(patch["patch"])
        if "target" in patch:
            reduce(_operated, said, found[patch["target"]["kind"], patch["target"]["name"]])
        else:
            key = said["kind"], said["metadata"]["name"]
            found[key] = _merged(found[key], said)
    return list(found.values())


def _operated(each: Object, operation: Mapping[str, Any]) -> Object:
    """One operation of a JSON patch (RFC 6902), in place."""
    *way, last = operation["path"].strip("/").split("/")
    at: Any = reduce(lambda found, key: found[int(key)] if isinstance(found, list) else found[key], way, each)
    if operation["op"] == "add" and last == "-":
        at.append(operation["value"])
    else:
        assert operation["op"] == "replace"
        assert last in at
        at[last] = operation["value"]
    return each


def _merged(into: Any, patch: Any) -> Any:
    """A strategic merge. Of lists that have names for keys the patch's items come first, and that is why a patch has to
    name what its variables are made of once more."""
    if isinstance(patch, dict) and isinstance(into, dict):
        return {**into, **{key: _merged(into[key], value) if key in into else value for key, value in patch.items()}}
    if isinstance(patch, list) and isinstance(into, list) and all("name" in each for each in (*into, *patch)):
        there = {each["name"]: each for each in into}
        first = [_merged(there.get(each["name"], {}), each) for each in patch]
        return [*first, *(each for name, each in there.items() if name not in {one["name"] for one in patch})]
    return patch


# --- what a container gets --------------------------------------------------------------------------------------------


class Manifests:
    """Objects by what they are. workloads, pods, containers: by name."""

    def __init__(self, objects: Iterable[Object]) -> None:
        self.objects = list(objects)
        self.workloads = {**self.named("StatefulSet"), **self.named("Deployment")}
        self.pods = {name: each["spec"]["template"]["spec"] for name, each in self.workloads.items()}
        self.containers = {name: pod["containers"][0] for name, pod in self.pods.items()}

    def named(self, kind: str) -> dict[str, Object]:
        """The objects of a kind, by name."""
        return {each["metadata"]["name"]: each for each in self.objects if each["kind"] == kind}

    def places(self, name: str) -> range:
        """The numbers of a workload's pods."""
        return range(self.workloads[name]["spec"]["replicas"])

    def environment(self, name: str, place: int = 0) -> dict[str, str]:
        """A container's variables, each with what it names of those before. Raises KeyError for one that is not
        before."""
        fields = {"metadata.name": f"{name}-{place}", POD_INDEX: str(place)}
        found: dict[str, str] = {}
        for each in self.containers[name].get("env", ()):
            value = each["value"] if "value" in each else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
            found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
        return found

    def lets_out(self, name: str) -> set[tuple[str, int]]:
        """Which workloads a workload's NetworkPolicy lets it reach, and at which port."""
        return {
            (to["podSelector"]["matchLabels"]["app.kubernetes.io/name"], port["port"])
            for rule in self.named("NetworkPolicy")[name]["spec"]["egress"]
            for to in rule["to"]
            for port in rule["ports"]
            if "podSelector" in to
        }

    def lets_in(self, name: str) -> set[str | None]:
        """Which workloads a workload's NetworkPolicy lets in; None for all of the namespace."""
        return {
            each["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
            for rule in self.named("NetworkPolicy")[name]["spec"]["ingress"]
            for each in rule["from"]
            if "podSelector" in each
        }


# --- the programs, as their pods would run them -----------------------------------------------------------------------


class Pods:
    """The containers' commands, environments and volumes on this machine, each program at a port of its own."""

    def __init__(self, manifests: Manifests, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._manifests, self._folder, self._monkeypatch = manifests, folder, monkeypatch
        self._started: dict[tuple[str, int], Forked] = {}
        self.urls = {
            self._pod(name, place): self._free() for name in manifests.workloads for place in manifests.places(name)
        }
        self.token = create_token(folder / "tokens", ["train"], "*")
        (folder / "cluster-token").write_text("0123456789abcdef\n")
        (folder / "replica-token").write_text(create_token(folder / "tokens", ["pull"], "*"))

    def _pod(self, name: str, place: int) -> str:
        """The name by which others reach a pod: its own of a StatefulSet, else its Service's."""
        own = self._manifests.workloads[name]["kind"] == "StatefulSet"
        return f"{name}-{place}.{name}" if own else name

    @staticmethod
    def _free() -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"http://127.0.0.1:{free.getsockname()[1]}"

    def _here(self, text: str, folder: Path) -> str:
        """A word of a manifest with this machine's paths and addresses."""
        for name, url in self.urls.items():
            text = re.sub(rf"^http://{name}:\d+$", url, text)
        moved = {"/etc/ema-service/tokens": self._folder / "tokens"}
        moved["/etc/ema-cluster/cluster-token"] = self._folder / "cluster-token"
        moved["/etc/ema-replica/replica-token"] = self._folder / "replica-token"
        moved |= {path: folder / path.strip("/") for path in ("/data", "/ram/versions")}
        return str(moved.get(text, text))

    def start(self, name: str, place: int = 0) -> str:
        """Start a pod's program as its image and its manifest say; its URL."""
        url = self.urls[self._pod(name, place)]
        folder = self._folder / f"{name}-{place}"
        (folder / "ram").mkdir(parents=True)
        container = self._manifests.containers[name]
        (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
        program, *words = [*container.get("command", json.loads(entrypoint)), *container["args"]]
        assert program == "ema-service"
        words[words.index("--port") + 1] = url.rpartition(":")[2]
        for variable in [variable for variable in os.environ if variable.startswith("EMA_")]:
            self._monkeypatch.delenv(variable)
        for variable, value in self._manifests.environment(name, place).items():
            self._monkeypatch.setenv(variable, self._here(value, folder))
        log = folder / "log"
        log.touch()
        process = Forked(["-m", "ema_service", *(self._here(word, folder) for word in words)], log)
        self._started[name, place] = process
        ended = process.poll
        wait_until(lambda: ended() is not None or self.probe(url, name, "livenessProbe"), f"{name} to live")
        assert ended() is None, log.read_text()
        return url

    def start_all(self, name: str) -> list[str]:
        """Start all pods of a workload; their URLs."""
        return [self.start(name, place) for place in self._manifests.places(name)]

    def probe(self, url: str, name: str, kind: str) -> bool:
        """Whether the kubelet would find the container well: it asks by the pod's address, without a token."""
        try:
            path = self._manifests.containers[name][kind]["httpGet"]["path"]
            return httpx.get(f"{url}{path}", timeout=5).is_success
        except httpx.TransportError:
            return False

    def ready(self, urls: Iterable[str], name: str) -> bool:
        """Whether the kubelet would find all of these pods ready."""
        return all(self.probe(url, name, "readinessProbe") for url in urls)

    def kill(self, name: str, place: int) -> None:
        """End a pod's program by SIGKILL."""
        self._started[name, place].kill()
        self._started[name, place].wait(30)

    def end(self) -> None:
        """Leave no process."""
        for name, place in self._started:
            self.kill(name, place)
