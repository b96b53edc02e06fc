"""SFT: the loss is a mean over the batch's tokens, however it is cut; one batch is one optimizer step."""

from math import cos, pi
from pathlib import Path

import pytest
import tiny
import torch

from align.data.demonstrations import DemonstrationData
from align.modules.sft import SFTModule
from align.optim import Optim
from align.types import Sequences

ROWS = [
    {"prompt": f"w{3 + i} w{4 + i}", "response": " ".join(f"w{9 + i + j}" for j in range(1 + i % 4))} for i in range(10)
]


def module(micro_batch_tokens: int = 1000, **optim: object) -> SFTModule:
    settings = Optim(**{"lr": 1e-3, **optim})  # type: ignore[arg-type]
    return SFTModule(
        model=tiny.llama(), tokenizer=tiny.tokenizer(), optim=settings, micro_batch_tokens=micro_batch_tokens
    )


def batch() -> Sequences:
    episodes = tiny.completions([3, 9, 1, 5, 2], [4, 1, 7, 5, 3])
    return Sequences(ids=episodes.ids, lengths=episodes.lengths, mask=episodes.token_mask)


def data(**changes: object) -> DemonstrationData:
    settings = {"train": ROWS, "batch_size": 4, "max_prompt_tokens": 9, "max_response_tokens": 9}
    return DemonstrationData(tokenizer=tiny.tokenizer(), **{**settings, **changes})  # type: ignore[arg-type]


def test_loss_is_the_mean_over_all_marked_tokens() -> None:
    sft, text = module(), batch()
    logits = sft.model(text.ids).logits[:, :-1]
    targets = torch.where(text.mask, text.ids, -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets)
    ((loss, stats),) = sft.losses(text)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert float(stats["train/loss"]) == float(loss)


@pytest.mark.parametrize("budget", [1, 10, 20])
def test_micro_batches_do_not_change_the_gradient(budget: int) -> None:
    whole, cut = module(), module(micro_batch_tokens=budget)
    assert len(list(cut.losses(batch()))) > 1
    tiny.assert_same_gradients(tiny.gradients(cut, cut.losses(batch())), tiny.gradients(whole, whole.losses(batch())))


def test_one_batch_is_one_optimizer_step_on_a_cosine(tmp_path: Path) -> None:
    sft = module(micro_batch_tokens=1, schedule="cosine", final_fraction=0.1)
    trainer = tiny.fit(sft, data(), tmp_path, max_epochs=2)
    assert trainer.global_step == 6  # two epochs of ten rows, four a batch
    expected = [1e-3 * (0.1 + 0.9 * (1 + cos(pi * step / 6)) / 2) for step in range(6)]
    assert tiny.logged(tmp_path, "lr/model") == pytest.approx(expected, rel=1e-4)


def test_the_step_clips_and_moves_weights_by_the_learning_rate(tmp_path: Path) -> None:
    sft = module(max_grad_norm=0.5, epsilon=1e-12)
    before = sft.model.lm_head.weight.detach().clone()
    tiny.fit(sft, data(batch_size=10), tmp_path)
    moved = (sft.model.lm_head.weight - before).abs()
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is lr · sign(g), whatever the norm
    assert tiny.logged(tmp_path, "grad_norm/model")[0] > 0.5


def test_validation_counts_every_token_once(tmp_path: Path) -> None:
    sft = module(lr=0.0)
    split = data(valid=ROWS, valid_batch_size=3)
    tiny.fit(sft, split, tmp_path)
    everything = split.collate(split.encoded["valid"])
    sft.eval()
    ((loss, _),) = sft.losses(everything)
    hits = sft.model(everything.ids).logits[:, :-1].argmax(-1) == everything.ids[:, 1:]
    assert tiny.logged(tmp_path, "valid/loss") == [pytest.approx(float(loss), rel=1e-5)]
    assert tiny.logged(tmp_path, "valid/perplexity") == [pytest.approx(float(loss.exp()), rel=1e-4)]
    accuracy = hits[everything.mask[:, 1:]].float().mean()
    assert tiny.logged(tmp_path, "valid/accuracy") == [pytest.approx(float(accuracy), abs=1e-6)]


def test_dropout_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        sft = module()
        sft.model.model.layers[0].mlp.register_forward_hook(lambda m, i, out: torch.nn.functional.dropout(out, 0.5))
        torch.manual_seed(len(losses))  # left-over state must not matter
        folder = tmp_path / str(len(losses))
        tiny.fit(sft, data(), folder)
        losses.append(tiny.logged(folder, "train/loss"))
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_weight_decay_is_of_matrices_only() -> None:
    optimizer, _ = Optim(lr=1.0, weight_decay=0.3).build({"model": tiny.gpt2()}, steps=1)
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {1: 0.0, 2: 0.3}


def test_warmup_rises_linearly_and_linear_decay_ends_at_its_fraction() -> None:
    optim = Optim(lr=1.0, schedule="linear", final_fraction=0.2, warmup_steps=4, warmup_from=0.1)
    assert [optim.fraction(step, 8) for step in (0, 2, 4, 6, 8)] == pytest.approx([0.1, 0.55, 1.0, 0.6, 0.2])
    assert Optim(lr=1.0).fraction(7, 8) == 1.0
