"""Runs that were stopped: what continues, what is refused, and what each fault leads to."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from align import blockwise, checkpoints, fit, interrupt, resume
from align.callbacks.checkpoint import Checkpoints
from align.models.load import load_causal_lm
from align.modules.ppo import PPOModule
from align.modules.sft import SFTModule
from align.types import Completions
from tools import crash_runs, crash_test

Command = list[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and text."""
    folder = tmp_path_factory.mktemp("world")
    crash_runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(world: Path) -> Path:
    """An SFT run that nothing disturbed: 12 steps."""
    assert fit.main(sft(world, world / "unbroken")) == 0
    return world / "unbroken"


@pytest.fixture
def stopped(world: Path, tmp_path: Path) -> Path:
    """The same run, ended by SIGTERM in the middle of its eighth step; checkpoints at steps 6 and 7."""
    with stop_at(8):
        assert fit.main(sft(world, tmp_path / "run")) == interrupt.AGAIN
    return tmp_path / "run"


def sft(world: Path, run: Path, *more: str) -> Command:
    """The command of a small SFT run."""
    return [*crash_runs.arguments("sft", world, 0), f"run_dir={run}", *more]


def ppo(world: Path, run: Path, *more: str) -> Command:
    """The command of a small PPO-ptx run."""
    return [*crash_runs.arguments("ppo-ptx", world, 0), f"run_dir={run}", *more]


class stop_at:
    """Sends this process a signal when a step has computed its first gradient."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def __enter__(self) -> None:
        self.original = SFTModule.losses
        outer = self

        def losses(module: SFTModule, batch: Any) -> Iterator[Any]:
            for piece in outer.original(module, batch):
                yield piece
                if module.global_step == outer.step - 1:
                    os.kill(os.getpid(), outer.number)

        SFTModule.losses = losses  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        SFTModule.losses = self.original  # type: ignore[method-assign]


def newest(run: Path) -> Path:
    """The newest checkpoint's folder."""
    return checkpoints.found(run / "checkpoints")[0]


