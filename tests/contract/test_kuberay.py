"""docker/kuberay/ is true without a cluster: its fields, its names, and its command on a Ray of such nodes.

Knows Kubernetes' own schemas, and of KubeRay's the fields in use. Does not know a cluster, or the KubeRay operator.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

import ema_service.cluster_cli
from ema_client import EmaClient, __version__
from ema_service.sizes import parse_size
from ema_service.tokens import create_token
from tests.contract.pods import DOCKERFILE, objects_in

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kuberay"
README = (ROOT / "docker" / "README.md").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
MANIFESTS = {path.name: objects_in(path) for path in sorted(FOLDER.glob("*.yaml"))}
KINDS = {each["kind"]: each for objects in MANIFESTS.values() for each in objects}
RAY, JOB, SERVICE = KINDS["RayCluster"]["spec"], KINDS["RayJob"]["spec"], KINDS["Service"]["spec"]
(HOSTS,) = RAY["workerGroupSpecs"]
TEMPLATES = {"head": RAY["headGroupSpec"]["template"], "hosts": HOSTS["template"]}
CONTAINERS = {name: each["spec"]["containers"][0] for name, each in TEMPLATES.items()}
WORDS = shlex.split(JOB["entrypoint"])

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}


def _fields(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": fields}


#: The fields in use of ray.io/v1, as KubeRay's definitions of its kinds have them.
_SCHEMAS = {
    "RayCluster": _fields(
        ["headGroupSpec"],
        rayVersion={"type": "string"},
        headGroupSpec=_fields(["template"], rayStartParams=_STRINGS, template={"type": "object"}),
        workerGroupSpecs={
            "type": "array",
            "items": _fields(
                ["groupName", "maxReplicas", "minReplicas", "template"],
                groupName={"type": "string"},
                replicas=_COUNT,
                minReplicas=_COUNT,
                maxReplicas=_COUNT,
                rayStartParams=_STRINGS,
                template={"type": "object"},
            ),
        },
    ),
    "RayJob": _fields(
        [],
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        clusterSelector=_STRINGS,
        shutdownAfterJobFinishes={"type": "boolean"},
        entrypoint={"type": "string"},
    ),
}


def after(flag: str) -> str:
    """The word behind a flag of the job's command."""
    return WORDS[WORDS.index(flag) + 1]


def mounts(name: str) -> dict[str, dict[str, Any]]:
    """Where a container has what: path -> volume."""
    volumes = {each["name"]: each for each in TEMPLATES[name]["spec"]["volumes"]}
    found = {each["mountPath"]: volumes.pop(each["name"]) for each in CONTAINERS[name]["volumeMounts"]}
    assert not volumes
    return found


@pytest.mark.parametrize("kind", _SCHEMAS)
def test_kinds_of_kuberay(kind: str) -> None:
    """No field that KubeRay does not know, or knows as something else."""
    assert KINDS[kind]["apiVersion"] == "ray.io/v1"
    jsonschema.validate(KINDS[kind]["spec"], _SCHEMAS[kind])


def test_kinds_of_kubernetes() -> None:
    """Pods, Service and claim are such as an old version of Kubernetes and the newest take."""
    schemas = pytest.importorskip("kubernetes_validate", reason="not installed: pip install -e '.[test]'")
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {**each["metadata"], "name": name}, "spec": each["spec"]}
        for name, each in TEMPLATES.items()
    ]
    for version in ("1.29", schemas.latest_version()):
        for each in (*pods, KINDS["Service"], KINDS["PersistentVolumeClaim"]):
            schemas.validate(each, version, strict=True)


def test_all_of_it_is_applied() -> None:
    """Each file, with this version's image, of the Ray that this project was tried with."""
    kustomization = KINDS["Kustomization"]
    (image,) = kustomization["images"]
    assert set(kustomization["resources"]) == set(MANIFESTS) - {"kustomization.yaml"}
    assert {each["image"] for each in CONTAINERS.values()} == {f"{image['name']}:{image['newTag']}"}
    assert (image["newTag"], image["name"].partition("/")[0]) == (__version__, "registry.invalid")
    assert f"ray=={RAY['rayVersion']}" in CONSTRAINTS
    assert f'PACKAGES=ray[default]" -t YOUR-REGISTRY/{image["name"].partition("/")[2]}:{__version__}' in README
    assert 'ARG PACKAGES=""' in DOCKERFILE


