"""The command ``ema-service``: serve, demo, bench, release, the tokens of a server, and clusters (cluster_cli).

Knows flags, their environment variables, and what is printed. Does not know how the server works: each command imports
torch and the server only when called, so that ``--help`` answers at once.
"""

from __future__ import annotations

import re
import sqlite3
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ema_client.protocol import DEFAULT_PORT
from ema_service.addresses import host_of, is_loopback, most_reachable
from ema_service.cluster_cli import cluster
from ema_service.logs import LogFormat, configure
from ema_service.settings import DEFAULT_DATA_DIR, Settings
from ema_service.sizes import parse_size
from ema_service.tokens import TokenFileError, create_token, moment, read_token_file, revoke_token

if TYPE_CHECKING:
    from ema_service.storage import Store

__all__ = ["main"]


def _size(text: str) -> int:
    """A number of bytes, at least one."""
    try:
        nbytes = parse_size(text)
    except ValueError as fault:
        raise typer.BadParameter(str(fault)) from None
    if nbytes < 1:
        raise typer.BadParameter("that is nothing; write 1GiB, 100MB or a number of bytes")
    return nbytes


def _shard(text: str | None, flag: str = "--shard", *, twins: bool = False) -> tuple[int, int] | None:
    """Which of how many hosts: ``0/3``. twins: whether two of them have one shard."""
    if text is None:
        return None
    found = re.fullmatch(r"(0|[1-9][0-9]{0,4})/([1-9][0-9]{0,4})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise typer.BadParameter(
            f"{text!r} is none such as 0/3, 1/3 or 2/3: places are counted from 0", param_hint=flag
        )
    place, of = int(found[1]), int(found[2])
    if twins and (of % 2 or of < 4):
        raise typer.BadParameter(
            f"{of} hosts are no two or more shards with two hosts each; of one shard alone no third host would know "
            "which of the two was left behind",
            param_hint="--twins",
        )
    return place, of


app = typer.Typer(
    name="ema-service",
    help="Holds the EMA shadow weights of many training runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ema-service {version('ema-service')}")
        raise typer.Exit


