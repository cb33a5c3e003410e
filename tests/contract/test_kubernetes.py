"""docker/kubernetes/ is true without a cluster: its schemas, its names, and the server started as its pod would be.

Knows Kubernetes' own schemas (kubernetes-validate), the image's command, and what a pod's volumes look like to a
container. Does not know a cluster: who schedules, mounts and kills is not tried.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch
import yaml

from ema_client import EmaClient, __version__
from ema_service.sizes import parse_size
from ema_service.tokens import create_token
from tests.contract.pods import objects_in, with_component
from tests.forked import Forked
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
README = (ROOT / "docker" / "README.md").read_text()

MANIFESTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
OBJECTS = [each for name, docs in MANIFESTS.items() for each in docs if name != "kustomization.yaml"]
CLUSTER = ROOT / "docker" / "kubernetes-cluster"
#: Those of a cluster, which test_kubernetes_cluster.py is about, and what its components make of them.
OF_CLUSTER = [
    each for path in sorted(CLUSTER.glob("*.yaml")) for each in objects_in(path) if path.name != "kustomization.yaml"
]
OF_COMPONENTS = [
    each
    for path in sorted(CLUSTER.glob("*/kustomization.yaml"))
    for each in with_component(OF_CLUSTER, path.parent)
    if each not in OF_CLUSTER
]
POD_MONITOR = MANIFESTS["pod-monitor.yaml"][0]
POD_MONITORS = [POD_MONITOR, *(each for path in sorted(CLUSTER.rglob("pod-monitor.yaml")) for each in objects_in(path))]
STATEFUL_SET = MANIFESTS["stateful-set.yaml"][0]
TEMPLATE = STATEFUL_SET["spec"]["template"]
POD = TEMPLATE["spec"]
(CONTAINER,) = POD["containers"]
MOUNTS = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}

_NAMED_KEY = {
    "type": "object",
    "required": ["name", "key"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "key": {"type": "string"}},
}
#: The fields in use of monitoring.coreos.com/v1 PodMonitor, as the operator's API reference has them.
_POD_MONITOR: dict[str, Any] = {
    "required": ["selector", "podMetricsEndpoints"],
    "additionalProperties": False,
    "properties": {
        "jobLabel": {"type": "string"},
        "selector": {
            "type": "object",
            "properties": {"matchLabels": {"type": "object"}},
            "additionalProperties": False,
        },
        "podMetricsEndpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string"},
                    "interval": {"pattern": r"^[0-9]+(y|w|d|h|m|s|ms)$"},
                    "authorization": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"type": {"type": "string"}, "credentials": _NAMED_KEY},
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize(
    "each",
    [each for each in (*OBJECTS, *OF_CLUSTER, *OF_COMPONENTS) if each["kind"] != "PodMonitor"],
    ids=lambda each: f"{each['kind']}-{each['metadata']['name']}",
)
def test_manifests_fit_their_schemas(each: dict[str, Any]) -> None:
    """Each object is one that an old version of Kubernetes and the newest take, with no field unknown to them."""
    schemas = pytest.importorskip("kubernetes_validate", reason="not installed: pip install -e '.[test]'")

    for version in ("1.29", schemas.latest_version()):
        schemas.validate(each, version, strict=True)


def test_hosts_reach_a_snapshot_store_by_the_commented_block() -> None:
    """It stands where it belongs: the hosts may reach S3's port with it, beside what they reach without it."""
    text = (FOLDER.parent / "kubernetes-cluster" / "network-policy.yaml").read_text()
    plain, *_ = yaml.safe_load_all(text)
    given, *_ = yaml.safe_load_all(re.sub(r"^    # ((?:-|  ).*)$", r"    \1", text, flags=re.MULTILINE))
    assert given["metadata"]["name"] == "ema-host"
    assert given["spec"]["egress"] == [*plain["spec"]["egress"], {"ports": [{"port": 443, "protocol": "TCP"}]}]


def test_network_policy_with_a_snapshot_store_fits_its_schema() -> None:
    """With the commented block in place of the empty egress the pod may ask DNS and reach S3's port; nothing else is
    different."""
    schemas = pytest.importorskip("kubernetes_validate", reason="not installed: pip install -e '.[test]'")
    before, empty, after = (FOLDER / "network-policy.yaml").read_text().partition("  egress: []\n")
    block = re.findall(r"^  # ((?:egress:|  ).*)$", after, re.MULTILINE)
    (plain,) = MANIFESTS["network-policy.yaml"]
    given = yaml.safe_load(before + "".join(f"  {line}\n" for line in block))
    assert empty
    for version in ("1.29", schemas.latest_version()):
        schemas.validate(given, version, strict=True)

    dns, store = given["spec"]["egress"]
    assert [(each["port"], each["protocol"]) for each in dns["ports"]] == [(53, "UDP"), (53, "TCP")]
    assert store == {"ports": [{"port": 443, "protocol": "TCP"}]}
    assert given["spec"] | {"egress": []} == plain["spec"]
    assert "[network-policy.yaml](kubernetes/network-policy.yaml) has" in " ".join(README.split())


