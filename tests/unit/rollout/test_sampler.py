"""Both engines answer alike; what they sample from is the model's own distribution."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from transformers import GenerationConfig, PreTrainedModel

from align import seeds
from align.models import decode, forward
from align.models.attention import use_attend
from align.models.slots import Slots
from align.rollout.draws import draw
from align.rollout.sampler import DecodeSampler, GenerateSampler

FAMILIES = tiny.families()


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_answers_as_generate_does(name: str) -> None:
    prompts = tiny.prompts([3, 9, 1, 5, 12, 7], seed=4)
    ours = DecodeSampler(max_new_tokens=12, temperature=0.0, batch_size=4)(FAMILIES[name], prompts)
    theirs = GenerateSampler(max_new_tokens=12, temperature=0.0, batch_size=6)(FAMILIES[name], prompts)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.response_lengths, theirs.response_lengths)
    assert torch.equal(ours.finished, theirs.finished)
    assert ours.rows == prompts.rows == theirs.rows


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma2"])
@pytest.mark.parametrize("at_once", [1, 3, 9])
def test_slots_answer_as_generate_does(name: str, at_once: int) -> None:
    model = tiny.families()[name]
    use_attend(model)
    assert decode.able(model, torch.device("cpu"))
    prompts = tiny.prompts([3, 9, 1, 5, 12, 7, 5, 3], seed=4).rows_at(torch.tensor([0, 1, 2, 3, 4, 5, 3, 0]))
    ours = DecodeSampler(max_new_tokens=12, temperature=0.0, batch_size=at_once)(model, prompts)
    theirs = GenerateSampler(max_new_tokens=12, temperature=0.0, batch_size=8)(model, prompts)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.response_lengths, theirs.response_lengths)
    assert torch.equal(ours.finished, theirs.finished)
    assert ours.rows == prompts.rows


def test_slots_and_the_other_cache_draw_alike() -> None:
    model = tiny.llama(initializer_range=0.1).eval()
    use_attend(model)
    prompts = replace(tiny.prompts([4, 8, 2] * 20), seeds=seeds.derive_all(3, "sample", range(60)))
    one, other = (
        DecodeSampler(max_new_tokens=40, batch_size=16, slots=slots)(model, prompts) for slots in (True, False)
    )
    assert 10 < int(one.finished.sum()) < 60 and torch.equal(one.ids, other.ids)


def test_waiting_prompts_take_the_places_of_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(initializer_range=0.05).eval()
    use_attend(model)
    assert decode.able(model, torch.device("cpu"))
    rows, next_logits = [], decode.next_logits

    def watched(policy: PreTrainedModel, tokens: torch.Tensor, slots: Slots) -> torch.Tensor:
        rows.append(len(tokens))
        return next_logits(policy, tokens, slots)

    monkeypatch.setattr(decode, "next_logits", watched)
    out = DecodeSampler(max_new_tokens=40, batch_size=10)(model, tiny.prompts([4] * 50))
    full = rows[: len(rows) // 2]
    assert max(rows) == 10 and min(full) == 10  # those that are done make room when they are a fifth of the batch
    assert sum(rows) < 1.25 * int(out.response_lengths.sum()) + 10 * 8


def test_greedy_tokens_are_the_likeliest_and_prompts_are_kept() -> None:
    model, prompts = FAMILIES["gpt2"], tiny.prompts([2, 6, 4])
    out = DecodeSampler(max_new_tokens=5, temperature=0.0)(model, prompts)
    for row in range(3):
        start, end = int(out.prompt_lengths[row]), int(out.lengths[row])
        assert torch.equal(out.ids[row, :start], prompts.ids[row, :start])
        with torch.no_grad():
            best = model(out.ids[row : row + 1, :end]).logits[0, start - 1 : end - 1].argmax(-1)
        assert torch.equal(best, out.ids[row, start:end])


def test_a_response_ends_at_eos_or_at_the_limit() -> None:
    model = tiny.llama(initializer_range=0.05).eval()  # nearly uniform: one token in 50 is EOS
    out = DecodeSampler(max_new_tokens=40, batch_size=16)(model, tiny.prompts([4] * 64))
    for row in range(64):
        response = out.ids[row, 4 : int(out.lengths[row])].tolist()
        assert (tiny.EOS in response) == bool(out.finished[row])
        assert response.count(tiny.EOS) <= 1 and (not out.finished[row] or response[-1] == tiny.EOS)
        assert out.finished[row] or len(response) == 40
        assert not out.ids[row, int(out.lengths[row]) :].any()
    assert 10 < int(out.finished.sum()) < 60  # expected 64 (1 - (49/50)^40), about 35


@pytest.mark.parametrize("engine", [DecodeSampler, GenerateSampler])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_from_the_models_distribution(engine: type, temperature: float) -> None:
    model, one = tiny.llama(seed=1).eval(), tiny.prompts([5])
    model.generation_config = GenerationConfig(top_k=3, top_p=0.5, repetition_penalty=2.0, eos_token_id=tiny.EOS)
    many = one.rows_at(torch.zeros(20_000, dtype=torch.long))
    out = engine(max_new_tokens=1, temperature=temperature, batch_size=20_000)(model, many)
    share = torch.bincount(out.ids[:, 5], minlength=tiny.VOCAB) / 20_000
    with torch.no_grad():
        expected = (model(one.ids).logits[0, -1] / temperature).softmax(-1)
    assert float((share - expected).abs().max()) < 0.015  # four standard errors of the likeliest token
    assert float((share - expected).abs().sum()) < 0.06


def test_the_seed_decides_the_sample() -> None:
    model, prompts, sampler = FAMILIES["qwen2"], tiny.prompts([3, 5, 2]), DecodeSampler(max_new_tokens=8)
    outs = []
    for step in (0, 0, 1):
        with seeds.forked(7, "sample", step):
            outs.append(sampler(model, prompts).ids)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_sampling_leaves_training_mode_and_random_state_alone() -> None:
    model = tiny.gpt2().train()
    before = torch.get_rng_state()
    with seeds.forked(0, "sample"):
        GenerateSampler(max_new_tokens=3)(model, tiny.prompts([3, 4]))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_eos_is_refused() -> None:
    model = tiny.llama(eos_token_id=None)
    model.generation_config = GenerationConfig()
    with pytest.raises(ValueError, match="no eos_token_id"):
        DecodeSampler(max_new_tokens=3)(model, tiny.prompts([3]))


def test_draw_takes_the_likeliest_at_temperature_zero() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [3.0, -1.0, 2.9]])
    points = torch.tensor([0.99, 0.99], dtype=torch.float64)
    assert draw(logits, 0.0, points)[0].tolist() == [1, 0]


def test_draw_takes_the_token_whose_part_of_the_line_is_hit() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3, 0.0]]).log().expand(6, -1)
    points = torch.tensor([0.0, 0.49, 0.51, 0.69, 0.71, 1.0 - 1e-16], dtype=torch.float64)
    assert draw(logits, 1.0, points)[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert draw(logits[:1], 0.5, points[3:4])[0].tolist() == [1]  # .25 .04 .09 of .38: .66 .76 1.0


def test_a_response_depends_on_its_prompt_and_seed_alone() -> None:
    model, prompts = FAMILIES["llama-tied"], tiny.prompts([3, 9, 1, 5, 12, 7], seed=4)
    seeded = replace(prompts, seeds=seeds.derive_all(3, "sample", range(6)))
    whole = DecodeSampler(max_new_tokens=12, batch_size=6)(model, seeded)
    for rows in ([4, 1], [0], [5, 3, 2]):
        index = torch.tensor(rows)
        part = DecodeSampler(max_new_tokens=12, batch_size=2)(model, seeded.rows_at(index))
        again = whole.rows_at(index)
        assert torch.equal(part.response_lengths, again.response_lengths)
        width = part.ids.shape[1]
        assert torch.equal(part.ids, again.ids[:, :width]) and not again.ids[:, width:].any()
    other = DecodeSampler(max_new_tokens=12)(model, replace(prompts, seeds=seeds.derive_all(4, "sample", range(6))))
    assert not torch.equal(other.ids[:, :12], whole.ids[:, :12])


def test_sampled_tokens_have_finite_logprobs_under_the_same_distribution() -> None:
    model = FAMILIES["qwen3"]
    out = DecodeSampler(max_new_tokens=10, temperature=0.7)(model, tiny.prompts([3, 6, 2, 8]))
    with torch.no_grad():
        flat = forward.token_logprobs(model, out.ids, out.token_mask, 0.7)
    assert len(flat) == int(out.response_lengths.sum()) and bool((flat > -20).all())


@pytest.mark.parametrize("slots", [True, False])
def test_it_says_what_probability_its_tokens_had(slots: bool) -> None:
    model = tiny.llama(initializer_range=0.1).eval()
    use_attend(model)
    prompts = tiny.prompts([4, 8, 2, 5, 3])
    torch.manual_seed(0)
    found = DecodeSampler(max_new_tokens=12, temperature=0.7, batch_size=2, slots=slots)(model, prompts)
    assert found.sampled_logprobs is not None and found.sampled_logprobs.shape == found.mask.shape
    with torch.no_grad():
        flat = forward.token_logprobs(model, found.ids, found.token_mask, 0.7)
    torch.testing.assert_close(found.sampled_logprobs[found.mask], flat, rtol=1e-4, atol=1e-5)
    assert not found.sampled_logprobs[~found.mask].any()
    greedy = DecodeSampler(max_new_tokens=3, temperature=0.0, slots=slots)(model, prompts).sampled_logprobs
    assert greedy is not None and not greedy.any()
    assert GenerateSampler(max_new_tokens=3)(model, prompts).sampled_logprobs is None


@pytest.mark.parametrize("slots", [True, False])
def test_it_computes_in_the_arithmetic_it_is_told(slots: bool) -> None:
    model = tiny.llama(initializer_range=0.1).eval()
    use_attend(model)
    prompts = replace(tiny.prompts([4, 8, 2, 5]), seeds=seeds.derive_all(3, "sample", range(4)))

    def apart(dtype: Any, mixed: bool = False) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            found = DecodeSampler(max_new_tokens=6, slots=slots, dtype=dtype)(model, prompts)
        with torch.no_grad():
            flat = forward.token_logprobs(model, found.ids, found.token_mask)
        assert found.sampled_logprobs is not None
        return float((found.sampled_logprobs[found.mask] - flat).abs().mean())

    assert apart(None) < 1e-5 and apart("float32", mixed=True) < 1e-5
    assert 1e-4 < apart("bfloat16") < 0.05
    assert 1e-4 < apart(None, mixed=True) < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_slots_serve_mixed_precision_too() -> None:
    model = tiny.llama(initializer_range=0.1).eval()
    use_attend(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decode.able(model, torch.device("cpu"))
