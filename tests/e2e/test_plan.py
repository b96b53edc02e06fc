"""`python -m align.plan`: what it needs, what it says, and how it ends."""

import re
from pathlib import Path

import pytest
import tiny
import torch

from align import memory, plan
from align.models import deferred
from align.models.load import load_causal_lm, load_scalar_model, load_tokenizer

YAML = """
run_dir: runs/one
seed: 0
tokenizer: {_target_: align.models.load.load_tokenizer, path: nowhere/tokenizer}
data: {_target_: align.data.demonstrations.DemonstrationData, tokenizer: "${tokenizer}", train: no.jsonl, batch_size: 2,
  max_prompt_tokens: 16, max_response_tokens: 16}
module:
  _target_: align.modules.sft.SFTModule
  tokenizer: ${tokenizer}
  model: {_target_: align.models.load.load_causal_lm, path: shape}
  optim: {_target_: align.optim.Optim, lr: 1.0e-3}
  micro_batch_tokens: 4096
trainer: {max_epochs: 1, accelerator: gpu, precision: bf16-mixed}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration and a model's config.json: no weights, tokenizer or data."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(YAML)
    tiny.llama(hidden_size=64, vocab_size=4096).config.save_pretrained("shape")
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What the command prints."""
    assert plan.main(["c.yaml", *arguments]) == code
    out = capsys.readouterr()
    return out.out if code in (0, plan.TOO_LARGE) else out.err


def test_it_counts_what_fit_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    count = sum(parameter.numel() for parameter in tiny.llama(hidden_size=64, vocab_size=4096).parameters())
    assert (
        f"model: LlamaForCausalLM, {count:,} parameters (adamw); bytes for each: 4 weights + 4 gradients + 8 opt"
        in text
    )
    assert text.startswith("1 process on GPUs; arithmetic: bfloat16\nat once: 4,096 tokens")
    module, setting = plan.prepared("c.yaml", [])
    assert setting == memory.Setting(dtype=torch.bfloat16, gpu=True, reshard=False, tokens=4096)
    assert f"at most {memory.shown(memory.plan(module, setting).peak)} at a time" in text
    assert sorted(item.name for item in folder.iterdir()) == ["c.yaml", "shape"]


def test_what_is_kept_and_what_comes_and_goes_add_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = next(line for line in printed(capsys).splitlines() if line.startswith("while it learns"))
    *parts, total = (float(number) for number in re.findall(r"([\d.]+) MiB", line))
    assert sum(parts) == pytest.approx(total, abs=0.3)


def test_processes_that_share_have_a_part_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("trainer.devices=4", "trainer.num_nodes=2", "trainer.strategy={_target_: align.strategy.FSDP}")
    text = printed(capsys, *words)
    assert "8 processes that share all weights" in text and "shared by 8" in text and "gathered" in text


def test_with_a_limit_it_says_whether_it_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fits in 24 GB (22.35 GiB), with" in printed(capsys, "--memory", "24")
    text = printed(capsys, "--memory=0.1", code=plan.TOO_LARGE)
    found = re.findall(r"^  (\S+).*: at most ([\d.]+) MiB(, fits)?", text, re.MULTILINE)
    assert "does not fit in 0.1 GB (95.4 MiB)" in text
    assert {name for name, _, _ in found} >= {
        "module.micro_batch_tokens=2048",
        "module.model.gradient_checkpointing=true",
    }
    for name, size, fits in found:  # what it promises is what a plan with that change says
        changed = printed(capsys, name, "--memory=0.1", code=0 if fits else plan.TOO_LARGE)
        assert f"at most {size} MiB at a time" in changed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["module.micro_batch_tokens=0"], "expected at least 1"),
        (["module.model.path=nowhere/at/all"], "has no config.json that can be read"),
        (["--memory", "0"], "expected the GB of one device"),
        (["trainer.devices=-1"], "no device on this machine"),
        (["data.train=runs/one/x.jsonl"], "lies in the folder that this run writes"),
    ],
)
def test_mistakes_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert complaint in printed(capsys, *arguments, code=2)


def test_models_have_shapes_alone_inside_and_weights_after(folder: Path) -> None:
    with deferred.shapes():
        model, scalar = load_causal_lm("shape"), load_scalar_model("shape")
        assert load_tokenizer("nowhere").eos_token_id is not None
    assert all(parameter.is_meta for parameter in (*model.parameters(), *scalar.parameters()))
    assert not deferred.only_shapes()
    with pytest.raises(OSError):
        load_causal_lm("shape")
