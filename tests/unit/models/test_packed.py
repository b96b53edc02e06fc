"""Sequences end to end against rows filled up to the longest, and against each sequence alone."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models import attention, forward, hydra, packed, trials
from align.models.attention import use_attend
from align.models.trunk import Head
from align.modules.sft import SFTModule
from align.optim import Optim
from align.types import Completions

CPU = torch.device("cpu")

EPISODES = tiny.completions([3, 19, 1, 5, 40, 2, 3], [4, 1, 7, 5, 9, 30, 4])
"""Of lengths so different that they make several bands."""


def ours(family: str) -> PreTrainedModel:
    """A model as models are loaded."""
    model = tiny.families()[family]
    use_attend(model)
    return model


def lengths(seed: int, most: int, count: int) -> Tensor:
    return torch.randint(0, most, (count,), generator=torch.Generator().manual_seed(seed))


def cost(sizes: list[int]) -> int:
    return len(sizes) * max(sizes) + packed.BAND_TOKENS


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("most", [8, 40, 300])
def test_bands_compute_least(seed: int, most: int) -> None:
    sequences = lengths(seed, most, 9)
    found = packed.bands_of(sequences)
    assert sorted(row for rows, _ in found for row in rows.tolist()) == list(range(9))
    needed = sequences.clamp_min(1)
    assert all(width == int(needed[rows].max()) for rows, width in found)
    sizes = sorted(needed.tolist(), reverse=True)
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 9), count) for count in range(9))
    least = min(sum(cost(sizes[a:b]) for a, b in itertools.pairwise((0, *cut, 9))) for cut in cuts)
    assert sum(len(rows) * width + packed.BAND_TOKENS for rows, width in found) == least


def test_tokens_lie_band_by_band() -> None:
    laid_out = packed.pack(torch.tensor([2, 40, 3, 0]), 41)
    assert laid_out.bands == ((1, 40), (3, 3))
    short = [82, 83, 84, 0, 1, 2, 123, 124, 125]  # the third row, the first, the last
    assert laid_out.places.tolist() == [*range(41, 81), *short]
    assert laid_out.positions.tolist() == [*range(40), 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert laid_out.find(torch.tensor([1, 41, 84])).tolist() == [44, 0, 42]
    ids = torch.arange(164).view(4, 41)
    assert laid_out.arguments(ids)["input_ids"].tolist() == [laid_out.places.tolist()]


@pytest.mark.parametrize("budget", [1, 60, 800, 4096])
def test_micro_batches_are_few_and_within_the_budget(budget: int) -> None:
    sequences = lengths(3, 90, 40)
    groups = packed.micro_batches(sequences, budget, packs=True)
    assert sorted(torch.cat(groups).tolist()) == list(range(40))
    sizes = [len(packed.pack(sequences[group], 90).places) for group in groups]
    assert all(size <= budget for size, group in zip(sizes, groups, strict=True) if len(group) > 1)
    if budget == 4096:
        assert len(groups) == 1 and sizes[0] <= 1.1 * int(sequences.sum())
    if budget == 800:
        assert len(groups) == 3 < len(packed.micro_batches(sequences, budget)) and int(sequences.sum()) > 2 * 800


def test_bands_count_within_the_budget() -> None:
    """Two sequences of 40 and 25 tokens fit into 65 as two bands, but alone they would be one, of 80."""
    sequences = torch.tensor([40, 25, 25, 25, 25])
    groups = packed.micro_batches(sequences, 65, packs=True)
    assert [group.tolist() for group in groups] == [[0], [1], [2], [3], [4]]
    assert packed.pack(sequences[:2], 40).bands == ((2, 40),)
    assert [len(group) for group in packed.micro_batches(sequences, 66, packs=True)] == [1, 2, 2]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def both_ways(model: PreTrainedModel, compute: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """What is computed end to end, and with rows filled up, and the gradients of its squares."""
    assert trials.packs(CPU, model)
    for pads in (False, True):
        if pads:
            packed.padded.add(model)
        values = compute()
        values.square().sum().backward()
        yield values.detach(), gradients(model)


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("kind", ["log-probs", "values", "scores"])
def test_it_is_what_padded_rows_give(family: str, kind: str) -> None:
    model = ours(family)
    value = Head().on(model, "value", trained=True)
    nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(1))
    ids, mask = EPISODES.ids, EPISODES.token_mask
    compute = {
        "log-probs": lambda: forward.token_logprobs(model, ids, mask, 0.7),
        "values": lambda: forward.token_values(value, ids, mask),
        "scores": lambda: forward.final_scores(value, ids, EPISODES.lengths),
    }[kind]
    (values, grads), (others, other_grads) = both_ways(model, compute)
    torch.testing.assert_close(values, others, rtol=1e-4, atol=1e-5)
    assert grads.keys() == other_grads.keys() and grads
    for name, grad in grads.items():
        assert (grad - other_grads[name]).norm() <= 1e-5 * other_grads[name].norm(), name


def test_no_token_sees_another_sequence() -> None:
    model, changed = ours("llama-untied"), EPISODES.ids.clone()
    changed[1, :20] = 5  # the second longest but one, in the middle
    with torch.no_grad():
        one, other = (forward.token_logprobs(model, ids, EPISODES.token_mask) for ids in (EPISODES.ids, changed))
    of_row = torch.arange(7).repeat_interleave(EPISODES.token_mask.sum(1))
    assert torch.equal(one[of_row != 1], other[of_row != 1])
    assert not torch.equal(one[of_row == 1], other[of_row == 1])


def computed(model: PreTrainedModel) -> list[int]:
    """Tokens that the first block will compute, pass by pass."""
    counts: list[int] = []
    block = model.base_model.layers[0]
    block.register_forward_hook(lambda _, inputs, hidden: counts.append(hidden.shape[0] * hidden.shape[1]))
    return counts


def test_only_what_stands_before_scored_tokens_is_computed() -> None:
    model = ours("llama-tied")
    assert trials.packs(CPU, model) and trials.has_plain_head(model, CPU)
    counts, mask = computed(model), EPISODES.token_mask.clone()
    with torch.no_grad():
        forward.token_logprobs(model, EPISODES.ids, mask)
        mask[4, 45:] = False  # of a row of 49
        forward.token_logprobs(model, EPISODES.ids, mask)
        packed.padded.add(model)
        forward.token_logprobs(model, EPISODES.ids, mask)
    needed = int((EPISODES.lengths - 1).sum())
    assert needed <= counts[0] <= needed + 24 and counts[0] - counts[1] == 4
    assert counts[2] == EPISODES.ids.numel()


def test_nothing_to_score_computes_a_token_a_row() -> None:
    model = ours("llama-tied")
    assert trials.packs(CPU, model) and trials.has_plain_head(model, CPU)
    counts = computed(model)
    found = forward.token_logprobs(model, EPISODES.ids, torch.zeros_like(EPISODES.token_mask))
    found.sum().backward()
    assert found.shape == (0,) and counts == [7] and model.base_model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize("lies", [True, False])
def test_states_of_frozen_blocks_are_the_rows_own(lies: bool) -> None:
    model = ours("llama-tied")
    hydra.freeze(model, 1)
    assert trials.packs(CPU, model)
    expected = hydra.below(model, EPISODES.ids, 1)
    layout = forward.layout(model, EPISODES.ids, EPISODES.lengths - 1)
    assert layout is not None
    states = hydra.below(model, EPISODES.ids, 1, layout if lies else None)
    there = torch.arange(EPISODES.ids.shape[1]) < EPISODES.lengths[:, None] - 1
    torch.testing.assert_close(states.hidden[there], expected.hidden[there], rtol=1e-4, atol=1e-5)
    whole = forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask)
    gone_on = forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask, below=states)
    torch.testing.assert_close(gone_on, whole, rtol=1e-4, atol=1e-5)
    other = states.rows_at(torch.arange(7).flip(0), EPISODES.ids.shape[1])  # of other rows
    wrong = forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask, below=other)
    assert not torch.allclose(wrong, whole, rtol=1e-2, atol=1e-2)


def test_attention_by_torch_is_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kinds = ours("llama-tied"), set()
    monkeypatch.setattr(attention, "suits_cpu", lambda: False)
    original = attention.sdpa_attention_forward
    assert trials.packs(CPU, model)

    def noted(module: nn.Module, query: Tensor, *others: Any, **named: Any) -> Any:
        kinds.add((query.dtype, query.shape[0] > 1))
        return original(module, query, *others, **named)

    monkeypatch.setattr(attention, "sdpa_attention_forward", noted)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask)
    assert kinds == {(torch.float32, True), (torch.float32, False)}
    with torch.no_grad():
        assert 0.0 < float((low - forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask)).abs().mean()) < 0.1


@pytest.mark.parametrize("multiple", [1, 6, 64])
def test_tokens_come_in_multiples_and_padding_stands_for_none(multiple: int) -> None:
    sizes = torch.tensor([2, 40, 3, 0])
    laid_out, plain = packed.pack(sizes, 41, multiple), packed.pack(sizes, 41)
    assert laid_out.padding == -49 % multiple and plain.padding == 0
    assert laid_out.bands == (*plain.bands, *([(1, laid_out.padding)] if laid_out.padding else []))
    assert torch.equal(laid_out.places, plain.places) and torch.equal(laid_out.find(plain.places), torch.arange(49))
    given = laid_out.arguments(torch.arange(4 * 41).view(4, 41))
    assert given["input_ids"].shape == given["position_ids"].shape == (1, 49 + laid_out.padding)
    assert torch.equal(given["input_ids"][0, :49], plain.places) and not given["input_ids"][0, 49:].any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_cpu_in_16_bits_computes_multiples_of_a_grain(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks and logits alike, and all numbers are those of any other grain, frozen states (`Below`) included."""
    model, seen = ours("llama-tied"), set()
    with torch.autocast("cpu", torch.bfloat16):
        assert trials.packs(CPU, model) and trials.has_plain_head(model, CPU)
    for layer in (model.base_model.layers[-1].mlp.up_proj, model.lm_head):
        layer.register_forward_hook(lambda _, inputs, out: seen.add(inputs[0].numel() // inputs[0].shape[-1]))

    def found() -> Tensor:
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            laid_out = forward.layout(model, EPISODES.ids, EPISODES.lengths)
            states = hydra.below(model, EPISODES.ids, frozen, laid_out) if frozen else None
            return forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask, below=states)

    in_grains = found()
    assert len(seen) == 2 and all(tokens % packed.GRAIN == 0 for tokens in seen)
    monkeypatch.setattr(packed, "GRAIN", 1)
    torch.testing.assert_close(found(), in_grains, rtol=1e-2, atol=1e-2)
    assert all(tokens % 64 for tokens in seen)
    with torch.no_grad():
        forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask)  # float32 has no grain
    assert packed.grain(CPU) == 1


