"""docker/kubernetes-cluster/ is true without a cluster: its names, and its programs started as their pods would be.

Knows what of a manifest a container gets: command, environment, volumes, probes. Does not know schemas
(test_kubernetes.py), or who schedules, mounts and kills.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from ema_client import EmaClient, __version__
from ema_service.sizes import parse_size
from ema_service.tokens import create_token
from tests.forked import Forked
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes-cluster"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
README = (ROOT / "docker" / "README.md").read_text()
MANIFESTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
OBJECTS = [each for name, docs in MANIFESTS.items() for each in docs if name != "kustomization.yaml"]


def named(kind: str) -> dict[str, Any]:
    """The objects of a kind, by name."""
    return {each["metadata"]["name"]: each for each in OBJECTS if each["kind"] == kind}


WORKLOADS = {**named("StatefulSet"), **named("Deployment")}
PODS = {name: each["spec"]["template"]["spec"] for name, each in WORKLOADS.items()}
CONTAINERS = {name: pod["containers"][0] for name, pod in PODS.items()}
HOSTS = WORKLOADS["ema-host"]["spec"]
PLACES = range(HOSTS["replicas"])
#: A pod's own number, as Kubernetes writes it since 1.28.
POD_INDEX = "metadata.labels['apps.kubernetes.io/pod-index']"


def environment(name: str, place: int = 0) -> dict[str, str]:
    """A container's variables, each with what it names of those before."""
    fields = {"metadata.name": f"{name}-{place}", POD_INDEX: str(place)}
    found: dict[str, str] = {}
    for each in CONTAINERS[name].get("env", ()):
        value = each["value"] if "value" in each else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
        found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
    return found


def test_kustomization_has_every_file() -> None:
    """Each manifest is applied, but for those that need the Prometheus operator; the image is this version's."""
    (kustomization,) = MANIFESTS["kustomization.yaml"]
    (image,) = kustomization["images"]
    assert set(kustomization["resources"]) == set(MANIFESTS) - {"kustomization.yaml", "pod-monitor.yaml"}
    assert {each["image"] for each in CONTAINERS.values()} == {f"{image['name']}:{image['newTag']}"}
    assert image["newTag"] == __version__
    assert image["name"].partition("/")[0].endswith(".invalid")


