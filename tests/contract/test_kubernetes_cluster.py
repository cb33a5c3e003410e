"""docker/kubernetes-cluster/ is true without a cluster: its names, its components, and its programs started as their
pods would be.

Knows what of a manifest a container gets (pods.py). Does not know schemas (test_kubernetes.py), or who schedules,
mounts and kills.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from ema_client import EmaClient, __version__
from ema_client.errors import EmaError
from ema_client.protocol import RunShards
from ema_service.sizes import parse_size
from tests.contract.pods import DOCKERFILE, Manifests, Pods, objects_in, with_component
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes-cluster"
README = (ROOT / "docker" / "README.md").read_text()
MANIFESTS = {path.name: objects_in(path) for path in sorted(FOLDER.glob("*.yaml"))}
OBJECTS = [each for name, docs in MANIFESTS.items() for each in docs if name != "kustomization.yaml"]
#: The folder of each component.
COMPONENTS = {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/kustomization.yaml"))}

PLAIN = Manifests(OBJECTS)
WITH = {name: Manifests(with_component(OBJECTS, folder)) for name, folder in COMPONENTS.items()}
WORKLOADS, PODS, CONTAINERS = PLAIN.workloads, PLAIN.pods, PLAIN.containers
named, environment = PLAIN.named, PLAIN.environment
HOSTS = WORKLOADS["ema-host"]["spec"]
PLACES = PLAIN.places("ema-host")


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
    ports = {name: CONTAINERS[name]["ports"][0]["containerPort"] for name in CONTAINERS}
    coordinator = ("ema-coordinator", ports["ema-coordinator"])
    assert PLAIN.lets_out("ema-host") == {coordinator}
    assert PLAIN.lets_out("ema-gateway") == {coordinator, ("ema-host", ports["ema-host"])}
    assert PLAIN.lets_out("ema-coordinator") == set()
    assert PLAIN.lets_in("ema-coordinator") == {"ema-host", "ema-gateway"}
    assert PLAIN.lets_in("ema-host") == {None}


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


# --- components ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_are_as_kubectl_makes_them(name: str, tmp_path: Path) -> None:
    """What these tests take for the manifests with a component is what is applied."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: https://kubernetes.io/docs/tasks/tools")
    folder = shutil.copytree(FOLDER, tmp_path / "cluster")
    kustomization = folder / "kustomization.yaml"
    text = kustomization.read_text()
    assert f"\n#   - {name}\n" in text
    kustomization.write_text(f"{text}components:\n  - {name}\n")
    built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr

    def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
        """Objects with the label that the kustomization gives to all."""
        labels = {"app.kubernetes.io/part-of": "ema"}
        return {
            (each["kind"], each["metadata"]["name"]): {
                **each,
                "metadata": {**each["metadata"], "labels": {**each["metadata"].get("labels", {}), **labels}},
            }
            for each in objects
            if each["kind"] != "PodMonitor"
        }

    assert by_name(list(yaml.safe_load_all(built.stdout))) == by_name(WITH[name].objects)


def test_the_component_of_tls() -> None:
    """With it every address is https, every probe asks so, and each program is given what the Secret has."""
    secured = WITH["tls"]
    for name, container in secured.containers.items():
        plain = {variable: value.replace("http://", "https://") for variable, value in environment(name).items()}
        added = {variable: value for variable, value in secured.environment(name).items() if variable not in plain}
        assert secured.environment(name) == {**plain, **added}
        volumes = [each for each in secured.pods[name]["volumes"] if each not in PODS[name]["volumes"]]
        mounts = [each for each in container["volumeMounts"] if each not in CONTAINERS[name]["volumeMounts"]]
        (volume,), (mount,) = volumes, mounts
        assert volume["name"] == mount["name"]
        wanted = {"EMA_SERVICE_SSL_CERTFILE": "tls.crt", "EMA_SERVICE_SSL_KEYFILE": "tls.key"}
        wanted |= {} if name == "ema-coordinator" else {"SSL_CERT_FILE": "ca.crt"}
        assert added == {variable: f"{mount['mountPath']}/{file}" for variable, file in wanted.items()}
        for probe in (key for key in container if key.endswith("Probe")):
            asked = CONTAINERS[name][probe]
            assert container[probe] == {**asked, "httpGet": {**asked["httpGet"], "scheme": "HTTPS"}}
        secret = volume["secret"]["secretName"]
        assert f"create secret generic {secret} --from-file=tls.crt --from-file=tls.key --from-file=ca.crt\n" in README


