"""The commands ``ema-service cluster ...``: a coordinator, a gateway, one host, or all of a cluster at once.

Knows flags, their environment variables, and what is printed. Does not know how the programs work: each command imports
its program only when called.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ema_client.protocol import DEFAULT_PORT
from ema_service.addresses import announced, is_loopback
from ema_service.logs import LogFormat, configure
from ema_service.sizes import parse_size

if TYPE_CHECKING:
    from ema_service.cluster import ClusterToken
    from ema_service.cluster.launching.agent import Task
    from ema_service.tls import Certificate

__all__ = ["cluster"]

cluster = typer.Typer(help="One run on several hosts.", no_args_is_help=True)

#: Of a coordinator, where nobody says another.
COORDINATOR_PORT = 8469
#: No option of the command that reaches a machine.
_MACHINE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*")


def _name(text: str) -> str:
    """A cluster's name, which stands in names of actors and in URLs."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text):
        raise typer.BadParameter(f"{text!r} is no name such as ema, or ema-2")
    return text


TokenFile = Annotated[
    Path,
    typer.Option(
        "--cluster-token-file",
        help="The secret that all of the cluster share, on one line.",
        envvar="EMA_SERVICE_CLUSTER_TOKEN_FILE",
        dir_okay=False,
    ),
]
Coordinators = Annotated[
    list[str],
    typer.Option(
        "--coordinator",
        help="http(s)://HOST:PORT, or file:///PATH of a file with it; may be repeated.",
        envvar="EMA_SERVICE_COORDINATOR",
    ),
]
OnRay = Annotated[
    str | None,
    typer.Option("--ray", help="Address of a Ray cluster; auto: of this machine's, or job's.", metavar="ADDRESS"),
]
Name = Annotated[str, typer.Option(help="With --ray: of the cluster, by which trainers find it.", callback=_name)]
CertFile = Annotated[
    Path | None,
    typer.Option(
        help="Speak TLS: the certificate, then those between it and its authority; PEM.",
        envvar="EMA_SERVICE_SSL_CERTFILE",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="Key of the certificate, not encrypted; PEM.", envvar="EMA_SERVICE_SSL_KEYFILE"),
]
Shape = Annotated[LogFormat, typer.Option("--log-format", help="Log lines for people, or a JSON object each.")]