def test_selectors_find_their_pods_and_ports_agree() -> None:
    """Each workload has its Service, NetworkPolicy and PodMonitor, and whatever names a port or a volume names one."""
    services, policies, monitors = named("Service"), named("NetworkPolicy"), named("PodMonitor")
    assert set(WORKLOADS) == set(services) == set(policies) == set(monitors)
    budgets = named("PodDisruptionBudget")
    assert set(budgets) == {"ema-host", "ema-gateway"}
    for name, each in WORKLOADS.items():
        spec, labels = each["spec"], each["spec"]["template"]["metadata"]["labels"]
        selectors = [spec["selector"]["matchLabels"], services[name]["spec"]["selector"]]
        selectors += [policies[name]["spec"]["podSelector"]["matchLabels"]]
        selectors += [monitors[name]["spec"]["selector"]["matchLabels"]]
        selectors += [budgets[name]["spec"]["selector"]["matchLabels"]] if name in budgets else []
        assert all(selector == labels for selector in selectors), name
        (port,) = CONTAINERS[name]["ports"]
        (served,) = services[name]["spec"]["ports"]
        assert (served["port"], served["targetPort"]) == (port["containerPort"], port["name"])
        assert [each["port"] for each in monitors[name]["spec"]["podMetricsEndpoints"]] == [port["name"]]
        volumes = {each["name"] for each in PODS[name]["volumes"]}
        volumes |= {each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", ())}
        assert {each["name"] for each in CONTAINERS[name]["volumeMounts"]} == volumes


def test_who_reaches_whom() -> None:
    """Every connection that the programs open is let out on one side and in on the other, and the coordinator's port is
    for hosts, gateways and Prometheus alone."""
    policies = named("NetworkPolicy")
    ports = {name: CONTAINERS[name]["ports"][0]["containerPort"] for name in CONTAINERS}

    def lets_out(name: str) -> set[tuple[str, int]]:
        return {
            (to["podSelector"]["matchLabels"]["app.kubernetes.io/name"], port["port"])
            for rule in policies[name]["spec"]["egress"]
            for to in rule["to"]
            for port in rule["ports"]
            if "podSelector" in to
        }

    coordinator = ("ema-coordinator", ports["ema-coordinator"])
    assert lets_out("ema-host") == {coordinator}
    assert lets_out("ema-gateway") == {coordinator, ("ema-host", ports["ema-host"])}
    assert lets_out("ema-coordinator") == set()
    (rule,) = policies["ema-coordinator"]["spec"]["ingress"]
    assert [each.get("podSelector", {}).get("matchLabels") for each in rule["from"]] == [
        {"app.kubernetes.io/name": "ema-host"},
        {"app.kubernetes.io/name": "ema-gateway"},
        None,
    ]


def test_hosts_find_each_other_before_they_are_ready() -> None:
    """All are started at once, under names that are there from the start; each has the shard of its number, and is
    known by its own stable name."""
    headless = named("Service")[HOSTS["serviceName"]]["spec"]
    assert HOSTS["podManagementPolicy"] == "Parallel"
    assert (headless["clusterIP"], headless["publishNotReadyAddresses"]) == ("None", True)
    port = CONTAINERS["ema-host"]["ports"][0]["containerPort"]
    for place in PLACES:
        found = environment("ema-host", place)
        assert found["EMA_SERVICE_SHARD"] == f"{place}/{HOSTS['replicas']}"
        assert found["EMA_SERVICE_CLUSTER_ADDRESS"] == f"http://ema-host-{place}.{HOSTS['serviceName']}:{port}"
    coordinator = f"http://ema-coordinator:{CONTAINERS['ema-coordinator']['ports'][0]['containerPort']}"
    assert {environment(name)["EMA_SERVICE_COORDINATOR"] for name in ("ema-host", "ema-gateway")} == {coordinator}


def test_pods_are_what_the_image_expects() -> None:
    """User, port and data folder are the Dockerfile's; volumes alone may be written to; memory is limited."""
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    for name, pod in PODS.items():
        security, container = pod["securityContext"], CONTAINERS[name]["securityContext"]
        assert {security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}
        assert (security["runAsNonRoot"], container["readOnlyRootFilesystem"]) == (True, True)
        assert container["allowPrivilegeEscalation"] is False
        assert container["capabilities"] == {"drop": ["ALL"]}
        assert (pod["enableServiceLinks"], pod["automountServiceAccountToken"]) == (False, False)
        assert "memory" in CONTAINERS[name]["resources"]["limits"]
    (ram,) = (volume["emptyDir"] for volume in PODS["ema-host"]["volumes"] if volume["name"] == "ram")
    assert ram["medium"] == "Memory"
    limit = CONTAINERS["ema-host"]["resources"]["limits"]["memory"]
    assert parse_size(f"{ram['sizeLimit']}B") < parse_size(f"{limit}B")
    assert WORKLOADS["ema-coordinator"]["spec"]["strategy"] == {"type": "Recreate"}


def test_secrets_are_made_by_the_readme_and_not_in_git() -> None:
    """No manifest is a Secret; the README makes each that is named, with the file that is read."""
    assert not named("Secret")
    for name, pod in PODS.items():
        mounts = {each["name"]: each["mountPath"] for each in CONTAINERS[name]["volumeMounts"]}
        files = [environment(name)["EMA_SERVICE_CLUSTER_TOKEN_FILE"]]
        words = CONTAINERS[name]["args"]
        files += [words[words.index("--token-file") + 1]] if name == "ema-host" else []
        secrets = {mounts[each["name"]]: each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each}
        assert {str(Path(file).parent) for file in files} == set(secrets)
        for file in map(Path, files):
            assert f"create secret generic {secrets[str(file.parent)]} --from-file={file.name}\n" in README


def test_the_component_of_tls() -> None:
    """With it every address is https, every probe asks so, and each program is given what the Secret has."""
    (component,) = yaml.safe_load_all((FOLDER / "tls" / "kustomization.yaml").read_text())
    patched = {
        each["metadata"]["name"]: each for each in (yaml.safe_load(one["patch"]) for one in component["patches"])
    }
    assert {name: each["kind"] for name, each in patched.items()} == {name: WORKLOADS[name]["kind"] for name in PODS}
    for name, each in patched.items():
        pod = each["spec"]["template"]["spec"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert container["name"] == CONTAINERS[name]["name"]
        added = {one["name"]: one["value"] for one in container["env"]}
        plain = {one["name"]: one.get("value", "") for one in CONTAINERS[name].get("env", ())}
        for variable, value in plain.items():
            if value.startswith("http://"):
                assert added.pop(variable) == value.replace("http://", "https://")
        (mount,) = container["volumeMounts"]
        assert volume["name"] == mount["name"] not in {one["name"] for one in PODS[name]["volumes"]}
        wanted = {"EMA_SERVICE_SSL_CERTFILE": "tls.crt", "EMA_SERVICE_SSL_KEYFILE": "tls.key"}
        wanted |= {} if name == "ema-coordinator" else {"SSL_CERT_FILE": "ca.crt"}
        assert added == {variable: f"{mount['mountPath']}/{file}" for variable, file in wanted.items()}
        probes = {key: value for key, value in container.items() if key.endswith("Probe")}
        assert probes == {key: {"httpGet": {"scheme": "HTTPS"}} for key in CONTAINERS[name] if key.endswith("Probe")}
        secret = volume["secret"]["secretName"]
        assert f"create secret generic {secret} --from-file=tls.crt --from-file=tls.key --from-file=ca.crt\n" in README


# --- the programs, as their pods would run them -----------------------------------------------------------------------


class Pods:
    """The containers' commands, environments and volumes on this machine, each program at a port of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        self._started: list[Forked] = []
        self.urls = {name: self._free() for name in ("ema-coordinator", "ema-gateway", *map(self.host, PLACES))}
        self.token = create_token(folder / "tokens", ["train"], "*")
        (folder / "cluster-token").write_text("0123456789abcdef\n")

    @staticmethod
    def host(place: int) -> str:
        return f"ema-host-{place}"

    @staticmethod
    def _free() -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"http://127.0.0.1:{free.getsockname()[1]}"

    def _here(self, text: str, folder: Path) -> str:
        """A word of a manifest with this machine's paths and addresses."""
        for name, url in self.urls.items():
            text = re.sub(rf"^http://{name}(\.ema-host)?:\d+$", url, text)
        moved = {"/etc/ema-service/tokens": self._folder / "tokens"}
        moved["/etc/ema-cluster/cluster-token"] = self._folder / "cluster-token"
        moved |= {path: folder / path.strip("/") for path in ("/data", "/ram/versions")}
        return str(moved.get(text, text))

    def start(self, name: str, place: int = 0) -> str:
        """Start a pod's program as its image and its manifest say; its URL."""
        url = self.urls[self.host(place) if name == "ema-host" else name]
        folder = self._folder / f"{name}-{place}"
        (folder / "ram").mkdir(parents=True)
        container = CONTAINERS[name]
        (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
        program, *words = [*container.get("command", json.loads(entrypoint)), *container["args"]]
        assert program == "ema-service"
        words[words.index("--port") + 1] = url.rpartition(":")[2]
        for variable in [variable for variable in os.environ if variable.startswith("EMA_")]:
            self._monkeypatch.delenv(variable)
        for variable, value in environment(name, place).items():
            self._monkeypatch.setenv(variable, self._here(value, folder))
        log = folder / "log"
        log.touch()
        self._started.append(Forked(["-m", "ema_service", *(self._here(word, folder) for word in words)], log))
        ended = self._started[-1].poll
        wait_until(lambda: ended() is not None or probe(url, name, "livenessProbe"), f"{name} to live")
        assert ended() is None, log.read_text()
        return url

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait(30)


def probe(url: str, name: str, kind: str) -> bool:
    """Whether the kubelet would find the container well: it asks by the pod's address, without a token."""
    try:
        return httpx.get(f"{url}{CONTAINERS[name][kind]['httpGet']['path']}", timeout=5).is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    made = Pods(tmp_path, monkeypatch)
    yield made
    made.end()


def test_pods_form_a_cluster(pods: Pods) -> None:
    """Whoever comes first is live and waits: hosts without a coordinator are not ready, and are not killed for it. With
    all of them there trainers are served, and with a token alone."""
    hosts = [pods.start("ema-host", place) for place in PLACES]
    gateway = pods.start("ema-gateway")
    assert not any(probe(url, "ema-host", "readinessProbe") for url in hosts)
    assert probe(gateway, "ema-gateway", "readinessProbe")
    assert httpx.get(f"{gateway}/readyz").status_code == 503

    coordinator = pods.start("ema-coordinator")
    assert probe(coordinator, "ema-coordinator", "readinessProbe")
    wait_until(lambda: all(probe(url, "ema-host", "readinessProbe") for url in hosts), "hosts that are ready")
    wait_until(lambda: httpx.get(f"{gateway}/readyz").status_code == 200, "all of the cluster")
    assert httpx.get(f"{gateway}/v1/runs").status_code == 401
    with EmaClient(gateway, token=pods.token) as client:
        client.create_run("r", {"w": torch.arange(60.0).reshape(20, 3)}, decay=0.5)
        assert client.push("r", {"w": torch.ones(20, 3)}, step=1).applied
        assert client.pull("r").info.step == 1
        assert client.run("r").versions_in == "memory files"
    for url in (*hosts, gateway, coordinator):
        wanted = 401 if url in hosts else 200
        assert httpx.get(f"{url}/metrics").status_code == wanted
