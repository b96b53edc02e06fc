"""The whole chain through its commands and shipped YAMLs, cut short: from data to the table."""

import csv
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align import evaluate, fit, sample
from tools.e2e import label, prepare

REPOSITORY = Path(__file__).parents[2]
QUIET = ["loggers.wandb=false", "trainer.enable_progress_bar=false"]
SHORT = [*QUIET, "trainer.limit_train_batches=6", "trainer.limit_val_batches=2", "trainer.max_epochs=1"]
ROWS = 400


def run(main: object, *words: str) -> None:
    assert main([*words]) == 0  # type: ignore[operator]


def rows(path: Path) -> list[dict[str, object]]:
    raw = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines()]


def keep_first(path: Path, count: int) -> None:
    with gzip.open(path, "rt") as file:
        lines = file.readlines()[:count]
    with gzip.open(path, "wt") as file:
        file.writelines(lines)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage ran, each from what the one before it left."""
    here = tmp_path_factory.mktemp("chain")
    shutil.copytree(REPOSITORY / "configs", here / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        prepare.main(["--out", "runs/data"])
        for file in (here / "runs" / "data").glob("*.jsonl.gz"):
            keep_first(file, ROWS if "human" not in file.name else 10**6)
        run(fit.main, "configs/base.yaml", *SHORT)
        run(fit.main, "configs/sft.yaml", *SHORT, "callbacks.samples.every=3")
        run(sample.main, "configs/sample.yaml", "limit=40", "sampler.max_new_tokens=12")
        label_words = ["runs/samples/samples.jsonl", "runs/data/rankings.train.jsonl.gz"]
        label.main([*label_words, "--human", "runs/data/rankings.human.train.jsonl.gz"])
        run(fit.main, "configs/reward.yaml", *SHORT)
        small = ["data.episodes=32", "data.rollout_batch=16", "data.minibatch=8", "data.pretraining_batch=4"]
        small += ["module.sampler.max_new_tokens=12", "callbacks.samples.count=5", "callbacks.samples.every=2"]
        run(fit.main, "configs/ppo.yaml", *QUIET, *small)
        plain = ["run_dir=runs/ppo", "module.ppo.ptx_coef=0", *small, "data.pretraining_batch=0"]
        run(fit.main, "configs/ppo.yaml", *QUIET, *plain)
        few = ["limit=30", "max_texts=30", "resamples=50", "samplers.greedy.max_new_tokens=12"]
        run(evaluate.main, "configs/evaluate.yaml", *few, "samplers.sampled.max_new_tokens=12")
    return here / "runs"


def metrics(folder: Path) -> dict[str, list[float]]:
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in table if row[name]] for name in table[0]}


@pytest.mark.parametrize("stage", ["base", "sft", "reward", "ppo", "ppo-ptx"])
def test_every_run_leaves_one_complete_folder(runs: Path, stage: str) -> None:
    names = {path.name for path in (runs / stage).iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "hf"} <= names
    assert AutoTokenizer.from_pretrained(runs / stage / "hf").eos_token == "<eos>"
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(runs / stage / "hf")
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_stages_hand_over_by_folder(runs: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(runs / "sft" / "hf")
    policy = AutoModelForCausalLM.from_pretrained(runs / "ppo" / "hf")
    moved = [float((a - b).abs().max()) for a, b in zip(reference.parameters(), policy.parameters(), strict=True)]
    assert 0.0 < max(moved) < 0.01  # four small steps from the SFT model


def test_ppo_starts_at_its_reference_and_logs_everything(runs: Path) -> None:
    found = metrics(runs / "ppo-ptx")
    assert found["rollout/kl"][0] == 0.0 and len(found["rollout/kl"]) == 2
    assert found["policy/ratio_max"][0] == 1.0 and len(found["policy/ratio_max"]) == 4
    assert len(found["ptx/loss"]) == 4 and "ptx/loss" not in metrics(runs / "ppo")
    assert (runs / "ppo-ptx" / "hf-ema" / "model.safetensors").exists()
    assert len(rows(runs / "ppo-ptx" / "samples.jsonl")) == 5 * 3  # before, after steps 2 and 4


def test_the_reward_model_is_centred_on_demonstrations(runs: Path) -> None:
    config = json.loads((runs / "reward" / "hf" / "config.json").read_text())
    assert config["reward_bias"] != 0.0
    found = metrics(runs / "reward")
    assert 0.0 <= found["valid/accuracy"][-1] <= 1.0 and len(found["train/loss"]) == 3  # of 6 steps


def test_labels_mix_people_and_programs(runs: Path) -> None:
    labelers = {str(row["labeler"]) for row in rows(runs / "data" / "rankings.train.jsonl.gz")}
    assert any(name.startswith("sim") for name in labelers) and any(not name.startswith("sim") for name in labelers)


def test_the_table_names_every_model(runs: Path) -> None:
    table = (runs / "evaluate" / "table.md").read_text()
    assert all(name in table for name in ("base", "SFT", "PPO", "PPO-ptx", "people"))


def test_the_same_command_gives_the_same_bits(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    first = (runs / "sft" / "hf" / "model.safetensors").read_bytes()
    run(fit.main, "configs/sft.yaml", *SHORT, "callbacks.samples.every=3", "run_dir=runs/sft-again")
    assert (runs / "sft-again" / "hf" / "model.safetensors").read_bytes() == first


def test_a_mistake_ends_with_code_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "align.fit", "configs/sft.yaml", "modul.lr=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "python -m align.fit configs/sft.yaml: 1 error"
    assert "did you mean 'module'?" in done.stderr
    assert "Traceback" not in done.stderr
