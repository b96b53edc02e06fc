"""Answers behind one prompt in one pass, against a pass of its own for each."""

import pytest
import tiny
import torch
from torch import Tensor

from align.models import attention, forward, packed, shared, trials
from align.models.attention import use_attend
from align.models.dense import LONGEST
from align.models.heads import ScalarModel
from align.models.trunk import Head
from align.modules.reward import RewardModule
from align.optim import Optim

PROMPTS = torch.tensor([0, 0, 0, 1, 2, 2, 5])
"""Three answers, one, two that begin alike too, one."""


def sequences() -> tuple[Tensor, Tensor]:
    """Of these prompts, right-padded with a token that means something elsewhere."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 7, 12, 5, 6, 8, 4])
    ids = torch.randint(3, tiny.VOCAB, (7, 12), generator=generator)
    ids[1:3, :4], ids[5, :5] = ids[0, :4], ids[4, :5]
    ids[1, 4], ids[2, 4] = (ids[0, 4] + 1) % 40, (ids[0, 4] + 2) % 40
    return torch.where(torch.arange(12) < lengths[:, None], ids, 7), lengths


def scalar(family: str) -> ScalarModel:
    """A head on a model of the family that reads shared prompts if any does."""
    model = tiny.families()[family]
    use_attend(model)
    made = Head().on(model, "value", trained=True)
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(1))
    return made


def test_each_prompt_is_laid_out_once() -> None:
    ids, lengths = sequences()
    found = shared.share(ids, lengths, PROMPTS, apart=True)
    # Of the first prompt the beginning, then what its answers have of their own, longest first, filled up.
    assert [(part.prompts, part.common) for part in found.parts] == [(1, 4), (1, 0), (1, 5), (1, 0)]
    bands = [[(band.sequences, band.width) for band in part.bands] for part in found.parts]
    assert bands == [[(3, 8)], [(1, 5)], [(2, 3)], [(1, 4)]]
    assert found.ids.shape == (1, 4 + 3 * 8 + 5 + 5 + 2 * 3 + 4)
    assert shared.tokens(ids, lengths, PROMPTS).tolist() == [4 + 8, 8, 8, 5, 5 + 3, 3, 4]
    assert found.ids[0, found.last].tolist() == ids[torch.arange(7), lengths - 1].tolist()
    assert found.positions[0, found.last].tolist() == (lengths - 1).tolist()
    assert found.ids[0, :12].tolist() == [*ids[0, :4].tolist(), *ids[2, 4:].tolist()]
    assert found.positions[0, :12].tolist() == list(range(12))
    assert found.ids[0, 12:17].tolist() == ids[0, 4:9].tolist()
    assert found.positions[0, 12:17].tolist() == [4, 5, 6, 7, 8]
    assert found.last.tolist() == [16, 22, 11, 32, 41, 40, 47]


def test_several_prompts_are_a_part_whose_mask_hides_the_padding() -> None:
    ids, lengths = sequences()
    part = shared.share(ids, lengths, PROMPTS, apart=False).parts[0]
    assert (part.prompts, part.common) == (4, 5)  # of 5, 4 and 0 tokens, and 0 again, filled up
    bands = [(band.sequences, band.width, band.prompt) for band in part.bands]
    torch.testing.assert_close(bands, [(1, 8, torch.tensor([1])), (6, 5, torch.tensor([1, 2, 3, 1, 0, 0]))])
    for band in part.bands:
        assert band.mask is not None and band.prompt is not None
        for mask, prompt in zip(band.mask[:, 0, 2], band.prompt, strict=True):
            common = [5, 4, 0, 0][int(prompt)]
            seen = [*([True] * common), *([False] * (5 - common)), *([True] * 3), *([False] * (band.width - 3))]
            assert mask.tolist() == seen


def test_answers_of_like_length_are_a_band() -> None:
    lengths = torch.tensor([90, 32, 31, 89])
    found = shared.share(torch.arange(360).view(4, 90), lengths, torch.zeros(4, dtype=torch.long), apart=True)
    (part,) = found.parts
    assert (part.common, [(band.sequences, band.width) for band in part.bands]) == (0, [(2, 90), (2, 32)])
    assert found.last.tolist() == [89, 211, 242, 178]


def test_a_sequence_always_keeps_a_token_of_its_own() -> None:
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 0], [3, 4, 5, 6]])
    lengths = torch.tensor([4, 3, 4])
    found = shared.share(ids, lengths, torch.zeros(3, dtype=torch.long), apart=False)
    assert found.positions[0].tolist() == [0, 1, 2, 3, 2, 3, 2, 3]
    assert found.positions[0, found.last].tolist() == [3, 2, 3]
    assert found.last.tolist() == [3, 6, 5]


@pytest.mark.parametrize("longest", [256, 8, 0])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "llama-untied", "qwen2", "qwen3"])
def test_scores_and_gradients_are_those_of_passes_apart(
    family: str, apart: bool, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where those of all prompts, of some, and of none attend by `align.models.dense`."""
    monkeypatch.setattr(attention, "suits_cpu", lambda: True)
    monkeypatch.setitem(LONGEST, torch.float64, longest)
    model = scalar(family).double()
    model.hf.double()
    assert trials.shares_prompts(model.hf, torch.device("cpu"))
    ids, lengths = sequences()
    found = []
    for together in (True, False):
        scores = (
            forward.final_scores_sharing(model, shared.share(ids, lengths, PROMPTS, apart=apart))
            if together
            else forward.final_scores(model, ids, lengths)
        )
        weights = dict(model.hf.base_model.named_parameters())
        grads = torch.autograd.grad((scores * torch.arange(1.0, 8.0)).sum(), list(weights.values()))
        found.append((scores, dict(zip(weights, grads, strict=True))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    for name, grad in found[0][1].items():
        # Norms are computed in float32 whatever the weights are.
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-5, atol=1e-6 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("apart", [True, False])
def test_tokens_come_in_multiples_and_padding_changes_nothing(apart: bool) -> None:
    model = scalar("llama-tied")
    ids, lengths = sequences()
    plain, filled = (shared.share(ids, lengths, PROMPTS, apart=apart, multiple=multiple) for multiple in (1, 20))
    assert plain.ids.shape[1] % 20 and filled.ids.shape[1] == plain.ids.shape[1] + -plain.ids.shape[1] % 20
    assert filled.positions.shape == filled.ids.shape and torch.equal(filled.last, plain.last)
    with torch.no_grad():
        found = [forward.final_scores_sharing(model, laid_out) for laid_out in (plain, filled)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_mixed_precision_on_a_cpu_computes_multiples() -> None:
    module = RewardModule(model=scalar("llama-tied"), tokenizer=tiny.tokenizer(), optim=Optim(lr=1e-3))
    seen: list[int] = []
    module.model.hf.base_model.layers[0].register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape[1]))
    assert trials.shares_prompts(module.model.hf, torch.device("cpu"))
    seen.clear()
    with torch.no_grad():
        module.rewards(*sequences(), PROMPTS)
        with torch.autocast("cpu", torch.bfloat16):
            module.rewards(*sequences(), PROMPTS)
    assert seen[0] % packed.GRAIN and seen[1] % packed.GRAIN == 0


def test_in_bfloat16_too() -> None:
    model = scalar("llama-tied")
    ids, lengths = sequences()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = forward.final_scores_sharing(model, shared.share(ids, lengths, PROMPTS, apart=True))
        theirs = forward.final_scores(model, ids, lengths)
    assert float((ours - theirs).abs().max()) < 0.03 * float(theirs.abs().max())


@pytest.mark.parametrize("family", ["gemma2", "llama-sliding"])
def test_a_model_that_cannot_is_asked_one_by_one(family: str) -> None:
    if family == "gemma2":
        model = scalar(family)
    else:
        model = scalar("llama-tied")
        model.hf.config.sliding_window = 4
    assert not trials.shares_prompts(model.hf, torch.device("cpu"))
    module = RewardModule(model=model, tokenizer=tiny.tokenizer(), optim=Optim(lr=1e-3))
    ids, lengths = sequences()
    assert torch.equal(module.rewards(ids, lengths, PROMPTS), forward.final_scores(model, ids, lengths))


def test_a_wrong_position_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scalar("llama-untied")
    plain = model.hf.base_model.forward

    def without(*arguments, **named):
        named["position_ids"] = None
        return plain(*arguments, **named)

    monkeypatch.setattr(model.hf.base_model, "forward", without)
    assert not trials.shares_prompts(model.hf, torch.device("cpu"))
