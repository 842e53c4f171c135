"""Several hosts on one machine: network namespaces on a switch, with wires of a rate and a latency.

Each host is a namespace with an address of its own and one wire, a veth pair, to a bridge in a
namespace of its own; nothing of the machine's own network changes. ``tc`` limits what a host sends
and what it receives (tbf), and delays it (netem). It needs root, ``ip`` and ``tc``, for a latency
netem in the kernel too; :func:`obstacle` says what is missing.

Run a program on every rank of every host, by torchrun::

    python -m benchmarks.hosts --hosts 2 --ranks-per-host 2 --gbit-per-s 0.1 \
        --program examples/05_train_hybrid.py --cp 2 --ep 2 --etp 2
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.harness import parse

DEVICE = "eth0"  # of a host
PORT = 29500


class Wire(NamedTuple):
    """Between a host and the switch, each way: 0 is as fast as the machine is."""

    gbit_per_s: float = 0.0
    latency_ms: float = 0.0

    @property
    def mtu(self) -> int:
        """Bytes of a packet: few packets a second, so that a busy machine keeps up."""
        rate = self.gbit_per_s or math.inf
        return 1500 if rate <= 0.3 else 9000 if rate <= 1 else 65000

    def limits(self, device: str) -> list[list[str]]:
        """``tc`` commands for what leaves a device."""
        commands, handle = [], ["root"]
        if self.latency_ms:
            # Half where a host sends, half where the switch does.
            delay = f"handle 1: netem delay {self.latency_ms / 2}ms limit 100000"
            commands.append(["tc", "qdisc", "add", "dev", device, "root", *delay.split()])
            handle = ["parent", "1:"]
        if self.gbit_per_s:
            # The wire may send two packets at once, and has room for all that is under way.
            tbf = (
                f"tbf rate {self.gbit_per_s * 1e3:g}mbit burst {2 * self.mtu + 200} limit {1 << 26}"
            )
            commands.append(["tc", "qdisc", "add", "dev", device, *handle, *tbf.split()])
        return commands


class Host(NamedTuple):
    """A namespace, and its address on the switch."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """To run in the namespace."""
        return ["ip", "netns", "exec", self.name, *words]


def obstacle(latency: bool = False) -> str:
    """What hosts on this machine would need; empty if nothing is missing."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}, of the package iproute2"
    name = f"lasp-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"needs root to make network namespaces: {made.stderr.strip()}"
    netem = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    delayed = subprocess.run([*Host(name, "").command(*netem)], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], check=True)
    if latency and delayed.returncode:
        return f"needs netem in the kernel (CONFIG_NET_SCH_NETEM): {delayed.stderr.strip()}"
    return ""


def setup(num_hosts: int, wire: Wire, prefix: str) -> tuple[list[Host], list[list[str]]]:
    """The hosts, and the commands that make them after their namespaces are there."""
    switch = Host(f"{prefix}-switch", "")
    hosts = [Host(f"{prefix}-{i}", f"10.77.0.{i + 1}") for i in range(num_hosts)]
    commands = [switch.command("ip", "link", "add", "bridge", "type", "bridge")]
    commands.append(switch.command("ip", "link", "set", "bridge", "up"))
    for index, host in enumerate(hosts):
        port = f"port{index}"
        mtu = ["mtu", str(wire.mtu)]
        add = ["ip", "link", "add", port, *mtu, "netns", switch.name, "type", "veth"]
        commands += [
            [*add, "peer", "name", DEVICE, *mtu, "netns", host.name],
            switch.command("ip", "link", "set", port, "master", "bridge", "up"),
            host.command("ip", "address", "add", f"{host.address}/24", "dev", DEVICE),
            host.command("ip", "link", "set", DEVICE, "up"),
            host.command("ip", "link", "set", "lo", "up"),
            *(host.command(*words) for words in wire.limits(DEVICE)),
            *(switch.command(*words) for words in wire.limits(port)),
        ]
    return hosts, commands


@contextmanager
def hosts_of(num_hosts: int, wire: Wire = Wire()) -> Iterator[list[Host]]:  # noqa: B008
    """So many hosts on one switch, gone afterwards."""
    prefix = f"lasp-{os.getpid()}"
    hosts, commands = setup(num_hosts, wire, prefix)
    with ExitStack() as stack:
        for name in (f"{prefix}-switch", *(host.name for host in hosts)):
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        for command in commands:
            subprocess.run(command, check=True)
        yield hosts


def torchrun(hosts: Sequence[Host], ranks_per_host: int, program: Sequence[str]) -> list[list[str]]:
    """For each host the command that starts its ranks of ``program``."""
    first = hosts[0].address
    where = ["--nnodes", str(len(hosts)), "--nproc-per-node", str(ranks_per_host)]
    where += ["--master-addr", first, "--master-port", str(PORT)]
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [
        host.command(*module, *where, "--node-rank", str(index), *program)
        for index, host in enumerate(hosts)
    ]


def run_on_hosts(
    program: Sequence[str], num_hosts: int = 2, ranks_per_host: int = 1, wire: Wire = Wire(), *,  # noqa: B008
    timeout_s: float = 600.0,
) -> list[str]:  # fmt: skip
    """What each host printed; CalledProcessError with what it printed if one failed."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"}
    with hosts_of(num_hosts, wire) as hosts:
        processes = [
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for command in torchrun(hosts, ranks_per_host, program)
        ]
        try:
            printed = [process.communicate(timeout=timeout_s)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, text in zip(processes, printed):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, text)
    return printed


@dataclass
class Options:
    """Hosts, their wires, and what to run, all that follows ``--program``."""

    program: tuple[str, ...]
    hosts: int = 2
    ranks_per_host: int = 1
    gbit_per_s: float = 0.0
    latency_ms: float = 0.0


def main() -> None:
    """Run, and print what the first host prints."""
    split = sys.argv.index("--program") if "--program" in sys.argv else len(sys.argv)
    options = parse(Options, __doc__, [*sys.argv[1:split], "--program", ""])
    if missing := obstacle(options.latency_ms > 0):
        raise SystemExit(missing)
    wire = Wire(options.gbit_per_s, options.latency_ms)
    try:
        print(run_on_hosts(sys.argv[split + 1 :], options.hosts, options.ranks_per_host, wire)[0])
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.output) from error


if __name__ == "__main__":
    main()
