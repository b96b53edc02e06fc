"""LoRA, weights in few bits and shared trunks, through the commands: stage after stage, sharded, resumed, exported."""

import shutil
from pathlib import Path

import pytest
import torch
from e2e.test_ranks import assert_same, go_back, weights
from peft import PeftModel
from safetensors.torch import load_file
from several import EXACT
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align import checkpoints, export, fit
from align.models.load import load_scalar_model
from tools import crash_runs

LORA = "{_target_: align.models.adapters.LoRA, rank: 4, alpha: 16}"
ADAPTER = "{_target_: align.models.trunk.Adapter, path: %s}"
SHARDED = ["trainer.devices=2", "trainer.strategy={_target_: align.strategy.FSDP}", "module.micro_batch_tokens=300"]
KINDS = ("sft", "reward", "ppo-ptx", "ppo-ptx-4bit", "ppo-ptx-head")
SHARED = ("reward", "ppo-ptx-4bit", "ppo-ptx-head")
"""What two processes train: LoRA and a head; adapters on weights in 4 bits; a head on the policy."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and text."""
    folder = tmp_path_factory.mktemp("world")
    crash_runs.prepare(folder)
    return folder


def command(kind: str, world: Path, run: Path, *overrides: str) -> list[str]:
    """A run: LoRA in SFT and reward stage; in PPO all on one trunk, in 4 bits too; or a value head on the policy.

    The reward stage, and PPO in 4 bits, adapt the last block alone.
    """
    words = crash_runs.arguments(kind[:7], world, 0)
    keep = ["callbacks.checkpoints.keep=99", f"run_dir={run}", "module.optim.lr=1e-2", EXACT]
    if kind in ("ppo-ptx", "ppo-ptx-head"):
        keep.append("module.policy.trained_blocks=null")
    if kind == "sft":
        words += [f"module.model.lora={LORA}", "module.model.dropout=0", "data.mix=null", "data.mix_fraction=0"]
    elif kind == "reward":
        words += [f"module.model.lora={LORA}"]
    elif kind == "ppo-ptx-head":
        words += [
            "module.value={_target_: align.models.trunk.Head}", "module.ppo.value_coef=0.1",
            "module.reward.quantise=8bit", "module.quantise_reference=4bit", "module.optim.lr=1e-3",
        ]  # fmt: skip
    else:
        reward = ADAPTER % (world / "reward" / "hf")
        words += [f"module.policy.lora={LORA}", f"module.value={reward}", f"module.reward={reward}"]
        words += ["module.policy.quantise=4bit"] if kind == "ppo-ptx-4bit" else []
    return [*words, *keep, *overrides]


@pytest.fixture(scope="module")
def alone(world: Path) -> dict[str, Path]:
    """Each kind of run on one process."""
    runs = {kind: world / kind for kind in KINDS}
    for kind, run in runs.items():
        assert fit.main(command(kind, world, run)) == 0
    return runs


def test_what_is_exported_is_plain_and_the_adapter_is_peft_s(world: Path, alone: dict[str, Path]) -> None:
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    merged = AutoModelForCausalLM.from_pretrained(alone["sft"] / "hf")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world / "model"), alone["sft"] / "hf/adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-4)
        assert float((merged(ids).logits - base(ids).logits).abs().max()) > 0.1
    own = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=1)
    scored = PeftModel.from_pretrained(own, alone["reward"] / "hf/adapter")
    with torch.no_grad():
        theirs = scored.base_model.model.score(scored.base_model.model.model(ids).last_hidden_state)
        reward = load_scalar_model(str(alone["reward"] / "hf"))
        ours = reward.hf.score(reward.hf.base_model(ids).last_hidden_state)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert reward.bias != 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_only_what_learns(alone: dict[str, Path], kind: str) -> None:
    state = checkpoints.read(checkpoints.found(alone[kind] / "checkpoints")[0])["state_dict"]
    if kind == "ppo-ptx-head":
        assert {name.partition(".")[0] for name in state} == {"policy", "value"}
        assert [name for name in state if name.startswith("value.")] == ["value.projection.weight"]
    else:
        assert all(".lora_" in name or "score" in name or "projection" in name for name in state)
        assert any(".layers.0." in name for name in state) == (kind in ("sft", "ppo-ptx"))
        assert not any(".reward." in name for name in state)


@pytest.mark.parametrize("kind", SHARED)
def test_two_processes_that_share_weights_train_what_one_trains(
    world: Path, alone: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    assert fit.main(command(kind, world, tmp_path / "run", *SHARDED)) == 0
    assert_same(tmp_path / "run", alone[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_to_the_same_bits_and_exports_from_its_checkpoint(
    world: Path, alone: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone[kind], run)
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    own, theirs = load_file(tmp_path / "out" / "model.safetensors"), weights(alone[kind])
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in theirs)
    if kind != "ppo-ptx-head":
        files = [folder / "adapter/adapter_model.safetensors" for folder in (tmp_path / "out", run / "hf")]
        assert files[0].read_bytes() == files[1].read_bytes()
    go_back(run, 4)
    assert fit.main(command(kind, world, run)) == 0
    assert crash_runs.differences(run, alone[kind]) == []


def test_an_adapter_of_another_model_is_refused(
    world: Path, alone: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("ppo-ptx", world, tmp_path / "run", f"module.policy.path={alone['sft'] / 'hf'}")
    assert fit.main(words) == 2
    message = capsys.readouterr().err
    assert "was trained on" in message and str(world / "model") in message and "Traceback" not in message
    words = command("ppo-ptx", world, tmp_path / "run", f"module.value={ADAPTER % (world / 'model')}")
    assert fit.main(words) == 2
    assert "was not trained with LoRA" in capsys.readouterr().err
    words = command("ppo-ptx", world, tmp_path / "run", "module.policy.lora=null")
    assert fit.main(words) == 2
    assert "needs a policy with frozen weights" in capsys.readouterr().err
    words = command("sft", world, tmp_path / "run", "module.model.lora=null", "module.model.quantise=8bit")
    assert fit.main(words) == 2
    assert "has no weight that learns" in capsys.readouterr().err
