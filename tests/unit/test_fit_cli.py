"""`python -m align.fit`: what a run leaves behind, what it says, and how it ends after a mistake."""

import csv
import gc
import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

import align
from align import cli, fit, loggers, schema

HERE = __name__


class Numbers(LightningDataModule):
    """Four batches of two ones."""

    def __init__(self, *, count: int = 8, broken: bool = False) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count, self.broken = count, broken

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches of two."""
        if self.broken:
            schema.find_target("no dotted path")
        return DataLoader(torch.ones(self.count, 1), batch_size=2)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The same."""
        return self.train_dataloader()


class Constant(LightningModule):
    """Learns one number w from 0 with loss w - 1's square: each step of lr 1/4 halves the distance to 1."""

    def __init__(self, *, lr: float = 0.25, fails: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.lr, self.fails = lr, fails

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """One step of gradient descent."""
        if self.fails:
            raise ValueError("a bug in the user's own module")
        optimizer: Any = self.optimizers()
        loss = (self.w - batch).square().mean()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.log("train/loss", loss, prog_bar=True)
        return {"metrics": {}, "rollout": None}

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs the loss."""
        self.log("valid/loss", (self.w - batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def export(self, folder: Path) -> None:
        """Writes the number."""
        Path(folder, "w.txt").write_text(str(self.w.item()))


class Unexportable(LightningModule):
    """Has no export."""


YAML = f"""
run_dir: runs/one
seed: 0
data: {{_target_: {HERE}.Numbers}}
module: {{_target_: {HERE}.Constant}}
trainer: {{max_epochs: 2, accelerator: cpu}}
loggers: {{csv: true, wandb: false}}
"""

HALVES = [1.0, 0.25, 0.0625, 0.015625, 2**-8, 2**-10, 2**-12, 2**-14]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    Path("c.yaml").write_text(YAML)
    return tmp_path


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a failing command prints to stderr."""
    assert fit.main(["c.yaml", *arguments]) == 2
    return capsys.readouterr().err


def test_a_run_leaves_one_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(["c.yaml", "--seed=3", "module.lr=25e-2"]) == 0
    run = folder / "runs" / "one"
    names = sorted(item.name for item in run.iterdir())
    assert names == ["checkpoints", "config.yaml", "finished.json", "hf", "metrics.csv"]
    assert (run / "hf" / "w.txt").read_text() == str(1 - 2**-8)

    rows = rows_of(run / "metrics.csv")
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == HALVES
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(8))
    assert [float(row["valid/loss"]) for row in rows if row["valid/loss"]] == [2**-8, 2**-16]

    config = OmegaConf.load(run / "config.yaml")
    assert (config.seed, config.module.lr) == (3, 0.25)

    assert os.listdir(run / "checkpoints") == ["step-000000008"]
    saved = torch.load(run / "checkpoints" / "step-000000008" / "state.pt", weights_only=True)
    assert saved["global_step"] == 8 and saved["optimizer_states"]

    printed = capsys.readouterr().out
    assert "runs/one: Constant with 0.00 M trainable parameters on cpu" in printed
    assert "model in runs/one/hf, metrics in runs/one/metrics.csv" in printed
    assert not list(run.glob(".*"))