@app.callback()
def _common(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del show


@app.command()
def serve(
    # No variables EMA_SERVICE_HOST and EMA_SERVICE_PORT: Kubernetes sets them in every container beside a Service named
    # "ema", or "ema-service".
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = DEFAULT_PORT,
    uds: Annotated[
        Path | None,
        typer.Option(
            help="Listen on this Unix socket as well; only this user may connect.",
            envvar="EMA_SERVICE_UDS",
        ),
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(help="Where runs are kept.", envvar="EMA_SERVICE_DATA_DIR", file_okay=False)
    ] = DEFAULT_DATA_DIR,
    ram_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder in memory for versions that outlive kill -9.  [default: your own in /dev/shm]",
            envvar="EMA_SERVICE_RAM_DIR",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Keep nothing on disk.",
            envvar="EMA_SERVICE_MEMORY",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", envvar="EMA_SERVICE_DEVICE")] = "auto",
    memory_limit: Annotated[
        int | None,
        typer.Option(
            help="Most memory in all, such as 8GiB.  [default: what the control group or the machine has]",
            parser=_size,
            metavar="SIZE",
            show_default=False,
            envvar="EMA_SERVICE_MEMORY_LIMIT",
        ),
    ] = None,
    staging_bytes: Annotated[
        int | None,
        typer.Option(
            help="Of that, most for pushes in flight.  [default: a quarter of the memory]",
            parser=_size,
            metavar="SIZE",
            show_default=False,
            envvar="EMA_SERVICE_STAGING_BYTES",
        ),
    ] = None,
    frozen_bytes: Annotated[
        int | None,
        typer.Option(
            help="Of that, most for versions being read.  [default: a quarter of the memory]",
            parser=_size,
            metavar="SIZE",
            show_default=False,
            envvar="EMA_SERVICE_FROZEN_BYTES",
        ),
    ] = None,
    checkpoint_interval: Annotated[
        float,
        typer.Option(
            help="Seconds between looks for runs that moved since their last checkpoint.",
            min=0.05,
            envvar="EMA_SERVICE_CHECKPOINT_INTERVAL",
        ),
    ] = Settings.checkpoint_interval,
    body_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds a sender may stay silent in the middle of a body, or a reader take nothing.",
            min=0.1,
            envvar="EMA_SERVICE_BODY_TIMEOUT",
        ),
    ] = Settings.body_timeout,
    max_connections: Annotated[
        int,
        typer.Option(
            help="Most connections at once; beyond, the idlest is closed for a new one.",
            min=1,
            envvar="EMA_SERVICE_MAX_CONNECTIONS",
        ),
    ] = Settings.max_connections,
    max_watchers: Annotated[
        int,
        typer.Option(
            help="Most streams of events (`ema watch`) at once.",
            min=1,
            envvar="EMA_SERVICE_MAX_WATCHERS",
        ),
    ] = Settings.max_watchers,
    max_lanes: Annotated[
        int,
        typer.Option(
            help="Most connections at once that bring one update; with 1, an update comes over one.",
            min=1,
            max=256,
            envvar="EMA_SERVICE_MAX_LANES",
        ),
    ] = Settings.max_lanes,
    max_snapshots: Annotated[
        int,
        typer.Option(
            help="Most snapshots of one run.",
            min=1,
            envvar="EMA_SERVICE_MAX_SNAPSHOTS",
        ),
    ] = Settings.max_snapshots,
    snapshot_store: Annotated[
        str | None,
        typer.Option(
            help="Move snapshots to this object store, such as s3://bucket/prefix, or to a folder; they are read from "
            "there.  [default: they stay in the data dir]",
            metavar="URL",
            show_default=False,
            envvar="EMA_SERVICE_SNAPSHOT_STORE",
        ),
    ] = None,
    measurements: Annotated[
        bool,
        typer.Option(
            "--measurements/--no-measurements",
            help="Measure each update: how far shadow and parameters are apart, rates, times (`ema history`).",
            envvar="EMA_SERVICE_MEASUREMENTS",
        ),
    ] = Settings.measurements,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Ask for tokens, those of this file (`ema-service token create`).",
            dir_okay=False,
            envvar="EMA_SERVICE_TOKEN_FILE",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name by which clients reach the server; may be given several times. Without tokens only IP "
            "addresses and this machine's own names are answered.",
            envvar="EMA_SERVICE_ALLOWED_HOST",
        ),
    ] = None,
    announce: Annotated[
        str | None,
        typer.Option(
            help="Name or address by which others reach the server, or a proxy's URL: printed at the start, and an "
            "--allowed-host.  [default: of --host 0.0.0.0 this machine's address]",
            show_default=False,
            envvar="EMA_SERVICE_ANNOUNCE",
        ),
    ] = None,
    address_file: Annotated[
        Path | None,
        typer.Option(
            help="Say in this file, for clients with the URL file:///PATH, where the server is, while it listens.",
            dir_okay=False,
            envvar="EMA_SERVICE_ADDRESS_FILE",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Be a host of a cluster, with one shard of each run: the how manieth, from 0, of how many, as in 0/3.",
            metavar="PLACE/OF",
            envvar="EMA_SERVICE_SHARD",
        ),
    ] = None,
    twins: Annotated[
        bool,
        typer.Option(
            "--twins",
            help="The later half of the hosts are twins of the earlier half: 3/4 has the same shard as 1/4.",
            envvar="EMA_SERVICE_TWINS",
        ),
    ] = False,
    coordinator: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of a coordinator of the cluster, or file:///PATH of a file with it, read again for each "
            "connection; may be given several times.",
            metavar="URL",
            envvar="EMA_SERVICE_COORDINATOR",
        ),
    ] = None,
    cluster_token_file: Annotated[
        Path | None,
        typer.Option(
            help="The secret that coordinators and hosts share, on one line.",
            dir_okay=False,
            envvar="EMA_SERVICE_CLUSTER_TOKEN_FILE",
        ),
    ] = None,
    cluster_address: Annotated[
        str | None,
        typer.Option(
            help="URL at which others reach this host.  [default: what is printed at the start]",
            metavar="URL",
            show_default=False,
            envvar="EMA_SERVICE_CLUSTER_ADDRESS",
        ),
    ] = None,
    lease: Annotated[
        float | None,
        typer.Option(
            help="As a host: end at once after so many seconds without a word of a coordinator or of what started the "
            "server, which may have replaced it by then.  [default: go on]",
            min=1,
            metavar="SECONDS",
            show_default=False,
            envvar="EMA_SERVICE_LEASE",
        ),
    ] = None,
    replica_of: Annotated[
        str | None,
        typer.Option(
            help="Follow the runs of the server at this URL and be read in its place, with nothing on disk, taking no "
            "write; in a cluster, of the how manieth host of how many, as in 0/3.",
            metavar="URL|PLACE/OF",
            envvar="EMA_SERVICE_REPLICA_OF",
        ),
    ] = None,
    replica_token_file: Annotated[
        Path | None,
        typer.Option(
            help="As a replica: a token that may pull from that server, on one line.",
            dir_okay=False,
            envvar="EMA_SERVICE_REPLICA_TOKEN_FILE",
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(
            help="Speak TLS: the certificate, then those between it and its authority; PEM.",
            envvar="EMA_SERVICE_SSL_CERTFILE",
        ),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(
            help="Key of the certificate, not encrypted; PEM.",
            envvar="EMA_SERVICE_SSL_KEYFILE",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Log lines for people, or a JSON object each.", envvar="EMA_SERVICE_LOG_FORMAT")
    ] = "text",
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log",
            help="A log line for each request.",
            envvar="EMA_SERVICE_ACCESS_LOG",
        ),
    ] = False,
    slow_request: Annotated[
        float,
        typer.Option(
            help="Seconds beyond which a request gets a log line.",
            min=0,
            envvar="EMA_SERVICE_SLOW_REQUEST",
        ),
    ] = Settings.slow_request,
    insecure_no_auth: Annotated[
        bool,
        typer.Option(
            "--insecure-no-auth",
            help="Listen beyond loopback although anyone may then read and write.",
            envvar="EMA_SERVICE_INSECURE_NO_AUTH",
        ),
    ] = False,
) -> None:
    """Start the server. Ctrl-C or SIGTERM finishes the updates in hand, keeps every run, and stops."""
    if token_file is None and not insecure_no_auth and not is_loopback(host):
        raise typer.BadParameter(
            f"{host} can be reached by others, and without tokens anyone could read and write every run. "
            "Make tokens (`ema-service token create`) and give --token-file, or say --insecure-no-auth.",
            param_hint="--host",
        )
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise typer.BadParameter("a certificate and its key come together", param_hint="--ssl-certfile, --ssl-keyfile")
    if memory and snapshot_store:
        raise typer.BadParameter(
            "snapshots are files of a data dir before they are moved: leave --memory out", param_hint="--snapshot-store"
        )
    place = _shard(replica_of, "--replica-of") if replica_of and "://" not in replica_of else None
    seat = replica_of if place else shard
    more = cluster_address or lease or twins or None
    _check_cluster(seat, coordinator, cluster_token_file, more, memory=memory and not place)
    replica_token = _replica_token(replica_of, replica_token_file, place=place is not None)
    if replica_of and (shard or (snapshot_store and not place)):  # one of a host is started with the flags of hosts
        raise typer.BadParameter(
            "a replica decides nothing and keeps nothing: leave --shard and --snapshot-store out",
            param_hint="--replica-of",
        )
    budgets = {"memory_limit": memory_limit, "staging_bytes": staging_bytes, "frozen_bytes": frozen_bytes}
    settings = Settings(
        data_dir=None if memory or replica_of else data_dir,
        ram_dir=ram_dir,
        device="cpu" if replica_of else device,  # nothing is averaged
        **{name: nbytes for name, nbytes in budgets.items() if nbytes is not None},
        checkpoint_interval=checkpoint_interval,
        body_timeout=body_timeout,
        max_connections=max_connections,
        max_watchers=max_watchers,
        max_lanes=max_lanes,
        max_snapshots=max_snapshots,
        snapshot_store=None if replica_of else snapshot_store,
        measurements=measurements,
        token_file=token_file,
        allowed_hosts=(host, *(allowed_host or ()), *([host_of(announce)] if announce else [])),
        announce=announce,
        address_file=address_file,
        slow_request=slow_request,
        access_log=access_log,
        shard=_shard(shard, twins=twins),
        twins=twins,
        coordinators=tuple(coordinator or ()),
        cluster_token_file=cluster_token_file,
        cluster_address=cluster_address,
        lease=lease,
        replica_of=None if place else replica_of,
        replica_place=place,
        replica_token=replica_token,
    )
    configure(log_format)
    _run(settings, host, port, uds, (ssl_certfile, ssl_keyfile) if ssl_certfile and ssl_keyfile else None)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the picture goes.", dir_okay=False)] = Path("ema-demo.png"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the server after the training, to look at its pages, until Ctrl-C.")
    ] = False,
) -> None:
    """Train a small diffusion model on handwritten digits with its EMA in a server, and watch it from an evaluator."""
    from ema_service.demo import run_demo

    raise typer.Exit(run_demo(out, keep=keep))


