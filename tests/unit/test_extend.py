"""docs/extend.md and docs/metrics.md keep their word: each example is run as written, each logged name is explained.

The examples and their commands are taken out of the document and run in a folder where tiny models and a few rows of
data stand under the names that configs/ gives them.
"""

import gzip
import importlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from align import fit
from align.models.load import save_model
from align.rollout.sampler import DecodeSampler
from align.types import Rollout

ROOT = Path(__file__).resolve().parents[2]
EXTEND = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

KEEP = f"{{_target_: {__name__}.Keep}}"
SMALL = {
    "ppo": (
        "data.episodes=8", "data.rollout_batch=4", "data.minibatch=2", "data.pretraining_batch=2",
        "module.sampler.max_new_tokens=6", f"callbacks={{keep: {KEEP}}}",
    ),
    "extremes": (
        "data.episodes=8", "data.rollout_batch=4", "data.minibatch=4", "data.pretraining_batch=2",
        "module.sampler.max_new_tokens=6", "callbacks.samples.count=2",
    ),
    "sft": ("data.batch_size=2", f"callbacks={{keep: {KEEP}}}", "trainer.max_epochs=1"),
    "reward": ("data.batch_size=2",),
    "dpo": ("data.batch_size=2", "trainer.max_epochs=2"),
}  # fmt: skip
"""What makes a run of a stage take a moment."""


class Keep(L.Callback):
    """Keeps the rollouts of the latest run, and what became of its data."""

    rollouts: list[Rollout] = []  # noqa: RUF012
    report: dict[str, dict[str, int]] = {}  # noqa: RUF012

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        Keep.rollouts, Keep.report = [], trainer.datamodule.report

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs.get("rollout") is not None:
            Keep.rollouts.append(outputs["rollout"])


def blocks(language: str) -> list[str]:
    """The code blocks of the document, in order."""
    return re.findall(rf"```{language}\n(.*?)```", EXTEND, re.DOTALL)


def command_of(*words: str) -> list[str]:
    """The document's command that contains these words, without `python -m align.fit`."""
    (found,) = [text for text in blocks("sh") if all(word in text for word in words)]
    program, arguments = shlex.split(found)[:3], shlex.split(found)[3:]
    assert program == ["python", "-m", "align.fit"]
    return arguments


def write_data(folder: Path) -> None:
    """A few rows of everything that configs/sft.yaml, reward.yaml and ppo.yaml read."""
    words = [" ".join(f"w{3 + (i * j) % 40}" for j in range(1, 4 + i % 3)) for i in range(1, 7)]
    scores = [[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]]
    rows: dict[str, list[dict[str, Any]]] = {
        "prompts.train": [{"prompt": text, "must_say": ["w1", "w2"]} for text in words],
        "prompts.valid": [{"prompt": text} for text in words],
        "pretraining.train": [{"text": text} for text in words],
        "demonstrations.train": [{"prompt": text, "response": "w5 w6"} for text in words],
        "rankings.train": [
            {"prompt": text, "responses": ["w7", "w8 w9", "w10"], "scores": scores[i % 2], "labeler": f"sim-{i % 2}"}
            for i, text in enumerate(words)
        ],
    }
    rows |= {"demonstrations.valid": rows["demonstrations.train"], "rankings.human.test": rows["rankings.train"]}
    folder.mkdir(parents=True)
    for name, table in rows.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in table)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the document's files, the project's configurations, and tiny models and data under their names."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_data(folder / "runs" / "data")
    for name, model in (("base", tiny.llama()), ("sft", tiny.llama()), ("reward", tiny.scalar_model())):
        save_model(model, tiny.tokenizer(), folder / "runs" / name / "hf")
    (folder / "mine.csv").write_text('prompt,response\nw3 w4,w5\n"w6, w7",w8 w9\nw10,w11\n')
    for text in [*blocks("python"), *blocks("yaml")]:
        first, rest = text.split("\n", 1)
        title = re.fullmatch(r"# (\S+\.(?:py|yaml))(?:: a copy of (\S+) with this added)?", first)
        assert title, f"the block that begins with {first!r} does not say which file it is"
        if title[2]:
            whole = (folder / title[2]).read_text()
            key, added = rest.split("\n", 1)
            assert whole.count(f"\n{key}\n") == 1
            rest = whole.replace(f"\n{key}\n", f"\n{key}\n{added}")
        (folder / title[1]).write_text(rest)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as working directory, where `python -m` finds modules."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    return place


def run(arguments: list[str], small: str, run_dir: str, *more: str) -> Path:
    """Runs a command of the document, made small, and returns the folder it wrote."""
    code = fit.main([*arguments, *SMALL[small], f"run_dir={run_dir}", "loggers.wandb=false", *more])
    assert code == 0 and (Path(run_dir) / "hf" / "config.json").exists()
    return Path(run_dir)


