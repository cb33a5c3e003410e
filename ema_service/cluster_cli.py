"""The commands ``ema-service cluster ...``: a coordinator, a gateway, one host, or all of a cluster at once.

Knows flags, their environment variables, and what is printed. Does not know how the programs work: each command imports
its program only when called.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ema_client.protocol import DEFAULT_PORT
from ema_service.addresses import announced, is_loopback
from ema_service.logs import LogFormat, configure

if TYPE_CHECKING:
    from ema_service.cluster import ClusterToken

__all__ = ["cluster"]

cluster = typer.Typer(help="One run on several hosts.", no_args_is_help=True)

#: Of a coordinator, where nobody says another.
COORDINATOR_PORT = 8469
#: No option of the command that reaches a machine.
_MACHINE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*")

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
    typer.Option("--coordinator", help="http://HOST:PORT; may be repeated.", envvar="EMA_SERVICE_COORDINATOR"),
]
Shape = Annotated[LogFormat, typer.Option("--log-format", help="Log lines for people, or a JSON object each.")]


@cluster.command()
def coordinator(
    token_file: TokenFile,
    host: Annotated[str, typer.Option(help="Address to listen on, for the hosts and gateways.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = COORDINATOR_PORT,
    log_format: Shape = "text",
) -> None:
    """Decide which writes count on all hosts. Keeps nothing: start it again wherever its hosts find it.

    Ends with status 0 where another coordinator has taken over: restart it on failure alone.
    """
    configure(log_format)
    token = _token(token_file)
    from ema_service.cluster.coordinator import listening_socket, serve

    try:
        sock = listening_socket(host, port)
    except OSError as fault:
        _refuse(f"cannot listen on {host} port {port}: {fault.strerror}; choose another --host or --port")
    typer.echo(f"ema-service {version('ema-service')}, coordinator, listens on {_url(host, sock.getsockname()[1])}")
    serve(token, sock)


@cluster.command()
def gateway(
    coordinator: Coordinators,
    token_file: TokenFile,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = DEFAULT_PORT,
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
    from ema_service import dashboard
    from ema_service.cluster.coordinator import listening_socket
    from ema_service.cluster.gateway.app import serve
    from ema_service.cluster.gateway.hosts import Hosts

    try:
        sock = listening_socket(host, port)
    except OSError as fault:
        _refuse(f"cannot listen on {host} port {port}: {fault.strerror}; choose another --host or --port")
    url = _url(host, sock.getsockname()[1])
    hosts = Hosts(coordinator, token, guarded=not (insecure_no_auth or is_loopback(host)))
    said = f"ema-service {version('ema-service')}, gateway, listens on {url}"
    serve(hosts, sock, lambda: typer.echo(said), dashboard.install_at_gateway)


@cluster.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def host(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(help="Where its shards are kept.", file_okay=False)],
) -> None:
    """Be one host of a cluster for as long as standard input is open: `ema-service serve` with the flags behind --. The
    first line of standard input is the cluster's token. What `up` runs on each machine."""
    from ema_service.cluster.launcher import host_command
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
    folder: Annotated[
        Path, typer.Option("--dir", help="Of data and token, here and on each machine.", file_okay=False)
    ] = Path("ema-cluster"),
    host: Annotated[str, typer.Option(help="Address of the gateway to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the gateway; 0 picks a free one.", min=0)] = DEFAULT_PORT,
    through: Annotated[
        str | None, typer.Option(help="Command before a machine's name.  [default: ssh]", show_default=False)
    ] = None,
    announce: Annotated[
        str | None, typer.Option(help="Name by which the machines reach this one.  [default: found out]")
    ] = None,
) -> None:
    """Start a coordinator, hosts and a gateway, and keep them running until Ctrl-C or SIGTERM. Flags behind -- are
    those of `ema-service serve` for each host.

    A second `up` of the same folder says that it runs already.
    """
    from ema_service.cluster.launcher import THROUGH, LaunchFailed, Plan, RunsAlready, launch

    if (local is None) == (hosts is None):
        raise typer.BadParameter("say how many hosts here (--local 3), or on which machines (--hosts a,b,c)")
    machines = [None] * (local or 0) if hosts is None else [name.strip() for name in hosts.split(",")]
    if not all(machine is None or _MACHINE.fullmatch(machine) for machine in machines):
        raise typer.BadParameter(f"{hosts!r} is no list of machines such as a,b,c", param_hint="--hosts")
    plan = Plan(folder, machines, host, port, through or THROUGH, context.args, announce)

    def ready(url: str) -> None:
        many = f"{len(machines)} host{'s' if len(machines) > 1 else ''}"
        typer.echo(f"ema-service {version('ema-service')}, cluster of {many}, listens on {url}")

    try:
        launch(plan, ready, lambda line: typer.echo(line, err=True))
    except RunsAlready as there:
        typer.echo(f"ema-service: {there}")
    except (LaunchFailed, OSError, ValueError) as fault:
        _refuse(str(fault))


def _first_line() -> str:
    """The first line of standard input, and not a byte more: the rest is for whoever watches for its end."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line.decode("ascii", errors="replace").strip()


def _url(host: str, port: int) -> str:
    return announced(host, port, secure=False)


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