@app.command()
def bench(
    url: Annotated[str | None, typer.Option(help="Measure this service; without it one is started here.")] = None,
    size: Annotated[str, typer.Option(help="Size of the largest run, such as 1GiB or 300MB.")] = "1GiB",
    rounds: Annotated[int, typer.Option(help="Figures for each row.", min=1)] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    token: Annotated[str | None, typer.Option(help="Bearer token.", envvar="EMA_SERVICE_TOKEN")] = None,
) -> None:
    """Measure push and pull on this machine, or on your own link to a service."""
    from ema_service.bench.play import run_bench

    raise typer.Exit(run_bench(url, size, rounds, json_file, token=token))


tokens = typer.Typer(help="Tokens of a server that asks for them.", no_args_is_help=True)
app.add_typer(tokens, name="token")
app.add_typer(cluster, name="cluster")

TokenFile = Annotated[Path, typer.Option("--token-file", help="The server's --token-file.", dir_okay=False)]
_TOKEN_FILE = Path("ema-tokens")
_SIGNAL = "A running server reads the file again on SIGHUP (`kill -HUP`)."


@tokens.command(epilog=_SIGNAL)
def create(
    scope: Annotated[list[str], typer.Option(help="train, pull, snapshot, push or admin; may be given several times.")],
    run: Annotated[str, typer.Option(help="Pattern of the runs it is for, such as 'cogview*'.")] = "*",
    expires: Annotated[
        str | None, typer.Option(help="How long it lasts: 90m, 12h, 30d, 52w.  [default: for ever]", show_default=False)
    ] = None,
    remark: Annotated[str, typer.Option(help="For whoever lists the tokens: whose it is.")] = "",
    token_file: TokenFile = _TOKEN_FILE,
) -> None:
    """Make a token and print it: only its hash is kept. The file is made if it is not there."""
    until = None if expires is None else int(time.time()) + _lifetime(expires)
    try:
        typer.echo(create_token(token_file, scope, run, expires=until, remark=remark))
    except (OSError, TokenFileError) as fault:
        _refuse(fault)