def test_a_reward_that_reads_the_examples(here: Path) -> None:
    run(["configs/ppo.yaml"], "ppo", "plain")
    plain = Keep.rollouts[0]
    run(command_of("must_say"), "ppo", "said")
    said = Keep.rollouts[0]
    assert torch.equal(plain.completions.ids, said.completions.ids)
    spans = zip(said.completions.ids.tolist(), said.completions.prompt_lengths, said.completions.lengths, strict=True)
    words = [{f"w{token}" for token in ids[start:end] if token > tiny.EOS} for ids, start, end in spans]
    points = [sum(any(word.startswith(phrase) for word in row) for phrase in ("w1", "w2")) for row in words]
    assert (said.scores - plain.scores).round(decimals=4).tolist() == points and any(points)


def test_another_advantage(here: Path) -> None:
    run(command_of("leave_one_out"), "ppo", "leave-one-out")
    rollout = Keep.rollouts[1]
    totals = rollout.rewards.sum(1)
    for row, length in enumerate(rollout.completions.response_lengths.tolist()):
        baseline = sum(float(totals[other]) for other in range(4) if other != row) / 3
        for token in range(length):
            to_come = float(rollout.rewards[row, token:].sum())
            assert float(rollout.returns[row, token]) == pytest.approx(to_come, abs=1e-4)
            assert float(rollout.advantages[row, token]) == pytest.approx(to_come - baseline, abs=1e-4)
    assert not rollout.advantages[~rollout.mask].any() and not rollout.returns[~rollout.mask].any()


def test_another_source_of_data(here: Path) -> None:
    run(command_of("csv_data"), "sft", "csv", "data.mix_fraction=0.5")
    assert Keep.report["train"] == {"examples read": 3, "used": 3}
    assert Keep.report["mix"]["used"] == 6


def test_another_sampler(here: Path) -> None:
    folder = run(command_of("plain_sampler"), "ppo", "sampler")
    assert tiny.logged(folder, "policy/ratio_max")[0] == 1.0
    done = Keep.rollouts[0].completions
    last = done.ids.gather(1, done.lengths[:, None] - 1)[:, 0]
    assert torch.equal(done.finished, last == tiny.EOS) and int(done.response_lengths.max()) == 6
    assert set(Keep.rollouts[0].completions.rows[0]) == {"prompt", "must_say"}

    plain = importlib.import_module("plain_sampler").PlainSampler(max_new_tokens=9, temperature=1e-4)
    prompts, model = tiny.prompts([3, 1, 5, 2]), tiny.llama(initializer_range=0.1)
    one, other = plain(model, prompts), DecodeSampler(max_new_tokens=9, temperature=0.0)(model, prompts)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.response_lengths, other.response_lengths)


def test_logging_from_the_rollout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(command_of("with-extremes"), "extremes", "extremes")
    scores = tiny.logged(folder, "rollout/score")
    low, high = (tiny.logged(folder, f"rollout/score_{name}") for name in ("min", "max"))
    assert len(low) == len(high) == len(scores) == 2
    assert all(a < mean < b for a, mean, b in zip(low, scores, high, strict=True))
    printed = re.findall(r"rollout (\d), lowest score (-?[\d.]+): w", capsys.readouterr().out)
    assert printed == [(str(number), f"{value:.2f}") for number, value in enumerate(low)]
    assert (folder / "rollouts.jsonl").exists() and (folder / "hf-ema").is_dir()


def test_a_new_objective(here: Path) -> None:
    folder = run(command_of("dpo"), "dpo", "dpo")
    losses = tiny.logged(folder, "train/loss")
    assert losses[0] == pytest.approx(math.log(2.0)) and losses[-1] < losses[0]
    trained = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert not torch.equal(next(trained.parameters()), next(tiny.llama().parameters()))


def test_every_example_is_run_here() -> None:
    files = {text.split("\n", 1)[0] for text in blocks("python")}
    assert len(files) == len(blocks("python")) == 6 and len(blocks("sh")) == 6 and len(blocks("yaml")) == 2
    hooks = re.findall(r"^\| [^|]+ \| [^|`]+`([\w.]+)", EXTEND, re.MULTILINE)
    titles = re.findall("^## ", EXTEND, re.MULTILINE)
    assert len(hooks) == len(titles) == 6


def test_metrics_md_explains_exactly_what_is_logged(here: Path) -> None:
    folders = [run([f"configs/{name}.yaml"], name, f"logged-{name}") for name in ("sft", "reward", "ppo")]
    headers = [(folder / "metrics.csv").read_text().split("\n", 1)[0].split(",") for folder in folders]
    logged = {re.sub(r"^valid/accuracy/.*", "valid/accuracy/NAME", name) for header in headers for name in header}
    tables = re.search(r"## While training\n(.*?)\n## ", METRICS, re.DOTALL)
    assert tables
    explained = re.findall(r"^\| `([^`]+)`", tables[1], re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert logged - {"epoch", "step"} == set(explained)
