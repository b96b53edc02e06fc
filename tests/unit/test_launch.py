"""How many processes a configuration asks for, and what they are told."""

import pytest
import torch

from align import launch
from align.config import ConfigError
from align.types import Comparisons


@pytest.mark.parametrize(
    ("devices", "count"), [(1, 1), (4, 4), ("auto", 1), ("3", 3), ("0,", 1), ("0,1", 2), ([0, 2, 5], 3)]
)
def test_devices_are_counted_as_the_trainer_counts_them(devices: object, count: int) -> None:
    assert launch.processes(devices) == count


def test_a_rank_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launch.variables(1, 2, 29500).items():
        monkeypatch.setenv(name, value)
    assert launch.processes(8, num_nodes=2) == 1


def test_several_machines_need_a_launcher() -> None:
    with pytest.raises(
        ConfigError, match=r"num_nodes: got 2, .* start the same command on every machine with torchrun"
    ):
        launch.processes(8, num_nodes=2)


def test_a_slurm_script_is_not_one_of_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert launch.processes(8) == 8  # the batch script itself: nobody else is there
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert launch.processes(8) == 1


def test_what_does_not_count_stays_where_it_is() -> None:
    ids = torch.empty(3, 4, dtype=torch.long, device="meta")
    number = torch.empty(3, dtype=torch.long, device="meta")
    batch = Comparisons(ids, number, number, number, torch.empty(3, device="meta"), ("",) * 3)
    assert batch.uncounted().prompt_index.device.type == "meta"