@pytest.mark.parametrize("why", ["capped scores", "a window", "another attention", "a leak", "no arguments"])
def test_a_model_that_cannot_gets_rows(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours("gemma2" if why == "capped scores" else "llama-tied")
    if why == "a window":
        model.config.sliding_window = 4
    if why == "another attention":
        model.set_attn_implementation("eager")
    plain = model.base_model.layers[1].forward

    def leaks(hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return plain(hidden + 0.5 * hidden.roll(1, dims=1) * (torch.arange(hidden.shape[1]) > 0)[:, None], **named)

    def refuses(hidden: Tensor, position_embeddings: Any = None, **named: Any) -> Tensor:
        if "packed" in named:
            raise TypeError("unexpected keyword argument 'packed'")
        return plain(hidden, position_embeddings=position_embeddings, **named)

    if why in ("a leak", "no arguments"):
        monkeypatch.setattr(model.base_model.layers[1], "forward", leaks if why == "a leak" else refuses)
    assert not trials.packs(CPU, model) and forward.layout(model, EPISODES.ids, EPISODES.lengths) is None
    assert trials.packs(CPU, ours("llama-tied")) and not trials.packs(CPU, ours("llama-tied"), model)
    with torch.no_grad():
        found = forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask)
        alone = [forward.token_logprobs(model, *row(EPISODES, number)) for number in range(7)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


def row(episodes: Completions, number: int) -> tuple[Tensor, Tensor]:
    end = int(episodes.lengths[number])
    return episodes.ids[number : number + 1, :end], episodes.token_mask[number : number + 1, :end]


def test_a_module_trains_the_same_with_and_without(tmp_path: Path) -> None:
    from align.data.demonstrations import DemonstrationData

    words = [f"w{number}" for number in range(3, 50)]
    rows = [{"prompt": " ".join(words[: 3 * n + 1]), "response": " ".join(words[n : 3 * n + 2])} for n in range(12)]
    found, passes = [], []
    for pack in (True, False):
        model = ours("llama-untied")
        counts = computed(model)
        tokenizer = tiny.tokenizer()
        module = SFTModule(model=model, tokenizer=tokenizer, optim=Optim(lr=1e-2), micro_batch_tokens=100, pack=pack)
        data = DemonstrationData(
            tokenizer=tokenizer, train=rows, batch_size=6, max_prompt_tokens=64, max_response_tokens=64
        )
        tiny.fit(module, data, tmp_path / str(pack))
        found.append(dict(model.named_parameters()))
        passes.append(sum(counts))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-4, atol=2e-5, msg=name)
    assert passes[0] < 0.95 * passes[1]


@pytest.mark.parametrize(("hidden", "most"), [(32, 16384), (512, 2048)])
def test_on_a_cpu_micro_batches_stay_in_its_caches(hidden: int, most: int) -> None:
    model = tiny.llama(hidden_size=hidden, num_attention_heads=8, num_key_value_heads=8).eval()
    use_attend(model)
    sequences = torch.full((400,), 100)
    sizes = [100 * len(group) for group in trials.micro_batches(sequences, 10**6, CPU, model)]
    assert sum(sizes) == 40_000 and most - 200 < max(sizes) <= most
    assert max(100 * len(group) for group in trials.micro_batches(sequences, 1000, CPU, model)) == 900
    packed.padded.add(model)
    assert len(trials.micro_batches(sequences, 10**6, CPU, model)) == 1
