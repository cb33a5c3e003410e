"""Machines of a network, each a network namespace of Linux with a link of its own to one switch.

    host-0 ---- link ----+
    host-1 ---- link ----+-- switch      a link: a pair of veth, paced both ways by tbf
    trainer --- link ----+

Needs root, ``ip`` of iproute2, and a kernel with namespaces, veth, bridges and tbf. Namespaces are named by the process
that made them: what one has left behind that was killed goes before the next network is made.

Knows ``ip`` and ``tc``. Does not know what runs on the machines.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

__all__ = ["Network", "enter", "why_no_network"]

_PREFIX = "ema-"
_NAMED = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_LIBC = ctypes.CDLL(None, use_errno=True)
#: Of a link that is paced: bytes that may go at once, and what a packet waits at most.
_BURST, _LATENCY = "512kb", "50ms"


def enter(namespace: str) -> None:
    """Have this thread be in a named namespace, with what it starts from now on. Raises OSError."""
    with (_NAMED / namespace).open() as there:
        _enter(there.fileno())


def why_no_network() -> str:
    """Why there can be no such network here, empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if missing := [program for program in ("ip", "tc") if not shutil.which(program)]:
        return f"network namespaces want {' and '.join(missing)} of iproute2"
    try:
        with Network({"a": 100}) as network, network.at("a"):
            return ""
    except (OSError, subprocess.CalledProcessError) as fault:
        said = fault.stderr.strip() if isinstance(fault, subprocess.CalledProcessError) else fault
        return f"no network namespaces here: {said}"


class Network:
    """Machines, by name, until the block ends. rates: by machine, megabits a second each way; None: as fast as it
    goes. Raises OSError, CalledProcessError."""

    def __init__(self, rates: Mapping[str, int | None]) -> None:
        self._rates = dict(rates)
        self._made: list[str] = []

    def __enter__(self) -> Self:
        _remove_leftovers()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def address(self, machine: str) -> str:
        """A machine's IPv4 address, which no other network reaches."""
        return f"10.77.0.{10 + list(self._rates).index(machine)}"

    @contextlib.contextmanager
    def at(self, machine: str) -> Iterator[None]:
        """Within the block this thread is on a machine, with the processes and threads that it starts."""
        with Path("/proc/thread-self/ns/net").open() as here:
            enter(self.namespace(machine))
            try:
                yield
            finally:
                _enter(here.fileno())

    def namespace(self, machine: str) -> str:
        """The name of a machine's namespace, for enter()."""
        return f"{_PREFIX}{os.getpid()}-{machine}"

    def cut(self, machine: str) -> None:
        """From here on nothing that a machine sends arrives, nor anything that is sent to it; nobody is told."""
        self._at_switch(f"link set {self._port(machine)} nomaster")

    def mend(self, machine: str) -> None:
        """The link is there again."""
        self._at_switch(f"link set {self._port(machine)} master switch")

    def lose(self, machine: str, share: float) -> None:
        """Let so much of what is sent to a machine be lost, and of what it sends. Raises CalledProcessError where the
        kernel cannot."""
        for chain in ("INPUT", "OUTPUT"):
            rule = ["-A", chain, "-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
            _run(["ip", "netns", "exec", self.namespace(machine), "iptables", "-w", *rule])

    # ----------------------------------------------------------------------------------------------------------------

    def _port(self, machine: str) -> str:
        """The switch's end of a machine's link."""
        return f"p{list(self._rates).index(machine)}"

    def _make(self) -> None:
        self._add("switch")
        # Without the delay of spanning trees a port carries from the moment at which it is there.
        self._at_switch("link add switch type bridge forward_delay 0", "link set switch up")
        for machine, rate in self._rates.items():
            self._add(machine)
            port, name = self._port(machine), self.namespace(machine)
            self._at_switch(
                f"link add {port} type veth peer name eth0 address {self._mac(machine)} netns {name}",
                f"link set {port} master switch",
                f"link set {port} up",
            )
            _ip(name, "link set lo up", f"addr add {self.address(machine)}/24 dev eth0", "link set eth0 up")
            if rate:
                for namespace, device in ((name, "eth0"), (self.namespace("switch"), port)):
                    paced = ["tbf", "rate", f"{rate}mbit", "burst", _BURST, "latency", _LATENCY]
                    _run(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *paced])

            with self.at(machine), contextlib.suppress(OSError):  # what Linux takes where nobody says another
                _CONGESTION.write_text("cubic")
        # As behind routers: nobody is told at once that a machine is gone, which the end of ARP's answers would tell.
        for machine in self._rates:
            others = [each for each in self._rates if each != machine]
            known = [f"neigh add {self.address(each)} lladdr {self._mac(each)} dev eth0" for each in others]
            _ip(self.namespace(machine), *known)

    def _mac(self, machine: str) -> str:
        return f"02:00:00:00:00:{list(self._rates).index(machine):02x}"

    def _add(self, machine: str) -> None:
        _run(["ip", "netns", "add", self.namespace(machine)])
        self._made.append(self.namespace(machine))

    def _at_switch(self, *commands: str) -> None:
        _ip(self.namespace("switch"), *commands)

    def _remove(self) -> None:
        while self._made:
            _run(["ip", "netns", "delete", self._made.pop()])


def _ip(namespace: str, *commands: str) -> None:
    """Have ``ip`` do several things in a namespace."""
    _run(["ip", "-n", namespace, "-batch", "-"], "\n".join(commands))


def _run(command: Sequence[str], given: str = "") -> None:
    subprocess.run(command, input=given, check=True, capture_output=True, text=True, timeout=30)


def _enter(descriptor: int) -> None:
    """Have this thread be in a namespace. Raises OSError."""
    if _LIBC.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a network namespace cannot be entered")


def _remove_leftovers() -> None:
    """Remove the namespaces of processes that are gone."""
    for path in _NAMED.glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(subprocess.CalledProcessError):  # somebody else does so at this moment
                _run(["ip", "netns", "delete", path.name])