@cluster.command()
def coordinator(
    token_file: TokenFile,
    host: Annotated[str, typer.Option(help="Address to listen on, for the hosts and gateways.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = COORDINATOR_PORT,
    ssl_certfile: CertFile = None,
    ssl_keyfile: KeyFile = None,
    log_format: Shape = "text",
) -> None:
    """Decide which writes count on all hosts. Keeps nothing: start it again wherever its hosts find it.

    Ends with status 0 where another coordinator has taken over: restart it on failure alone.
    """
    configure(log_format)
    token = _token(token_file)
    tls = _certificate(ssl_certfile, ssl_keyfile)
    from ema_service.cluster.coordinator import serve
    from ema_service.cluster.serving import listening_socket

    try:
        sock = listening_socket(host, port)
    except OSError as fault:
        _refuse(f"cannot listen on {host} port {port}: {fault.strerror}; choose another --host or --port")
    url = announced(host, sock.getsockname()[1], secure=tls is not None)
    typer.echo(f"ema-service {version('ema-service')}, coordinator, listens on {url}")
    serve(token, sock, tls)


@cluster.command()
def gateway(
    coordinator: Coordinators,
    token_file: TokenFile,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = DEFAULT_PORT,
    ssl_certfile: CertFile = None,
    ssl_keyfile: KeyFile = None,
    log_format: Shape = "text",
    insecure_no_auth: Annotated[
        bool,
        typer.Option(
            "--insecure-no-auth",
            help="Listen beyond loopback although the hosts ask for no tokens, and anyone may then read and write.",
        ),
    ] = False,
) -> None:
    """Be a server of whole runs to curl, to readers and to trainers. Keeps nothing; start as many as are wanted."""
    configure(log_format)
    token = _token(token_file)
    tls = _certificate(ssl_certfile, ssl_keyfile)
    from ema_service import dashboard
    from ema_service.cluster.gateway.hosts import Hosts
    from ema_service.cluster.gateway.serving import serve
    from ema_service.cluster.serving import listening_socket

    try:
        sock = listening_socket(host, port)
    except OSError as fault:
        _refuse(f"cannot listen on {host} port {port}: {fault.strerror}; choose another --host or --port")
    url = announced(host, sock.getsockname()[1], secure=tls is not None)
    hosts = Hosts(coordinator, token, guarded=not (insecure_no_auth or is_loopback(host)))
    said = f"ema-service {version('ema-service')}, gateway, listens on {url}"
    serve(hosts, sock, lambda: typer.echo(said), dashboard.install_at_gateway, tls)


@cluster.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def host(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(help="Where its shards are kept.", file_okay=False)],
) -> None:
    """Be one host of a cluster for as long as standard input is open: `ema-service serve` with the flags behind --. The
    first line of standard input is the cluster's token. What `up` runs on each machine."""
    from ema_service.cluster.launching.launcher import host_command
    from ema_service.cluster.token import ClusterToken

    try:
        command = host_command(data_dir, ClusterToken(_first_line()), context.args)
    except (OSError, ValueError) as fault:
        _refuse(str(fault))
    os.execv(command[0], command)


@cluster.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    context: typer.Context,
    local: Annotated[int | None, typer.Option(help="So many hosts on this machine.", min=1)] = None,
    hosts: Annotated[
        str | None, typer.Option(help="A host on each of these machines: a,b,c.", metavar="MACHINES")
    ] = None,
    twins: Annotated[
        bool,
        typer.Option(
            "--twins",
            help="Two hosts for each shard, so that nothing is lost with any one of them: twice --local or --shards; "
            "of --hosts the later half.",
        ),
    ] = False,
    folder: Annotated[
        Path, typer.Option("--dir", help="Of data and token, here and on each machine.", file_okay=False)
    ] = Path("ema-cluster"),
    host: Annotated[
        str | None,
        typer.Option(help="Address of the gateway to listen on; with --ray, of all.  [default: 127.0.0.1; 0.0.0.0]"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help=f"Port of the gateway; 0 picks a free one.  [default: {DEFAULT_PORT}; with --ray 0]", min=0),
    ] = None,
    through: Annotated[
        str | None, typer.Option(help="Command before a machine's name.  [default: ssh]", show_default=False)
    ] = None,
    announce: Annotated[
        str | None, typer.Option(help="Name by which the machines reach this one.  [default: found out]")
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(
            help="So many replicas of each host, or with --twins of each shard, which are read in its place; of "
            "--hosts on the machines of the next.",
            min=0,
        ),
    ] = 0,
    replica_token_file: Annotated[
        Path | None,
        typer.Option(
            help="A token that the replicas read with, on one line, where hosts ask for one; a file of each machine.",
            dir_okay=False,
        ),
    ] = None,
    ssl_certfile: CertFile = None,
    ssl_keyfile: KeyFile = None,
    ray: OnRay = None,
    shards: Annotated[
        int | None, typer.Option(help="With --ray: so many hosts; with --twins twice as many.", min=1)
    ] = None,
    name: Name = "ema",
    num_cpus: Annotated[
        float, typer.Option(help="With --ray: CPUs that each host takes, and each replica.", min=0)
    ] = 1.0,
    num_gpus: Annotated[float, typer.Option(help="With --ray: GPUs that each host takes.", min=0)] = 0.0,
    memory: Annotated[
        str | None, typer.Option(help="With --ray: memory that each host takes, as in 64GiB.", metavar="SIZE")
    ] = None,
    resource: Annotated[
        list[str] | None, typer.Option(help="With --ray: what else each host takes.", metavar="NAME=N")
    ] = None,
    shared_dir: Annotated[
        bool,
        typer.Option("--shared-dir", help="With --ray: every node reaches --dir, so hosts may move to another node."),
    ] = False,
) -> None:
    """Start a coordinator, hosts and a gateway, and keep them running until Ctrl-C or SIGTERM. Flags behind -- are
    those of `ema-service serve` for each host.

    With --ray they are actors of a Ray cluster, with a gateway beside each host, and go on until `cluster down`; --dir
    is a folder of each node.

    With --ssl-certfile and --ssl-keyfile, files of each machine, all speak TLS; SSL_CERT_FILE names the certificate of
    the authority, also of each machine, where no machine knows it.

    A second `up` of the same folder, or name, says that it runs already, or starts what is missing.
    """
    from ema_service.cluster.launching.launcher import THROUGH, LaunchFailed, Plan, RunsAlready, Tls, launch

    if [local, hosts, ray].count(None) != 2 or (ray is None) != (shards is None):
        raise typer.BadParameter(
            "say how many hosts here (--local 3), on which machines (--hosts a,b,c), or how many in a Ray cluster "
            "(--ray auto --shards 3)"
        )
    found = _together(ssl_certfile, ssl_keyfile)
    tls = Tls(*found, os.environ.get("SSL_CERT_FILE")) if found else None
    if ray is not None:
        takes = _takes(num_cpus, num_gpus, memory, resource or [])
        of = len(_with_twins([None] * (shards or 1), given=False)) if twins else shards or 1
        task = _task(of, folder, host or "0.0.0.0", port or 0, context.args)
        task = replace(task, tls=tls, twins=twins, replica_token=replica_token_file and replica_token_file.absolute())
        _up_on_ray(ray, name, task, takes, shared=shared_dir, replicas=replicas)
        return
    named = [None] * (local or 0) if hosts is None else [name.strip() for name in hosts.split(",")]
    machines: list[str | None] = [*named]
    if not all(machine is None or _MACHINE.fullmatch(machine) for machine in machines):
        raise typer.BadParameter(f"{hosts!r} is no list of machines such as a,b,c", param_hint="--hosts")
    machines = _with_twins(machines, given=hosts is not None) if twins else machines
    where = host or "127.0.0.1", DEFAULT_PORT if port is None else port
    plan = Plan(
        folder,
        machines,
        *where,
        through or THROUGH,
        context.args,
        twins=twins,
        name=announce,
        replicas=replicas,
        replica_token=replica_token_file,
        tls=tls,
    )

    def ready(url: str) -> None:
        typer.echo(f"ema-service {version('ema-service')}, cluster of {_many(len(machines))}, listens on {url}")

    try:
        launch(plan, ready, lambda line: typer.echo(line, err=True))
    except RunsAlready as there:
        typer.echo(f"ema-service: {there}")
    except (LaunchFailed, OSError, ValueError) as fault:
        _refuse(str(fault))


