"""The memory plan beside what a process really takes."""

import json
import sys
from pathlib import Path

import pytest

from align import launch

CASES = {1: ("sft-gpt2", "ppo-qwen3"), 2: ("sft-llama-checkpointing",)}
"""Processes, which share the weights if there are several -> objective, family, and what else is so."""


@pytest.mark.parametrize("processes", CASES)
def test_the_plan_is_close_to_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    # glibc keeps what is freed for later; here it shall give it back, so that the peak is what was in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "262144")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    words = [str(Path(__file__).with_name("memory_ranks.py")), str(tmp_path / "out"), *CASES[processes]]
    assert launch.run([sys.executable, *words], processes) == 0
    for rank in range(processes):
        found = json.loads((tmp_path / f"out-{rank}").read_text())
        assert found.keys() == set(CASES[processes])
        for case, (planned, measured) in found.items():
            assert planned > 2**29
            assert measured / planned == pytest.approx(1.0, abs=0.15), (case, rank, planned / 2**20, measured / 2**20)