def test_numbers_and_names_agree() -> None:
    """A host for each pod of the group, which takes what only these have; the job, the Service and the probes name what
    is there."""
    assert HOSTS["replicas"] == HOSTS["minReplicas"] == HOSTS["maxReplicas"] == int(after("--shards"))
    has = json.loads(json.loads(HOSTS["rayStartParams"]["resources"]))
    assert [f"{name}={number:g}" for name, number in has.items()] == [after("--resource")]
    assert JOB["clusterSelector"] == {"ray.io/cluster": KINDS["RayCluster"]["metadata"]["name"]}
    assert SERVICE["selector"] == {**JOB["clusterSelector"], "ray.io/group": HOSTS["groupName"]}
    (port,), (served,) = CONTAINERS["hosts"]["ports"], SERVICE["ports"]
    assert served["port"] == served["targetPort"] == port["containerPort"] == int(after("--port"))
    (apart,) = TEMPLATES["hosts"]["spec"]["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert apart["labelSelector"]["matchLabels"] == TEMPLATES["hosts"]["metadata"]["labels"]
    assert f"rayjob/{KINDS['RayJob']['metadata']['name']} " in README
    assert f"kubectl delete rayjob {KINDS['RayJob']['metadata']['name']}`" in README


def test_what_the_command_names_is_mounted() -> None:
    """The data on the claim, which every pod has; the tokens from the Secret that the README makes; memory within the
    pod's."""
    at = mounts("hosts")
    assert (
        at["/" + after("--dir").split("/")[1]]["persistentVolumeClaim"]["claimName"]
        == (KINDS["PersistentVolumeClaim"]["metadata"]["name"])
    )
    assert KINDS["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    tokens = Path(after("--token-file"))
    secret = at[str(tokens.parent)]["secret"]["secretName"]
    assert f"create secret generic {secret} --from-file={tokens.name}\n" in README
    (ram,) = CONTAINERS["hosts"]["env"]
    ram_dir = Path(ram["value"])
    assert ram["name"] == "EMA_SERVICE_RAM_DIR"
    room = parse_size(at[str(ram_dir.parent)]["emptyDir"]["sizeLimit"] + "B")
    limit = parse_size(CONTAINERS["hosts"]["resources"]["limits"]["memory"] + "B")
    assert room < parse_size(after("--memory-limit")) < limit


def test_pods_are_what_the_image_expects() -> None:
    """Its user, a root that is not written to, and no probe that calls what the image has not."""
    for name, each in TEMPLATES.items():
        security, container = each["spec"]["securityContext"], CONTAINERS[name]
        assert {security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {10001}
        assert "USER 10001\n" in DOCKERFILE
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"/tmp", "/data"} <= set(mounts(name))  # Ray's logs, and the user's home
        assert all("httpGet" in container[probe] for probe in ("livenessProbe", "readinessProbe"))


def test_the_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its flags are there, and mean a cluster that Ray may move."""
    asked: list[Any] = []

    def up(address: str, name: str, task: Any, takes: dict[str, Any], **more: Any) -> None:
        asked.append((address, name, task.of, task.folder, task.port, takes, more))

    monkeypatch.setattr(ema_service.cluster_cli, "_up_on_ray", up)
    assert WORDS[:2] == ["ema-service", "cluster"]
    done = CliRunner().invoke(ema_service.cluster_cli.cluster, WORDS[2:])
    assert done.exit_code == 0, done.output
    takes = {"num_cpus": 0.0, "num_gpus": 0.0, "resources": {"ema_host": 1.0}}
    more = {"shared": True, "replicas": 0}
    assert asked == [("auto", "ema", HOSTS["replicas"], Path("/shared/ema"), 8470, takes, more)]


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_the_command_on_such_nodes(tmp_path: Path) -> None:
    """A host on each node of the group, none on the head; a program finds them by name, or by a gateway's address."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray>=2.50'")
    from ray.cluster_utils import Cluster

    from ema_client.protocol import RAY_NAMESPACE, ray_host

    token = create_token(tmp_path / "tokens", ["train"], "*")
    here = {"auto": "", "/shared/ema": str(tmp_path / "data"), after("--token-file"): str(tmp_path / "tokens")}
    here |= {after("--port"): "0", after("--memory-limit"): "1GiB"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = int(HOSTS["rayStartParams"]["object-store-memory"])
        head = {"num_cpus": int(RAY["headGroupSpec"]["rayStartParams"]["num-cpus"]), "object_store_memory": memory}
        ray_cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            resources = json.loads(json.loads(HOSTS["rayStartParams"]["resources"]))
            for _ in range(HOSTS["replicas"]):
                ray_cluster.add_node(num_cpus=1, resources=resources, object_store_memory=memory)
            words = [here.get(word, word) or ray_cluster.address for word in WORDS[1:]]
            command = [sys.executable, "-m", "ema_service", *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
            assert done.returncode == 0, done.stderr
            ray.init(ray_cluster.address, namespace=RAY_NAMESPACE, log_to_driver=False)
            actors = [ray.get_actor(ray_host("ema", place), RAY_NAMESPACE) for place in range(HOSTS["replicas"])]
            assert len(set(ray.get([actor.node.remote() for actor in actors]))) == HOSTS["replicas"]
            with EmaClient("ray://ema", token=token) as client:
                client.create_run("r", {"w": torch.zeros(8, 2)})
                assert client.push("r", {"w": torch.ones(8, 2)}, step=1).applied
        finally:
            down = [sys.executable, "-m", "ema_service", "cluster", "down", "--ray", ray_cluster.address]
            subprocess.run(down, capture_output=True, timeout=100, check=False)
            ray.shutdown()
            ray_cluster.shutdown()