def complaint(capsys: pytest.CaptureFixture[str], command: Command, code: int = 2) -> str:
    """What a failing command prints to stderr."""
    assert fit.main(command) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_the_middle_of_a_step_loses_only_that_step(
    world: Path, unbroken: Path, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with stop_at(8, number):
        assert fit.main(sft(world, run)) == interrupt.AGAIN
    assert f"ended by {number.name}; the same command continues it" in capsys.readouterr().out
    assert newest(run).name == "step-000000007"
    assert not (run / "hf").exists() and not (run / "finished.json").exists()
    assert fit.main(sft(world, run)) == 0
    assert "continues from step 7" in capsys.readouterr().out
    assert crash_runs.differences(run, unbroken) == []


def test_a_finished_run_says_so_and_is_not_touched(
    world: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    assert fit.main(sft(world, unbroken)) == 0
    assert "finished, at step 12; model in" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}


def test_never_only_begins(world: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exists and is not empty; overwrite=true" in complaint(capsys, sft(world, stopped, "resume=never"))
    assert newest(stopped).name == "step-000000007"
    assert fit.main(sft(world, stopped, "resume=never", "overwrite=true")) == 0
    assert "continues" not in capsys.readouterr().out


def test_another_configuration_is_refused_with_both_values(
    world: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ["module.optim.lr=0.5", "data.batch_size=16"]
    message = complaint(capsys, sft(world, stopped, *changed))
    assert "holds a run of another configuration; resume=force continues it" in message
    assert "data.batch_size: int 32 when the run began, int 16 now" in message
    assert "module.optim.lr: float 0.003 when the run began, float 0.5 now" in message
    assert fit.main(sft(world, stopped, "module.optim.lr=0.5", "resume=force")) == 0
    assert "changed: module.optim.lr" in capsys.readouterr().out


def test_harmless_changes_pass(world: Path, unbroken: Path, stopped: Path, tmp_path: Path) -> None:
    moved = shutil.copy(world / "rows.jsonl", tmp_path / "moved.jsonl")
    harmless = ["callbacks.checkpoints.every_steps=4", "trainer.enable_progress_bar=false", f"data.train={moved}"]
    assert fit.main(sft(world, stopped, *harmless)) == 0
    assert crash_runs.differences(stopped, unbroken) == []


# Faults.


def truncate(folder: Path) -> None:
    os.truncate(folder / "state.pt", 1000)


def flip(folder: Path) -> None:
    data = bytearray((folder / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.pt").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "state.pt has 1,000 bytes"),
        (flip, "state.pt has other contents than were written"),
        (lambda folder: (folder / "state.pt").unlink(), "state.pt cannot be read: No such file"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 9, "files": {}}'), "its layout is number 9,"),
    ],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    world: Path, unbroken: Path, stopped: Path, capsys: pytest.CaptureFixture[str], damage: Any, reason: str
) -> None:
    damage(newest(stopped))
    assert fit.main(sft(world, stopped)) == 0
    printed = capsys.readouterr().out
    assert f"step-000000007: not used, {reason}" in printed and "continues from step 6" in printed
    assert crash_runs.differences(stopped, unbroken) == []


def test_without_any_whole_checkpoint_nothing_is_begun(
    world: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in checkpoints.found(stopped / "checkpoints"):
        flip(folder)
    before = sorted(stopped.rglob("*"))
    message = complaint(capsys, sft(world, stopped))
    assert "has no whole checkpoint; overwrite=true begins anew" in message and "step-000000006: not used" in message
    assert sorted(stopped.rglob("*")) == before


def test_a_run_stopped_before_its_first_checkpoint_begins_again(
    world: Path, unbroken: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    assert fit.main(sft(world, stopped)) == 0
    assert "was stopped before its first checkpoint, begins again" in capsys.readouterr().out
    assert crash_runs.differences(stopped, unbroken) == []


def test_a_checkpoint_of_another_model_is_refused(
    world: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "other"
    with stop_at(8):
        assert fit.main(sft(world, run, "module.model.path=" + str(wider(world)))) == interrupt.AGAIN
    shutil.rmtree(newest(stopped))
    shutil.copytree(newest(run), stopped / "checkpoints" / newest(run).name)
    message = complaint(capsys, sft(world, stopped))
    assert "is not of this model" in message and "size mismatch" in message


def wider(world: Path) -> Path:
    """A model of another width."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = world / "wider"
    if not folder.exists():
        config = AutoConfig.from_pretrained(world / "model")
        config.hidden_size = 48
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder)
    return folder


def test_a_data_file_that_changed_is_noticed(
    world: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (world / "rows.jsonl").read_text().splitlines(keepends=True)
    other = tmp_path / "rows.jsonl"
    other.write_text("".join([*lines[1:], lines[0]]))
    command = sft(world, stopped, f"data.train={other}")
    assert f"the examples are not those that the run began with: train ({other})" in complaint(capsys, command)
    assert newest(stopped).name == "step-000000007"
    assert fit.main([*command, "resume=force"]) == 0


def test_a_second_run_on_the_same_folder_is_refused(
    world: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with resume.locked(stopped):
        assert f"is in use by process {os.getpid()} on " in complaint(capsys, sft(world, stopped))
    assert fit.main(sft(world, stopped)) == 0


def mounted(folder: Path, size: str) -> bool:
    """A small file system of its own, where the machine allows it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk_and_a_read_only_one_keep_the_last_checkpoint(
    world: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    if not mounted(disk, "1m"):
        pytest.skip("only root may mount a small file system")
    run, command = disk / "run", sft(world, disk / "run", "callbacks.checkpoints.keep=100")
    try:
        message = complaint(capsys, command, code=1)
        assert "could not be written: No space left on device. Earlier checkpoints are as they were" in message
        good, damaged = checkpoints.newest_good(run / "checkpoints")
        assert good is not None and damaged == []
        subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
        assert fit.main(command) == 0
        assert crash_runs.differences(run, unbroken) == []
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "cannot be" in complaint(capsys, sft(world, disk / "new"))
        assert checkpoints.verify(newest(run)) is None
    finally:
        subprocess.run(["umount", disk], check=True)


class NotANumber(PPOModule):
    """The reward is no number from the second rollout on."""

    def score(self, completions: Completions) -> torch.Tensor:
        scores = super().score(completions)
        return scores if self.global_step == 0 else scores * float("nan")


def test_a_run_killed_while_it_exports_exports_again(world: Path, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:

        def half(self: Any, folder: Path, **_: Any) -> None:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        LlamaForCausalLM.save_pretrained = half  # type: ignore[method-assign]
        fit.main(sft(world, run))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (run / "hf").exists() and not (run / "finished.json").exists()
    assert any(item.name.startswith(".hf") for item in run.iterdir())
    assert fit.main(sft(world, run)) == 0
    assert crash_runs.differences(run, unbroken) == []
    assert not any(item.name.startswith(".") for item in run.iterdir())


def test_a_reward_that_is_no_number_ends_the_run_with_its_name_and_batch(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ppo(world, run, f"module._target_={__name__}.NotANumber")
    message = complaint(capsys, command, code=1)
    assert "the gradient is not finite; the first such tensor is episodes.scores of the batch" in message
    assert "step 3 of this kind in a row" in message
    saved = torch.load(run / "nonfinite" / "step-000000006" / "batch.pt", weights_only=True)
    assert saved["bad"] == "episodes.scores of the batch" and saved["tensors"]["episodes.scores"].isnan().all()
    state = torch.load(newest(run) / "state.pt", weights_only=True)["state_dict"]
    assert all(bool(value.isfinite().all()) for value in state.values())


class Down(PPOModule):
    """A reward from elsewhere, which is not there for a while."""

    def score(self, completions: Completions) -> torch.Tensor:
        if self.global_step > 0 and not (Path(self.trainer.default_root_dir).parent / "up").exists():
            raise ConnectionError("the scorer does not answer")
        return super().score(completions)


def test_a_scorer_that_is_down_costs_no_training(world: Path, tmp_path: Path) -> None:
    command = [f"module._target_={__name__}.Down"]
    assert fit.main(ppo(world, tmp_path / "unbroken")) == 0
    with pytest.raises(ConnectionError):
        fit.main(ppo(world, tmp_path / "run", *command))
    (tmp_path / "up").touch()
    assert fit.main(ppo(world, tmp_path / "run", *command)) == 0
    assert crash_runs.differences(tmp_path / "run", tmp_path / "unbroken") == []


def test_wandb_goes_on_with_the_same_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    command = [word for word in sft(world, run) if word != "loggers.wandb=false"]
    command.append("loggers.wandb={project: align, mode: offline}")
    with stop_at(8):
        assert fit.main(command) == interrupt.AGAIN
    assert fit.main(command) == 0
    identity = (run / "wandb-id.txt").read_text().strip()
    parts = sorted(run.glob("wandb/offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(f"-{identity}") for part in parts)


# The pieces.


def test_the_best_checkpoint_is_kept(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = ["callbacks.checkpoints.monitor=valid/loss", "callbacks.checkpoints.mode=max", "trainer.max_epochs=3"]
    assert fit.main(sft(world, run, *wanted, "callbacks.checkpoints.keep=1")) == 0
    kept = [checkpoints.step_of(folder) for folder in checkpoints.found(run / "checkpoints")]
    assert kept == [18, 6]  # the last, and the one after the first epoch, when the loss was largest
    state = torch.load(newest(run) / "state.pt", weights_only=True)["callbacks"]
    assert [value["best"]["step"] for value in state.values() if "best" in value] == [6]


def test_checkpoints_must_come_at_some_time() -> None:
    with pytest.raises(ValueError, match="keep: got 0"):
        Checkpoints(keep=0)
    with pytest.raises(ValueError, match="every_minutes: got -1"):
        Checkpoints(every_minutes=-1.0)


def test_a_manifest_names_sizes_and_checksums(unbroken: Path) -> None:
    manifest = json.loads((newest(unbroken) / "manifest.json").read_text())
    state = newest(unbroken) / "state.pt"
    assert manifest["step"] == 12 and manifest["files"]["state.pt"]["bytes"] == state.stat().st_size


def test_the_runs_that_are_killed_have_8_bit_state(world: Path) -> None:
    model = load_causal_lm(str(world / "model"))
    assert any(blockwise.pays(parameter.shape) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "workers", "optimizer", "processes", "sharded"),
    [
        ("sft", 2, "adamw", 1, False), ("reward", 0, "adamw", 1, False), ("ppo", 0, "adamw8bit", 1, False),
        ("ppo-ptx", 0, "adamw", 1, False), ("sft", 0, "adamw", 2, True), ("reward", 0, "adamw", 2, False),
        ("ppo-ptx", 0, "adamw", 2, True),
    ],
)  # fmt: skip
def test_a_few_kills_change_no_bit(
    world: Path, kind: str, workers: int, optimizer: str, processes: int, sharded: bool
) -> None:
    variant = crash_test.Variant(kind, workers, optimizer, processes, sharded)
    result = crash_test.crash(variant, world, 3, seed=1)
    assert sum(result.kills.values()) == 3 and result.different == []