@cluster.command()
def down(ray: OnRay = "auto", name: Name = "ema") -> None:
    """End a cluster that `up --ray` has started: its hosts finish what they have. What they keep stays."""
    from ema_service.cluster.launching.launcher import LaunchFailed

    launcher = _ray_launcher()
    try:
        with launcher.on_ray(ray or "auto"):
            if not launcher.down(name, lambda line: typer.echo(line, err=True)):
                _refuse(f"there is no cluster {name!r} on this Ray")
    except LaunchFailed as fault:
        _refuse(str(fault))


def _with_twins(machines: list[str | None], *, given: bool) -> list[str | None]:
    """Where each host is to be, with a twin each. given: the machines are those of twins, too. Exits where they are too
    few."""
    found = machines if given else 2 * machines
    if len(found) % 2 or len(found) < 4:
        raise typer.BadParameter(
            "two or more shards are needed, and two hosts for each: of one shard alone no third host would know which "
            "of the two was left behind",
            param_hint="--twins",
        )
    return found


def _task(shards: int, folder: Path, listen: str, port: int, flags: list[str]) -> Task:
    """What is to run at each place of a Ray cluster. Exits where anyone could write every run."""
    from ema_service.cluster.launching.agent import Task

    if not is_loopback(listen) and not {"--token-file", "--insecure-no-auth"} & {each.split("=")[0] for each in flags}:
        _refuse(
            f"hosts on {listen} can be reached by others: give `-- --token-file FILE` (of each node), say "
            "`-- --insecure-no-auth`, or, to try all on one machine, --host 127.0.0.1"
        )
    return Task(None, shards, folder.absolute(), "", listen, port, tuple(flags))


