"""Answers that share their prompt's keys and values have the logits of passes over whole sequences."""

from dataclasses import replace

import pytest
import tiny
import torch
from unit.models.test_slots import CPU, NAMES, exact, whole, written

from align import seeds
from align.models import attention, decode
from align.models.attention import use_attend
from align.models.groups import GroupedSlots, attend_in_groups
from align.models.slots import Slots
from align.rollout import sampler
from align.rollout.sampler import DecodeSampler, GenerateSampler

PROMPTS = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
"""Of each row: three, one, two, one and one answer."""

LENGTHS = torch.tensor([12, 11, 7, 1, 0])


def begun(name: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, GroupedSlots]:
    """Rows that begin alike and then differ, their prompts computed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.VOCAB, (8, 20), generator=generator)
    lengths = LENGTHS[PROMPTS]
    beginnings = torch.randint(3, tiny.VOCAB, (5, 20), generator=generator)[PROMPTS]
    ids = torch.where(torch.arange(20) < lengths[:, None], beginnings, ids)
    model, cache = exact(name), GroupedSlots(CPU, most=20)
    cache.lay_out(torch.full((8,), -1), lengths)
    decode.fill(model, ids, lengths, cache, torch.arange(8))
    return model, ids, lengths, cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [8192, 41, 1])
@torch.no_grad()
def test_answers_have_the_logits_of_passes_of_their_own(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PROMPT_TOKENS", tokens)
    model, ids, lengths, cache = begun(name)
    got = written(model, ids, lengths, cache, 5)
    torch.testing.assert_close(got, whole(model, ids, lengths, 5), rtol=0, atol=1e-10)
    assert len(cache.beginnings) == {8192: 1, 41: 2, 1: 5}[tokens]
    assert cache.lengths.tolist() == [5] * 8 and torch.equal(cache.positions, lengths + 5)


@pytest.mark.parametrize("room", [2, 100])
@torch.no_grad()
def test_rows_leave_come_and_grow(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.models.slots.GROWTH", room)
    monkeypatch.setattr(decode, "PROMPT_TOKENS", 24)  # two prompts at once, or three
    model, ids, lengths, cache = begun("qwen3")
    written(model, ids, lengths, cache, 2)
    assert cache.full == (room == 2) and [len(part.lengths) for part in cache.beginnings] == [2, 3]
    # Prompts 0 and 4 leave, and one answer to prompt 2; two answers to a prompt of 5 tokens come.
    rows, kept = torch.tensor([3, 5, 6, 0, 1]), torch.tensor([3, 5, 6])
    others = torch.randint(3, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
    others[1, :5] = others[0, :5]
    ids = torch.cat([ids[kept], others])
    total = torch.tensor([13, 9, 3, 5, 5])
    cache.lay_out(torch.where(torch.arange(5) < 3, rows, -1), total)
    decode.fill(model, ids[3:], total[3:], cache, torch.tensor([3, 4]))
    assert [part.lengths.tolist() for part in cache.beginnings] == [[11], [7, 1], [5]]
    assert cache.beginnings[0].layers[0][0].shape[2] == 11
    for start in (0, 2):
        if cache.full:
            cache.lay_out(torch.arange(5), cache.positions)
        got = written(model, ids, total + start, cache, 2)
        torch.testing.assert_close(got, whole(model, ids, total + start, 2), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_prompt_is_computed_and_kept_once() -> None:
    model, _, _, cache = begun("llama-tied")
    (part,) = cache.beginnings
    assert part.lengths.tolist() == LENGTHS.tolist() and part.of.tolist() == PROMPTS.tolist()
    assert part.places.shape == (5, 3)
    for keys, values in part.layers.values():
        assert keys.shape == values.shape == (5, 2, 12, 8)
    assert len(part.layers) == len(model.model.layers)


def test_products_are_scaled_as_attention_scales_them() -> None:
    _, _, _, cache = begun("qwen2")
    query, (keys, values) = torch.randn(8, 4, 1, 8).double(), torch.randn(2, 8, 2, 1, 8).double()
    cache.begin()
    for layer, scaling in enumerate((None, 0.7)):
        found = attend_in_groups(query, keys, values, layer, cache, scaling)
        of_prompts = cache.beginnings[0].layers[layer]
        for row, prompt in enumerate(PROMPTS):
            own = [
                torch.cat([kept[prompt, :, : LENGTHS[prompt]], new[row]], 1).repeat_interleave(2, 0)
                for kept, new in zip(of_prompts, (keys, values), strict=True)
            ]
            theirs = torch.nn.functional.scaled_dot_product_attention(query[row], *own, scale=scaling)
            torch.testing.assert_close(found[row, 0], theirs[:, 0], rtol=0, atol=1e-10)


def counted(kind: type[Slots], made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds to the list for each that is made."""
    plain = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, *a, **named: made.append(1) or plain(self, *a, **named))