def test_wandb_runs_offline_without_a_key(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert fit.main(["c.yaml", "loggers.wandb={project: trial}", "trainer.max_epochs=1"]) == 0
    (record,) = (folder / "runs" / "one" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"train/loss" in content and b"test_fit_cli.Constant" in content and b"trial" in content
    sync = re.search(r"wandb sync (\S+)", capsys.readouterr().out)
    assert sync and Path(sync[1]) == record.parent.relative_to(folder)


def test_a_key_is_found_in_netrc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not loggers._has_wandb_key()
    (folder / "no-netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert loggers._has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not loggers._has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert loggers._has_wandb_key()


def test_a_used_folder_is_kept_unless_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(["c.yaml", "trainer.max_epochs=1"]) == 0
    Path("runs/one/hf/old.txt").write_text("old")
    message = complaint(capsys, "resume=never")
    assert "run_dir: runs/one exists and is not empty; overwrite=true deletes that run" in message
    message = complaint(capsys)
    assert "run_dir: runs/one holds a run of another configuration; resume=force continues it" in message
    assert "trainer.max_epochs: int 1 when the run began, int 2 now" in message
    assert Path("runs/one/hf/old.txt").exists()
    assert fit.main(["c.yaml", "overwrite=true", "trainer.max_epochs=1"]) == 0
    assert not Path("runs/one/hf/old.txt").exists()


def test_a_kill_while_the_configuration_is_written_leaves_a_folder_to_use(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.a1b2c3_d").write_text("half")
    cli.put_back_earlier(tmp_path)
    assert not any(tmp_path.iterdir())
    for name in (".config.yaml.a1b2c3_d", "notes.txt"):
        (tmp_path / name).write_text("a user's")
    cli.put_back_earlier(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("moment", ["making room", "before the first step", "deleting"])
def test_a_kill_while_overwriting_loses_no_run(tmp_path: Path, moment: str) -> None:
    def a_run(folder: Path, text: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(f"{cli.MARK}: {text}")

    run = tmp_path / "run"
    if moment == "making room":
        a_run(run, "earlier")
        (tmp_path / ".run.earlier.x1").mkdir()
    elif moment == "before the first step":
        a_run(run, "new")
        a_run(tmp_path / ".run.earlier.x1", "earlier")
    else:
        a_run(run, "new")
        a_run(tmp_path / "..run.earlier.x1.y2", "half deleted")
    cli.put_back_earlier(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    left = (run / "config.yaml").read_text()
    assert left == f"{cli.MARK}: {'new' if moment == 'deleting' else 'earlier'}"


def test_overwrite_deletes_only_run_folders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = Path("runs/one/precious.txt")
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert "no run of align made it" in complaint(capsys)
    assert "it holds no config.yaml written by align" in complaint(capsys, "overwrite=true")
    Path("runs/one/config.yaml").write_text("seed: 0\n")
    assert "it holds no config.yaml written by align" in complaint(capsys, "overwrite=true")
    assert precious.read_text() == "mine"


def test_overwrite_spares_other_runs_and_the_working_directory(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Path("runs/one/deep/other")
    inner.mkdir(parents=True)
    for run in (inner, Path("runs/one")):
        (run / "config.yaml").write_text(cli.MARK)
    assert "it holds another run, deep/other" in complaint(capsys, "overwrite=true")
    (inner / "config.yaml").unlink()
    (folder / "runs" / "one" / "c.yaml").write_text(YAML)
    monkeypatch.chdir(folder / "runs" / "one")
    assert "working directory" in complaint(capsys, "overwrite=true", f"run_dir={folder}/runs/one")


def test_a_folder_of_a_run_that_never_began_is_used_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data: count must be at least 1, got 0" in complaint(capsys, "data.count=0")
    assert not Path("runs").exists()
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/config.yaml").write_text(cli.MARK)  # as a run leaves it that is killed while it reads its data
    assert fit.main(["c.yaml", "trainer.max_epochs=1"]) == 0


def test_a_file_in_the_place_of_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    Path("runs/one").write_text("")
    assert "is a file" in complaint(capsys)


def test_a_bug_keeps_its_traceback(folder: Path) -> None:
    with pytest.raises(ValueError, match="a bug in the user's own module"):
        fit.main(["c.yaml", "module.fails=true"])


def test_several_mistakes_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, "seed=x", "trainer.devices=0")
    assert message.startswith("python -m align.fit c.yaml: 2 errors\n  - seed: ")


def test_no_command_line_prints_usage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fit.main([])
    assert ended.value.code == 2
    assert "usage: python -m align.fit CONFIG [key=value ...]" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fit.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and "--key=value" in printed and "overwrite=true" in printed


def test_the_order_of_overrides_is_kept(folder: Path) -> None:
    path, overrides = cli.parse(["c.yaml", "a=1", "--a=2", "a=3"], prog="p", description="", epilog="")
    assert (path, overrides) == ("c.yaml", ["a=1", "--a=2", "a=3"])


def test_a_mistake_found_by_the_package_while_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "  - expected a dotted path" in complaint(capsys, "data.broken=true")


def test_a_module_without_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, f"module={{_target_: {HERE}.Unexportable}}")
    assert "module: Unexportable has no method export(folder)" in message


def test_what_lightning_refuses_is_a_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "trainer: " in complaint(capsys, "trainer.limit_train_batches=-3")


def test_a_failed_export_leaves_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(self: Constant, folder: Path) -> None:
        Path(folder, "half.txt").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(Constant, "export", export)
    with pytest.raises(RuntimeError, match="disk full"):
        fit.main(["c.yaml"])
    assert sorted(os.listdir("runs/one")) == ["checkpoints", "config.yaml", "metrics.csv"]


def test_own_callbacks_are_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 4, save_top_k: -1}"
    Path("c.yaml").write_text(YAML + f"callbacks:\n  checkpoint: {checkpoint}\n  nothing: null\n")
    assert fit.main(["c.yaml", "trainer.enable_progress_bar=false"]) == 0
    saved = ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "step-000000008"]
    assert sorted(os.listdir("runs/one/checkpoints")) == saved
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_progress_does_not_flood_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(["c.yaml", "data.count=400", "trainer.limit_val_batches=0", "trainer.max_epochs=1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "/200 [" in line]
    assert len(lines) <= 4
    assert re.search(r"^Epoch 1/1: 200/200 \[\d\d:\d\d<00:00, .*(step/s|s/step), train/loss=", lines[-1])


def test_training_that_stops_within_an_epoch_is_saved(folder: Path) -> None:
    assert fit.main(["c.yaml", "trainer.max_steps=6"]) == 0
    assert os.listdir("runs/one/checkpoints") == ["step-000000006"]


def test_the_written_configuration_runs_again(folder: Path) -> None:
    assert fit.main(["c.yaml"]) == 0
    assert fit.main(["runs/one/config.yaml", "run_dir=runs/two"]) == 0
    assert Path("runs/two/metrics.csv").read_text() == Path("runs/one/metrics.csv").read_text()


@pytest.mark.parametrize("started", ["-m align.fit", "-u -m align.plan", "-m mine.train", "train.py", "-c pass"])
def test_garbage_waits_only_while_a_command_is_imported(started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["-m" if "-m" in started else started])
    monkeypatch.setattr("sys.orig_argv", ["python", *started.split(), "a.yaml", "align.x=1"])
    try:
        importlib.reload(align)
        assert gc.isenabled() == ("align" not in started)
        frozen = gc.get_freeze_count()
        assert cli.guarded(lambda: int(gc.isenabled()), "a command") == 1
        assert (gc.get_freeze_count() > frozen) == ("align" in started)
    finally:
        gc.unfreeze()
        gc.enable()