def test_the_component_of_twins() -> None:
    """An even number of hosts, each told so and on a node of its own; one may go, and is filled by its twin."""
    twins = WITH["twins"]
    places = twins.places("ema-host")
    assert len(places) % 2 == 0
    assert len(places) >= 4
    for place in places:
        plain, found = environment("ema-host", place), twins.environment("ema-host", place)
        assert found == {**plain, "EMA_SERVICE_SHARD": f"{place}/{len(places)}", "EMA_SERVICE_TWINS": "1"}
    (apart,) = twins.pods["ema-host"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart["topologyKey"] == "kubernetes.io/hostname"
    assert apart["labelSelector"]["matchLabels"] == HOSTS["template"]["metadata"]["labels"]
    port = CONTAINERS["ema-host"]["ports"][0]["containerPort"]
    assert twins.lets_out("ema-host") == PLAIN.lets_out("ema-host") | {("ema-host", port)}
    assert twins.named("PodDisruptionBudget")["ema-host"]["spec"]["maxUnavailable"] == 1


def test_the_component_of_replicas() -> None:
    """One for each host, found by a stable name, and let through wherever replicas talk and are read."""
    found = WITH["replicas"]
    spec, container = found.workloads["ema-replica"]["spec"], found.containers["ema-replica"]
    port, service = container["ports"][0], found.named("Service")["ema-replica"]["spec"]
    assert found.places("ema-replica") == PLACES
    for place in PLACES:
        seen = found.environment("ema-replica", place)
        assert seen["EMA_SERVICE_REPLICA_OF"] == f"{place}/{len(PLACES)}"
        address = f"http://ema-replica-{place}.{spec['serviceName']}:{port['containerPort']}"
        assert seen["EMA_SERVICE_CLUSTER_ADDRESS"] == address
        assert seen["EMA_SERVICE_COORDINATOR"] == environment("ema-host")["EMA_SERVICE_COORDINATOR"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == service["selector"]
    assert service["clusterIP"] == "None"
    (monitor,) = objects_in(ROOT / "docker" / "kubernetes-cluster" / "replicas" / "pod-monitor.yaml")
    hosts = named("PodMonitor")["ema-host"]["spec"]
    assert monitor["spec"] == {**hosts, "selector": {"matchLabels": service["selector"]}}
    at = port["containerPort"]
    assert found.lets_out("ema-replica") == PLAIN.lets_out("ema-host") | {("ema-host", at)}
    assert found.lets_out("ema-gateway") == PLAIN.lets_out("ema-gateway") | {("ema-replica", at)}
    assert found.lets_in("ema-coordinator") == PLAIN.lets_in("ema-coordinator") | {"ema-replica"}
    assert found.lets_in("ema-replica") == PLAIN.lets_in("ema-host")
    same = ("runAsUser", "runAsGroup", "runAsNonRoot")
    plain = PODS["ema-host"]["securityContext"]
    assert [found.pods["ema-replica"]["securityContext"][key] for key in same] == [plain[key] for key in same]
    assert container["securityContext"] == CONTAINERS["ema-host"]["securityContext"]
    assert container["image"] == CONTAINERS["ema-host"]["image"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    secrets = {
        each["name"]: each["secret"]["secretName"] for each in found.pods["ema-replica"]["volumes"] if "secret" in each
    }
    assert set(mounts) == {each["name"] for each in found.pods["ema-replica"]["volumes"]}
    file = Path(seen["EMA_SERVICE_REPLICA_TOKEN_FILE"])
    (volume,) = (name for name, path in mounts.items() if path == str(file.parent))
    assert f"create secret generic {secrets[volume]} --from-file={file.name}\n" in README


# --- the programs, as their pods would run them -----------------------------------------------------------------------


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Manifests], Pods]]:
    """Makes the pods of manifests, which end with the test."""
    made: list[Pods] = []

    def make(manifests: Manifests) -> Pods:
        made.append(Pods(manifests, tmp_path, monkeypatch))
        return made[-1]

    yield make
    for each in made:
        each.end()


def test_pods_form_a_cluster(pods: Callable[[Manifests], Pods]) -> None:
    """Whoever comes first is live and waits: hosts without a coordinator are not ready, and are not killed for it. With
    all of them there trainers are served, and with a token alone."""
    started = pods(PLAIN)
    hosts = started.start_all("ema-host")
    gateway = started.start("ema-gateway")
    assert not any(started.ready([url], "ema-host") for url in hosts)
    assert started.ready([gateway], "ema-gateway")
    assert httpx.get(f"{gateway}/readyz").status_code == 503

    coordinator = started.start("ema-coordinator")
    assert started.ready([coordinator], "ema-coordinator")
    wait_until(lambda: started.ready(hosts, "ema-host"), "hosts that are ready")
    wait_until(lambda: httpx.get(f"{gateway}/readyz").status_code == 200, "all of the cluster")
    assert httpx.get(f"{gateway}/v1/runs").status_code == 401
    with EmaClient(gateway, token=started.token) as client:
        client.create_run("r", {"w": torch.arange(60.0).reshape(20, 3)}, decay=0.5)
        assert client.push("r", {"w": torch.ones(20, 3)}, step=1).applied
        assert client.pull("r").info.step == 1
        assert client.run("r").versions_in == "memory files"
    for url in (*hosts, gateway, coordinator):
        wanted = 401 if url in hosts else 200
        assert httpx.get(f"{url}/metrics").status_code == wanted


@pytest.mark.soak
@pytest.mark.parametrize("component", ["twins", "replicas"])
def test_pods_of_a_component_form_a_cluster(component: str, pods: Callable[[Manifests], Pods]) -> None:
    """All of them are ready; twins do without a host, and replicas are listed for their hosts."""
    started = pods(WITH[component])
    started.start("ema-coordinator")
    hosts, gateway = started.start_all("ema-host"), started.start("ema-gateway")
    wait_until(lambda: started.ready(hosts, "ema-host"), "hosts that are ready")
    wait_until(lambda: httpx.get(f"{gateway}/readyz").status_code == 200, "all of the cluster")
    with EmaClient(gateway, token=started.token) as client:
        client.create_run("r", {"w": torch.arange(60.0).reshape(20, 3)}, decay=0.5)
        if component == "twins":
            started.kill("ema-host", 0)
            wait_until(lambda: _applied(client), "an update without host 0")
            return
        replicas = started.start_all("ema-replica")
        wait_until(lambda: started.ready(replicas, "ema-replica"), "replicas that are ready")

        def listed() -> list[str]:
            shards = client._transport.json("GET", "/v1/runs/r/shards").parsed(RunShards).shards
            return [address for shard in shards for address in shard.replicas]

        wait_until(lambda: listed() == replicas, "replicas in the map")


def _applied(client: EmaClient) -> bool:
    try:
        return client.push("r", {"w": torch.ones(20, 3)}, step=1).step == 1
    except EmaError:
        return False