def _up_on_ray(address: str, name: str, task: Task, takes: dict[str, Any], *, shared: bool, replicas: int) -> None:
    """Start a cluster of Ray's actors, and say where it is."""
    from ema_service.cluster.launching.launcher import LaunchFailed

    launcher = _ray_launcher()
    try:
        with launcher.on_ray(address):
            plan = launcher.RayPlan(name, task, shared, takes, replicas)
            url = launcher.up(plan, lambda line: typer.echo(line, err=True))
    except LaunchFailed as fault:
        _refuse(str(fault))
    typer.echo(f"ema-service {version('ema-service')}, cluster of {_many(task.of)}, listens on {url}")
    typer.echo(f"  trainers of this Ray cluster: EMA_SERVICE_URL=ray://{name}")


def _ray_launcher() -> ModuleType:
    """The module that uses Ray, or an end that says how to install Ray."""
    try:
        from ema_service.cluster.launching import ray_launcher
    except ModuleNotFoundError as fault:
        if fault.name != "ray":
            raise
        _refuse("ray is not installed: pip install 'ray>=2.50'")
    return ray_launcher


def _takes(num_cpus: float, num_gpus: float, memory: str | None, resources: list[str]) -> dict[str, Any]:
    """What each host's actor takes, as Ray has it. Exits where a flag says nothing that can be used."""
    found = {name: number for name, _, number in (each.partition("=") for each in resources)}
    if bad := [name for name, number in found.items() if not name or not re.fullmatch(r"\d+(\.\d+)?", number)]:
        raise typer.BadParameter(f"{bad[0]!r} is none such as ema_host=1", param_hint="--resource")
    takes: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if memory is not None:
        try:
            takes["memory"] = parse_size(memory)
        except ValueError as fault:
            raise typer.BadParameter(str(fault), param_hint="--memory") from None
    return {**takes, "resources": {name: float(number) for name, number in found.items()}}


def _many(hosts: int) -> str:
    return f"{hosts} host{'s' if hosts > 1 else ''}"


def _first_line() -> str:
    """The first line of standard input, and not a byte more: the rest is for whoever watches for its end."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line.decode("ascii", errors="replace").strip()


def _together(certfile: Path | None, keyfile: Path | None) -> tuple[Path, Path] | None:
    """Both, or neither. Exits where one of the two is missing."""
    if (certfile is None) != (keyfile is None):
        raise typer.BadParameter("a certificate and its key come together", param_hint="--ssl-certfile, --ssl-keyfile")
    return (certfile, keyfile) if certfile and keyfile else None


def _certificate(certfile: Path | None, keyfile: Path | None) -> Certificate | None:
    """The certificate of a program that speaks TLS; an end with what is wrong with its files."""
    found = _together(certfile, keyfile)
    if found is None:
        return None
    from ema_service.tls import Certificate, CertificateUnusable

    try:
        return Certificate(*found)
    except CertificateUnusable as fault:
        _refuse(str(fault))


def _token(path: Path) -> ClusterToken:
    """The cluster's token, or an end with what is wrong with the file."""
    from ema_service.cluster.token import read_cluster_token

    try:
        return read_cluster_token(path)
    except (OSError, ValueError) as fault:
        _refuse(str(fault))


def _refuse(fault: str) -> NoReturn:
    typer.echo(f"ema-service: {fault}", err=True)
    raise typer.Exit(1)