def test_a_misspelt_field_is_refused() -> None:
    """The check above would see it: the schemas are strict."""
    schemas = pytest.importorskip("kubernetes_validate", reason="not installed: pip install -e '.[test]'")
    misspelt = STATEFUL_SET | {"spec": STATEFUL_SET["spec"] | {"replica": 1}}

    with pytest.raises(schemas.ValidationError):
        schemas.validate(misspelt, schemas.latest_version(), strict=True)


def test_pod_monitor_fits_its_schema() -> None:
    """The Prometheus operator's objects have the operator's fields, and ask the way that the server answers."""
    for each in POD_MONITORS:
        jsonschema.validate(each["spec"], _POD_MONITOR)
    (endpoint,) = POD_MONITOR["spec"]["podMetricsEndpoints"]

    assert (POD_MONITOR["apiVersion"], POD_MONITOR["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert (endpoint["port"], endpoint["path"]) == (CONTAINER["ports"][0]["name"], "/metrics")


def test_alerts_know_the_jobs_of_pods() -> None:
    """The operator names a job after a label of the pods, and the alerts that look at a job look at that one."""
    rules = (ROOT / "docker" / "prometheus" / "ema-service.rules.yml").read_text()
    asked = re.findall(r'\{job(=~?)"([^"]+)"\}', rules)
    assert len(asked) == 2
    assert len(POD_MONITORS) == 5
    for monitor in POD_MONITORS:
        job = monitor["spec"]["selector"]["matchLabels"][monitor["spec"]["jobLabel"]]
        assert all(how == "=~" and re.fullmatch(pattern, job) for how, pattern in asked), job


def test_kustomization_has_every_file() -> None:
    """Each manifest is applied, but for the one that needs the Prometheus operator; the image is this version's."""
    (kustomization,) = MANIFESTS["kustomization.yaml"]
    (image,) = kustomization["images"]

    assert set(kustomization["resources"]) == set(MANIFESTS) - {"kustomization.yaml", "pod-monitor.yaml"}
    assert CONTAINER["image"] == f"{image['name']}:{image['newTag']}"
    assert image["newTag"] == __version__
    assert image["name"].partition("/")[0].endswith(".invalid")


def test_selectors_find_the_pod_and_names_agree() -> None:
    """Whatever selects, selects the StatefulSet's pod; whatever names a port, a volume or a Service names one."""
    labels = TEMPLATE["metadata"]["labels"].items()
    selectors = [
        STATEFUL_SET["spec"]["selector"]["matchLabels"],
        POD_MONITOR["spec"]["selector"]["matchLabels"],
        *(service["spec"]["selector"] for service in MANIFESTS["services.yaml"]),
        MANIFESTS["network-policy.yaml"][0]["spec"]["podSelector"]["matchLabels"],
        MANIFESTS["pod-disruption-budget.yaml"][0]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)

    volumes = {volume["name"] for volume in POD["volumes"]}
    claims = {claim["metadata"]["name"] for claim in STATEFUL_SET["spec"]["volumeClaimTemplates"]}
    services = {service["metadata"]["name"]: service["spec"] for service in MANIFESTS["services.yaml"]}
    (port,) = CONTAINER["ports"]
    assert set(MOUNTS) == volumes | claims
    assert services[STATEFUL_SET["spec"]["serviceName"]]["clusterIP"] == "None"
    assert {(p["port"], p["targetPort"]) for spec in services.values() for p in spec["ports"]} == {
        (port["containerPort"], port["name"])
    }


def test_pod_is_what_the_image_expects() -> None:
    """User, port and data folder are the Dockerfile's; volumes alone may be written to; memory is limited."""
    security, container = POD["securityContext"], CONTAINER["securityContext"]
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    (ram,) = (volume["emptyDir"] for volume in POD["volumes"] if volume["name"] == "ram")

    assert {security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}
    assert (security["runAsNonRoot"], container["readOnlyRootFilesystem"]) == (True, True)
    assert container["allowPrivilegeEscalation"] is False
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert f"EXPOSE {CONTAINER['ports'][0]['containerPort']}\n" in DOCKERFILE
    assert f"VOLUME {MOUNTS['data']}\n" in DOCKERFILE
    assert POD["enableServiceLinks"] is False
    limit, requested = (CONTAINER["resources"][kind]["memory"] for kind in ("limits", "requests"))
    assert ram["medium"] == "Memory"
    assert parse_size(f"{ram['sizeLimit']}B") < parse_size(f"{limit}B") == parse_size(f"{requested}B")


def test_secrets_are_made_by_the_readme_and_not_in_git() -> None:
    """No manifest is a Secret; the README makes each that is named, with the key that is read."""
    secret = next(volume["secret"]["secretName"] for volume in POD["volumes"] if "secret" in volume)
    token = POD_MONITOR["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]
    file = CONTAINER["args"][CONTAINER["args"].index("--token-file") + 1]

    assert "Secret" not in {each["kind"] for each in OBJECTS}
    assert Path(file).parent == Path(MOUNTS["tokens"])
    assert f"create secret generic {secret} --from-file={Path(file).name}\n" in README
    assert f"create secret generic {token['name']} --from-literal={token['key']}=" in README


# --- the server, as its pod would run it ----------------------------------------------------------------------------


class Pod:
    """The container's command, environment and volumes on this machine: each mounted folder lies in one of the test's.

    As in a cluster a volume's own folder is not the server's alone: it belongs to somebody else, where the tests may
    give it away, and others may write to it. The claim's disk has what ext4 leaves on a new disk.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.url = f"http://127.0.0.1:{port}"
        self.process: Forked | None = None
        for mount in MOUNTS.values():
            self.mount(mount)
        (self.at(MOUNTS["data"]) / "lost+found").mkdir(mode=0o700)

    def at(self, path: str) -> Path:
        return self.folder / path.lstrip("/")

    def mount(self, path: str) -> None:
        """A new, empty volume."""
        self.at(path).mkdir(parents=True)
        if os.geteuid() == 0:
            os.chown(self.at(path), 65534, -1)
        self.at(path).chmod(0o2777)

    def _moved(self, word: str) -> str:
        inside = any(word == mount or word.startswith(f"{mount}/") for mount in MOUNTS.values())
        return str(self.at(word)) if inside else word

    def start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
        program, *words = [*json.loads(entrypoint), *CONTAINER["args"]]
        assert program == "ema-service"
        words[words.index("--port") + 1] = str(self.port)
        for name in [name for name in os.environ if name.startswith("EMA_")]:
            monkeypatch.delenv(name)
        for variable in CONTAINER["env"]:
            monkeypatch.setenv(variable["name"], self._moved(variable["value"]))
        log = self.folder / "log"
        log.write_bytes(b"")
        self.process = Forked(["-m", "ema_service", *map(self._moved, words)], log)
        ended = self.process.poll
        wait_until(lambda: ended() is not None or self.probe("startupProbe"), "the startup probe")
        assert ended() is None, log.read_text()

    def probe(self, name: str) -> bool:
        """Whether the kubelet would find the container well: it asks by the pod's address, without a token."""
        path = CONTAINER[name]["httpGet"]["path"]
        try:
            return httpx.get(f"{self.url}{path}", timeout=CONTAINER[name].get("timeoutSeconds", 1)).is_success
        except httpx.TransportError:
            return False

    def end(self) -> int:
        """SIGTERM, and the exit status within the pod's grace period."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(POD["terminationGracePeriodSeconds"])


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Pod(tmp_path, port)
    yield made
    if made.process and made.process.poll() is None:
        made.process.kill()
        made.process.wait(30)


def test_pod_lives_ends_and_comes_back(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest's command answers its probes and keeps versions in the memory volume; killed it loses nothing.

    Ended by SIGTERM, and made anew on the same claim with an empty memory volume, it has every run.
    """
    token = create_token(pod.at(f"{MOUNTS['tokens']}/tokens"), ["train"], "*")
    weights = {"w": torch.arange(6.0)}
    moved = {"w": torch.full((6,), 3.0)}

    def steps() -> tuple[int | None, int | None, str | None]:
        with EmaClient(pod.url, token=token) as client:
            found = client.run("r")
            return found.step, found.durable_step, found.versions_in

    pod.start(monkeypatch)
    assert [pod.probe(name) for name in ("startupProbe", "livenessProbe", "readinessProbe")] == [True] * 3
    assert httpx.get(f"{pod.url}/v1/runs").status_code == 401
    with EmaClient(pod.url, token=token) as client:
        client.create_run("r", weights, decay=0.5)
        client.push("r", moved, step=1)
        kept = client.pull("r")["w"].clone()
    step, durable, where = steps()
    assert (step, durable) == (1, 1)
    assert where == "memory files", (pod.folder / "log").read_text()
    assert [path for path in pod.at(MOUNTS["ram"]).rglob("*") if path.is_file()]

    assert pod.process
    pod.process.kill()
    pod.process.wait(30)
    pod.start(monkeypatch)
    assert steps()[:2] == (1, 1)
    assert pod.end() == 0

    for path in sorted(pod.at(MOUNTS["ram"]).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    pod.start(monkeypatch)
    with EmaClient(pod.url, token=token) as client:
        assert torch.equal(client.pull("r")["w"], kept)
        assert client.push("r", moved, step=2).step == 2
    assert pod.end() == 0
