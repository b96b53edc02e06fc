"""The recipes' memory, planned from the shapes of the models they name."""

import re
from pathlib import Path

import pytest

from align import memory
from align.plan import prepared

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "tests" / "shapes"
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "recipes").rglob("*.yaml"))
MODELS = {"sft": ("model",), "reward": ("model",), "ppo": ("policy", "value", "reward")}
PARAMETERS = {"qwen2.5-0.5b": 494_032_768, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496}
"""As their publishers say."""

TRUNK = "llama-3.1-70b"
"""Trained by LoRA, with value and reward model on the policy."""

LORA = 80 * 16 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
"""Rank 16 on all seven matrices of each of its blocks."""

GIB = 2**30


def planned(path: str) -> memory.Plan:
    """The plan of a recipe."""
    recipe, stage = Path(path).parent.name, Path(path).stem
    names = MODELS[stage] if recipe != TRUNK else MODELS[stage][:1]
    module, setting = prepared(str(ROOT / path), [f"module.{name}.path={SHAPES / recipe}" for name in names])
    return memory.plan(module, setting)


def test_each_recipe_has_all_stages() -> None:
    assert {f"configs/recipes/{name}/{stage}.yaml" for name in PARAMETERS for stage in MODELS} <= set(RECIPES)


@pytest.mark.parametrize("path", [path for path in RECIPES if Path(path).parent.name in PARAMETERS])
def test_a_recipe_needs_what_its_header_says(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    claim = re.search(r"^# Memory: at most ([\d.]+) GiB", text, re.MULTILINE)
    device = re.search(r"^# Hardware: .*?(\d+) GB", text, re.MULTILINE)
    assert claim and device
    plan = planned(path)
    assert float(claim[1]) - 0.2 < plan.peak / GIB <= float(claim[1]) < int(device[1]) * 1e9 / GIB
    recipe, stage = Path(path).parent.name, Path(path).stem
    heads = {"qwen2.5-0.5b": 896, "llama-3.1-8b": 4096, TRUNK: 8192}  # in place of the unembedding, which may be tied
    head = heads[recipe] - (0 if recipe == "qwen2.5-0.5b" else 128256 * heads[recipe])
    counts = {share.name: share.parameters for share in plan.shares}
    causal, scalar = PARAMETERS[recipe], PARAMETERS[recipe] + head
    if recipe == TRUNK:
        alone = {"sft": {"model": causal + LORA}, "reward": {"model": scalar + LORA}}
        assert counts == {**alone, "ppo": {"policy": causal + 3 * LORA, "value": 8192, "reward": 8192}}[stage]
        return
    assert (
        counts
        == {
            "sft": {"model": causal},
            "reward": {"model": scalar},
            "ppo": {"policy": causal, "reference": causal, "value": scalar, "reward": scalar},
        }[stage]
    )


def test_the_arithmetic_of_llama_by_hand() -> None:
    """8 B parameters on 8 GPUs: the numbers of docs/scale.md."""
    plan = planned("configs/recipes/llama-3.1-8b/sft.yaml")
    (share,) = plan.shares
    embedding = 128256 * 4096  # and the unembedding as many
    block = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096
    assert 2 * embedding + 32 * block + 4096 == share.parameters
    assert share.weights == pytest.approx(4 * share.parameters / 8, rel=1e-3)
    assert share.gradients == pytest.approx(4 * share.parameters / 8, rel=1e-3)
    # Two moments: of 4 bytes for the embedding, of 1 byte and a float a block of 256 for the rest.
    assert share.optimizer == pytest.approx((8 * embedding + (2 + 8 / 256) * (embedding + 32 * block)) / 8, rel=1e-3)
    assert plan.gathered == 2 * (2 * embedding + 4096) + 2 * 2 * block
    # Of every block the input, of 8,192 tokens x 4,096 numbers in bfloat16; and little else.
    inputs = 32 * 8192 * 4096 * 2
    assert inputs < share.activations < 1.2 * inputs
