"""Ranks on two hosts, each with an address of its own, over wires of any rate and latency."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import hosts
from benchmarks.hosts import Host, Wire, run_on_hosts
from tests.test_examples import (
    EXAMPLES,
    arguments_of,
    assert_same_curve,
    curve_in,
    curve_of_one_rank,
)

__all__ = ["curve_of_one_rank"]  # a fixture

needs_hosts = pytest.mark.skipif(bool(why := hosts.obstacle()), reason=why)
needs_latency = pytest.mark.skipif(bool(why := hosts.obstacle(latency=True)), reason=why)
OVER_HOSTS = ("-m", "tests.over_hosts")


def test_a_wire_is_made_of_a_rate_and_a_latency() -> None:
    assert Wire().limits("eth0") == []
    (slow,) = Wire(0.1).limits("eth0")
    command = "tc qdisc add dev eth0 root tbf rate 100mbit burst 3200 limit 67108864"
    assert slow == command.split()
    (fast,) = Wire(10).limits("eth0")
    assert fast[8:12] == ["10000mbit", "burst", "130200", "limit"]
    delay, rate = Wire(0.1, 3.0).limits("port0")
    command = "tc qdisc add dev port0 root handle 1: netem delay 1.5ms limit 100000"
    assert delay == command.split()
    assert rate[5:8] == ["parent", "1:", "tbf"]


def test_hosts_have_addresses_on_one_switch_and_ranks_of_one_job() -> None:
    two, commands = hosts.setup(2, Wire(0.1), "x")
    assert two == [Host("x-0", "10.77.0.1"), Host("x-1", "10.77.0.2")]
    text = [" ".join(command) for command in commands]
    assert "ip netns exec x-1 ip address add 10.77.0.2/24 dev eth0" in text
    assert sum("tbf" in line for line in text) == 4  # what both send, and what both receive
    assert all("netns" in command for command in commands)  # nothing touches the machine's network
    first, second = (" ".join(c) for c in hosts.torchrun(two, 3, ["program.py", "--flag"]))
    where = "--nnodes 2 --nproc-per-node 3 --master-addr 10.77.0.1 --master-port 29500"
    assert f"{where} --node-rank 0 program.py --flag" in first
    assert "ip netns exec x-1" in second
    assert f"{where} --node-rank 1 program.py --flag" in second


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda name: None if name == "tc" else name)
    assert hosts.obstacle() == "needs tc, of the package iproute2"
    monkeypatch.setattr(hosts.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "Operation not permitted\n")
    monkeypatch.setattr(hosts.subprocess, "run", lambda *args, **kwargs: failed)
    message = "needs root to make network namespaces: Operation not permitted"
    assert hosts.obstacle() == message


def run_tests(wire: Wire, *arguments: str, num_hosts: int = 2, ranks_per_host: int = 2) -> None:
    """They pass on every rank, and are not all skipped."""
    program = (*OVER_HOSTS, *arguments)
    for printed in run_on_hosts(program, num_hosts, ranks_per_host, wire):
        assert re.search(r"[1-9]\d* passed", printed), printed


@pytest.mark.slow
@needs_hosts
@pytest.mark.parametrize(
    "tests",
    [
        "tests/lasp/state_exchange/test_strategies.py",
        "tests/lasp/lightning/test_attention.py",
        "tests/ring/test_attention.py",
        "tests/moe_parallel/test_layer.py",
        "tests/test_hybrid.py",
    ],
)
def test_every_package_over_two_hosts(tests: str) -> None:
    run_tests(Wire(), tests)


@pytest.mark.slow
@needs_hosts
def test_states_cross_a_slow_wire() -> None:
    run_tests(Wire(0.1), "tests/lasp/state_exchange/test_strategies.py")


@pytest.mark.slow
@needs_latency
def test_states_cross_a_long_wire() -> None:
    run_tests(Wire(1.0, 5.0), "tests/lasp/state_exchange/test_strategies.py")


@pytest.mark.slow
@needs_hosts
@pytest.mark.parametrize("gbit_per_s", [0.0, 1.0])
def test_two_hosts_train_the_same_curve(
    gbit_per_s: float, tmp_path: Path, curve_of_one_rank: list[dict[str, float]]
) -> None:
    arguments = arguments_of(tmp_path, "--stop-after", "3", cp=2, ep=2, etp=2)
    run_on_hosts([str(EXAMPLES / "05_train_hybrid.py"), *arguments], 2, 2, Wire(gbit_per_s))
    assert_same_curve(curve_in(tmp_path), curve_of_one_rank[:3])
