"""Two machines, as far as a network can tell: two namespaces joined by a cable, one process in each, by torchrun."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several import EXACT

from align import fit
from tools import crash_runs

HOSTS = ("align-a", "align-b")


def ip(*words: str) -> bool:
    """Whether an `ip` command succeeded."""
    try:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces that reach each other; needs the right to make them."""
    try:
        made = all(ip("netns", "add", name) for name in HOSTS)
        ends = [["one", "netns", HOSTS[0]], ["name", "one", "netns", HOSTS[1]]]
        made = made and ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, name in enumerate(HOSTS, start=1):
            made = made and ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "one")
            made = made and ip("-n", name, "link", "set", "one", "up") and ip("-n", name, "link", "set", "lo", "up")
        if not made:
            pytest.skip("no right to make network namespaces")
        yield HOSTS
    finally:
        for name in HOSTS:
            ip("netns", "del", name)


@pytest.mark.parametrize("strategy", ["auto", "{_target_: align.strategy.FSDP}"])
def test_two_hosts_train_what_one_process_trains(hosts: tuple[str, str], strategy: str, tmp_path: Path) -> None:
    crash_runs.prepare(tmp_path)
    words = [*crash_runs.arguments("ppo-ptx", tmp_path, 0), "callbacks.ema=null", EXACT]
    assert fit.main([*words, f"run_dir={tmp_path / 'alone'}"]) == 0
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=10.77.0.1",
        "--master-port=29517",
    ]  # fmt: skip
    command = ["-m", "align.fit", *words, f"run_dir={tmp_path / 'two'}", f"trainer.strategy={strategy}"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "one", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(["ip", "netns", "exec", name, *launcher, f"--node-rank={rank}", *command], env=environment)
        for rank, name in enumerate(hosts)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    own, theirs = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("two", "alone"))
    for name in theirs:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-4, atol=2e-5)