@pytest.mark.parametrize("at_once", [3, 7, 64])
def test_shared_prompts_draw_what_own_ones_draw(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SHARED_FROM", 1)
    model, made, computed, fill = tiny.llama(initializer_range=0.1).eval(), [], [], decode._fill
    use_attend(model)
    assert decode.able(model, CPU) and decode.able(model, CPU, GroupedSlots)
    counted(GroupedSlots, made, monkeypatch)
    monkeypatch.setattr(decode, "_fill", lambda model, ids, cache: computed.append(len(ids)) or fill(model, ids, cache))
    some = tiny.prompts([4, 8, 2, 1, 8]).rows_at(torch.tensor([3, 0, 4, 1, 0, 4, 2, 2, 3, 1, 4, 4, 0, 1] * 4))
    prompts = replace(some, seeds=seeds.derive_all(3, "sample", range(56)))
    shared = DecodeSampler(max_new_tokens=40, batch_size=at_once)(model, prompts)
    assert sum(computed) == 5 or at_once < 64
    own = DecodeSampler(max_new_tokens=40, batch_size=at_once, share_prompts=False)(model, prompts)
    assert made == [1] and 10 < int(own.finished.sum()) < 56
    assert torch.equal(shared.ids, own.ids) and torch.equal(shared.finished, own.finished)
    assert shared.rows == own.rows == prompts.rows
    assert shared.sampled_logprobs is not None and own.sampled_logprobs is not None
    torch.testing.assert_close(shared.sampled_logprobs, own.sampled_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "answers", "share"),
    [([129, 127], 2, True), ([127, 128], 2, False), ([200, 5], 2, False), ([128, 128], 1, False)],
)
def test_long_prompts_with_several_answers_are_shared(
    lengths: list[int], answers: int, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = tiny.llama(max_position_embeddings=256).eval(), []
    use_attend(model)
    assert decode.able(model, CPU) and decode.able(model, CPU, GroupedSlots)
    counted(GroupedSlots, made, monkeypatch)
    prompts = tiny.prompts(lengths).rows_at(torch.arange(2).repeat_interleave(answers))
    DecodeSampler(max_new_tokens=2)(model, prompts)
    assert bool(made) is share


def test_a_model_that_cannot_share_prompts_keeps_a_row_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SHARED_FROM", 1)
    model, made = tiny.llama(seed=3).eval(), []
    use_attend(model)
    monkeypatch.setattr(attention, "attend_in_groups", lambda query, *_: query.transpose(1, 2))
    assert decode.able(model, CPU) and not decode.able(model, CPU, GroupedSlots)
    counted(Slots, made, monkeypatch)
    prompts = tiny.prompts([4]).rows_at(torch.tensor([0, 0]))
    ours = DecodeSampler(max_new_tokens=5, temperature=0.0)(model, prompts)
    assert made == [1]
    assert torch.equal(ours.ids, GenerateSampler(max_new_tokens=5, temperature=0.0)(model, prompts).ids)


def test_scores_of_16_bits_are_weighed_unrounded() -> None:
    """Scores of about a hundred, which bfloat16 would know to a half."""
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (torch.randn(4, 2, 1, 64, generator=generator).bfloat16() * size for size in (12, 8, 1))
    cache = GroupedSlots(CPU, most=4)
    cache.lay_out(torch.full((4,), -1), torch.full((4,), 6))
    cache.begin_with(torch.tensor([6]), torch.zeros(4, dtype=torch.long))
    prompt = [torch.randn(1, 2, 6, 64, generator=generator).bfloat16() * size for size in (8, 1)]
    cache.fill(0, *prompt)
    cache.begin()
    found = attend_in_groups(query, keys, values, 0, cache)
    whole = [
        torch.cat([kept.expand(4, -1, -1, -1), new], 2).double()
        for kept, new in zip(prompt, (keys, values), strict=True)
    ]
    exact_ones = torch.nn.functional.scaled_dot_product_attention(query.double(), *whole).transpose(1, 2)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact_ones, rtol=1e-2, atol=1e-2)


def test_in_mixed_precision_they_are_as_near_to_the_model_as_own_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SHARED_FROM", 1)
    model = tiny.llama(initializer_range=0.1).eval()
    use_attend(model)
    prompts = tiny.prompts([9, 4]).rows_at(torch.arange(2).repeat_interleave(8))
    apart = []
    for share in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            assert decode.able(model, CPU, GroupedSlots)
            answers = DecodeSampler(max_new_tokens=12, share_prompts=share)(
                model, replace(prompts, seeds=seeds.derive_all(1, "sample", range(16)))
            )
        with torch.no_grad():
            logits = model(answers.ids).logits[:, :-1].log_softmax(-1)
        exact_ones = logits.gather(2, answers.ids[:, 1:, None])[:, :, 0]
        mask = answers.token_mask[:, 1:]
        found = torch.zeros_like(exact_ones).masked_scatter(mask, answers.sampled_logprobs[answers.mask])  # type: ignore[index]
        apart.append(float((found - exact_ones)[mask].abs().mean()))
    assert 0.0 < apart[0] < 1.2 * apart[1] + 1e-3