@tokens.command("list")
def list_tokens(token_file: TokenFile = _TOKEN_FILE) -> None:
    """Show the tokens of a file: name, scopes, pattern of runs, when each expires, remark."""
    try:
        grants = read_token_file(token_file)
    except TokenFileError as fault:
        _refuse(fault)
    rows = [("NAME", "SCOPES", "RUNS", "EXPIRES", "REMARK")]
    for grant in grants:
        until = "never" if grant.expires is None else moment(grant.expires) + (" (expired)" if grant.expired else "")
        rows.append((grant.name, ",".join(sorted(grant.scopes)), grant.runs, until, grant.remark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


@tokens.command(epilog=_SIGNAL)
def revoke(
    name: Annotated[str, typer.Argument(help="As `ema-service token list` shows it; its beginning is enough.")],
    token_file: TokenFile = _TOKEN_FILE,
) -> None:
    """Let a token be worth nothing. Its line stays in the file, as a comment."""
    try:
        grant = revoke_token(token_file, name)
    except (OSError, TokenFileError) as fault:
        _refuse(fault)
    typer.echo(f"{grant.name} ({','.join(sorted(grant.scopes))} of {grant.runs}) is revoked. {_SIGNAL}")


def _lifetime(text: str) -> int:
    """Seconds of a length of time such as 30d."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})([mhdw])", text)
    if not match:
        raise typer.BadParameter(f"{text!r} is no length of time such as 90m, 12h, 30d or 52w", param_hint="--expires")
    return int(match[1]) * {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}[match[2]]


def _run(settings: Settings, host: str, port: int, uds: Path | None, certificate: tuple[Path, Path] | None) -> None:
    """Serve until told to stop. Exits with 1, and a line on stderr, where the server cannot start."""
    if settings.snapshot_store:
        _check_snapshot_store(settings.snapshot_store)
    # Before the rest of the server is imported, which takes memory: memory that an earlier server left may leave no
    # room for both.
    store = _opened(settings)
    from ema_service.api.app import pick_device
    from ema_service.api.server import serve as serve_http
    from ema_service.storage import CatalogUnusable
    from ema_service.tls import Certificate, CertificateUnusable

    def announce(url: str) -> None:
        lines = [f"ema-service {version('ema-service')} listens on {url}"]
        if uds:
            lines.append(f"  socket     unix://{uds.resolve()}")
        lines.append(f"  device     {pick_device(settings.device)}")
        if settings.replica_of or settings.replica_place:
            lines.append(f"  replica of {settings.replica_of or 'host {} of {}'.format(*settings.replica_place or ())}")
        lines.append(f"  data dir   {_data_line(settings.data_dir, store)}")
        if store:
            lines.append(f"  memory     {_memory_line(store)}")
        if settings.snapshot_store:
            lines.append(f"  snapshots  {_without_password(settings.snapshot_store)}")
        if settings.address_file:
            lines.append(f"  address    file://{settings.address_file.absolute()}{_only_here(url, uds)}")
        lines.append(f"  dashboard  {url}/    API docs  {url}/docs")
        # At once: whoever waits for the first line has them all.
        typer.echo("\n".join(lines))

    try:
        tls = Certificate(*certificate) if certificate else None
        serve_http(settings, store, host, port, uds, announce, tls)
    except (OSError, RuntimeError, sqlite3.Error, CatalogUnusable, CertificateUnusable, TokenFileError) as fault:
        # What keeps a server from starting: an address in use, a device that is not there, a disk.
        _refuse(fault)


@app.command()
def release(
    data_dir: Annotated[
        Path, typer.Option(help="Of the server that was killed.", envvar="EMA_SERVICE_DATA_DIR", file_okay=False)
    ] = DEFAULT_DATA_DIR,
    ram_dir: Annotated[
        Path | None,
        typer.Option(help="As that server had it.", envvar="EMA_SERVICE_RAM_DIR", file_okay=False, show_default=False),
    ] = None,
) -> None:
    """Bring what a killed server left in memory to its disk, and give the memory back; nothing is served."""
    if not (data_dir / "catalog.db").exists():
        raise typer.BadParameter(f"{data_dir} is no data dir of a server", param_hint="--data-dir")
    store = _opened(Settings(data_dir=data_dir, ram_dir=ram_dir))
    from ema_client.errors import StorageFailed
    from ema_service.persistence.releasing import release as release_memory
    from ema_service.storage import MEMORY

    if store is None:
        return
    try:
        for name, step in release_memory(store):
            typer.echo(f"{name}: step {step} is on disk, its memory is free")
        if any(each.folder == MEMORY for row in store.runs() for each in store.checkpoints(row)):
            raise typer.Exit(1)  # the log says of which run, and why
    except (OSError, sqlite3.Error, StorageFailed) as fault:
        _refuse(fault)
    finally:
        store.close()


@app.command()
def recover(
    snapshot_store: Annotated[
        str,
        typer.Option(help="Of the server whose data dir is lost.", metavar="URL", envvar="EMA_SERVICE_SNAPSHOT_STORE"),
    ],
    data_dir: Annotated[
        Path, typer.Option(help="To have them from now on.", envvar="EMA_SERVICE_DATA_DIR", file_okay=False)
    ] = DEFAULT_DATA_DIR,
    shard: Annotated[
        str | None,
        typer.Option(help="Of a host of a cluster, as its server has it: 0/3. For each host once.", metavar="I/K"),
    ] = None,
) -> None:
    """Have the snapshots of an object store again, after the data dir was lost; nothing is served. From then on they
    are this data dir's, which also deletes them: never recover those of a server that still runs."""
    from ema_service.cluster.hosting.recovering import NotRecovered, recover_host
    from ema_service.persistence.recovering import recover as recover_snapshots
    from ema_service.storage import CatalogUnusable, ObjectStoreUnusable, Store, open_objects

    place = _shard(shard)
    try:
        objects = open_objects(snapshot_store)
        store = Store(data_dir)
    except (OSError, sqlite3.Error, CatalogUnusable, ObjectStoreUnusable) as fault:
        _refuse(fault)
    found, left_out = 0, 0
    try:
        for each in recover_host(store, objects, *place) if place else recover_snapshots(store, objects):
            found, left_out = found + 1, left_out + (each.left_out is not None)
            named = f"{each.run}/{each.snapshot}" if each.run else each.folder
            typer.echo(f"{named}: {f'left out: {each.left_out}' if each.left_out else 'is there'}")
    except (OSError, sqlite3.Error, CatalogUnusable, NotRecovered) as fault:
        _refuse(fault)
    finally:
        store.close()
    if not found:
        typer.echo(f"{objects.url} has no snapshots{' of host {} of {}'.format(*place) if place else ''}")
    raise typer.Exit(1 if left_out or not found else 0)


def _opened(settings: Settings) -> Store | None:
    """The store, or an end with what is wrong with it."""
    from ema_service.storage import CatalogUnusable, open_store

    if settings.data_dir is None:
        return None
    try:
        lease, first = settings.lease or 0.0, settings.first_number
        return open_store(settings.data_dir, settings.ram_dir, lease=lease, first=first)
    except (OSError, sqlite3.Error, CatalogUnusable) as fault:
        _refuse(fault)


def _replica_token(of: str | None, token_file: Path | None, *, place: bool) -> str | None:
    """The token that a replica reads with; None for none. Exits where the flags of a replica cannot be used."""
    if of is None:
        if token_file:
            raise typer.BadParameter(
                "only a replica has one: say --replica-of as well", param_hint="--replica-token-file"
            )
        return None
    from ema_service.replica.original import check_original, read_token

    try:
        if not place:
            check_original(of)
        return read_token(token_file) if token_file else None
    except (OSError, ValueError) as fault:
        _refuse(fault)


def _check_cluster(
    shard: str | None,
    coordinators: list[str] | None,
    token_file: Path | None,
    more: object,
    *,
    memory: bool,
) -> None:
    """Exit where the flags of a host of a cluster are not all there, or one of them says nothing that can be used.

    more: whatever else was said that only a host has.
    """
    given = {"--shard": shard, "--coordinator": coordinators, "--cluster-token-file": token_file}
    missing = [flag for flag, value in given.items() if not value]
    if missing == list(given) and more is None:
        return
    if missing:
        raise typer.BadParameter("a host of a cluster needs all three", param_hint=", ".join(missing))
    if memory:
        raise typer.BadParameter("a host's votes have to outlive it: leave --memory out", param_hint="--shard")
    from ema_service.cluster.token import read_cluster_token
    from ema_service.cluster.whereabouts import check_coordinator

    try:
        for url in coordinators or ():
            check_coordinator(url)
        read_cluster_token(token_file or Path())
    except (OSError, ValueError) as fault:
        _refuse(fault)


def _check_snapshot_store(url: str) -> None:
    """Exit where the URL means no object store that can be used here; nothing is asked of the store."""
    from ema_service.storage import ObjectStoreUnusable, open_objects

    try:
        open_objects(url)
    except ObjectStoreUnusable as fault:
        _refuse(fault)


def _without_password(url: str) -> str:
    from ema_service.storage.objects import shown

    return shown(url)


def _only_here(url: str, uds: Path | None) -> str:
    """What to know of an address that other machines cannot use."""
    told = most_reachable(url, uds)
    if told != url or is_loopback(host_of(told)):
        return " (for clients on this machine: --host says who may connect)"
    return ""


def _data_line(data_dir: Path | None, store: Store | None) -> str:
    """Where runs are kept, and what is different there on a network's file system."""
    if store and store.mounted.shared:
        return f"{data_dir}, on {store.mounted.kind}: its catalog is this server's alone while the server runs"
    return str(data_dir or "none: --memory keeps nothing")


def _memory_line(store: Store) -> str:
    """Where versions of durability ``process`` lie, and what to do where that is a disk."""
    files = store.memory_files
    if files is None:
        return f"none: {store.memory_fault}; each version is written to disk, unless there is a --ram-dir"
    disk = "; this is no memory: the kernel writes it to its disk" if files.writes_to_disk else ""
    return f"{files.folder}, room for {files.room() / (1 << 30):.1f} GiB{disk}"


def _refuse(fault: Exception) -> NoReturn:
    typer.echo(f"ema-service: {fault}", err=True)
    raise typer.Exit(1) from None
