"""K answers a prompt: what is written is right, repeatable, and refused with a reason where it cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel

from align import sample
from align.types import Completions, Prompts

ROWS = [
    {"prompt": "w5 w6", "category": "a", "scores": [1.0], "ranking": [1]},
    {"prompt": "w7", "category": "b"},
    {"prompt": "w8 w9 w10 w11", "category": "c"},
]


class Echo:
    """Answers with the last token of the prompt and EOS."""

    temperature = 1.0

    def __call__(self, policy: PreTrainedModel, prompts: Prompts) -> Completions:
        last = prompts.ids[torch.arange(len(prompts.rows)), prompts.lengths - 1]
        ids = torch.cat([prompts.ids, torch.zeros(len(last), 2, dtype=torch.long)], dim=1)
        rows = torch.arange(len(last))
        ids[rows, prompts.lengths] = last
        ids[rows, prompts.lengths + 1] = tiny.EOS
        two = torch.full_like(prompts.lengths, 2)
        return Completions(ids, prompts.lengths, two, torch.ones(len(last), dtype=torch.bool), prompts.rows)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A configuration of a run on a tiny model that often ends its answers."""
    model = tiny.llama(seed=1, initializer_range=0.02)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "out": str(tmp_path / "new" / "out.jsonl"),
        "seed": 0,
        "tokenizer": {"_target_": "align.models.load.load_tokenizer", "path": str(tmp_path / "model")},
        "model": {"_target_": "align.models.load.load_causal_lm", "path": str(tmp_path / "model")},
        "prompts": str(tmp_path / "prompts.jsonl"),
        "sampler": {"_target_": "align.rollout.sampler.DecodeSampler", "max_new_tokens": 30, "temperature": 1.0},
        "k": 4,
        "max_prompt_tokens": 16,
        "batch": 2,
    }


def run(config: dict[str, Any], tmp_path: Path, *overrides: str) -> int:
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    return sample.main([str(tmp_path / "config.yaml"), *overrides])


def written(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(config["out"]).read_text().splitlines()]


def test_rows_keep_their_fields_and_order_and_get_k_answers(config: dict[str, Any], tmp_path: Path) -> None:
    assert run(config, tmp_path) == 0
    rows = written(config)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    assert [row["category"] for row in rows] == ["a", "b", "c"]
    assert all(set(row) == {"prompt", "category", "responses", "finished"} for row in rows)  # no stale scores
    for row in rows:
        assert len(row["responses"]) == len(row["finished"]) == 4
        for text, finished in zip(row["responses"], row["finished"], strict=True):
            assert "<" not in text and len(text.split()) <= 30 - finished  # special tokens are no words
    finished = [flag for row in rows for flag in row["finished"]]
    assert any(finished) and not all(finished)


def test_the_answers_of_a_prompt_are_different_draws(config: dict[str, Any], tmp_path: Path) -> None:
    assert run(config, tmp_path) == 0
    assert all(len(set(row["responses"])) == 4 for row in written(config))


def test_every_answer_belongs_to_its_prompt(config: dict[str, Any], tmp_path: Path) -> None:
    config["sampler"] = {"_target_": "test_sample.Echo"}
    assert run(config, tmp_path) == 0
    assert [row["responses"] for row in written(config)] == [["w6"] * 4, ["w7"] * 4, ["w11"] * 4]


def test_the_output_is_a_function_of_the_configuration(config: dict[str, Any], tmp_path: Path) -> None:
    texts = {}
    for name, overrides in {"first": [], "again": [], "other": ["seed=1"]}.items():
        torch.manual_seed(len(texts))
        assert run(config, tmp_path, *overrides) == 0
        texts[name] = Path(config["out"]).read_bytes()
    assert texts["first"] == texts["again"] != texts["other"]


def test_sampling_leaves_the_default_generator_alone(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert run(config, tmp_path) == 0
    assert torch.equal(torch.rand(3), expected)


def test_limit_and_max_prompt_tokens_choose_the_prompts(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path, "limit=2", "--k=1") == 0
    assert [row["category"] for row in written(config)] == ["a", "b"]
    assert run(config, tmp_path, "max_prompt_tokens=2") == 0
    assert [row["category"] for row in written(config)] == ["a", "b"]
    out = capsys.readouterr().out
    assert "4 answers a prompt: 8/8 answers" in out and "2 prompts with 4 answers" in out


def test_mistakes_are_reported_together_with_exit_code_2(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config |= {"k": 0, "out": "answers.txt", "prompts": str(tmp_path / "nothing.jsonl"), "batch": "many"}
    assert run(config, tmp_path) == 2
    error = capsys.readouterr().err
    assert "4 errors" in error and "Traceback" not in error
    for part in ("k: got 0", "out: got 'answers.txt'", "nothing.jsonl does not exist", "batch: expected int"):
        assert part in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.temperature=0"], "k: got 4"),
        (["limt=3"], "did you mean 'limit'"),
        (["limit=-1"], "limit: got -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert run(config, tmp_path, *overrides) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_never_replaced_by_their_answers(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path, f"out={config['prompts']}") == 2
    assert "would be replaced" in capsys.readouterr().err
    assert len(Path(config["prompts"]).read_text().splitlines()) == 3
