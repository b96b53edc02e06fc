"""Tokens written through the slots have the logits of passes over whole sequences."""

from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from align.models import attention, decode, slots
from align.models.attention import use_attend
from align.models.slots import Slots

NAMES = ("gpt2", "llama-tied", "llama-untied", "qwen2", "qwen3")
CPU = torch.device("cpu")


def exact(name: str) -> PreTrainedModel:
    """A model with our attention, in float64."""
    model = tiny.families()[name].double()
    use_attend(model)
    return model


def written(model: PreTrainedModel, ids: torch.Tensor, lengths: torch.Tensor, cache: Slots, steps: int) -> torch.Tensor:
    """The logits of some tokens of each sequence, put in behind so many of its tokens."""
    rows, found = torch.arange(len(ids)), []
    for step in range(steps):
        found.append(decode.next_logits(model, ids[rows, lengths + step], cache))
    return torch.stack(found, 1)


def whole(model: PreTrainedModel, ids: torch.Tensor, lengths: torch.Tensor, steps: int) -> torch.Tensor:
    """The same of one pass over each sequence alone."""
    found = []
    for row, length in zip(ids, lengths.tolist(), strict=True):
        logits = model(row[None, : length + steps], use_cache=False).logits[0]
        found.append(logits[length : length + steps])
    return torch.stack(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows_a_band", [1, 8])
@torch.no_grad()
def test_rows_of_any_length_have_the_logits_of_passes_of_their_own(
    name: str, rows_a_band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "BAND_ROWS", rows_a_band)
    model, lengths = exact(name), torch.tensor([12, 11, 7, 3, 1, 0])
    ids = torch.randint(3, tiny.VOCAB, (6, 17), generator=torch.Generator().manual_seed(0))
    cache = Slots(CPU, most=20)
    cache.lay_out(torch.full((6,), -1), lengths)
    decode.fill(model, ids, lengths, cache, torch.arange(6))
    got = written(model, ids, lengths, cache, 4)
    torch.testing.assert_close(got, whole(model, ids, lengths, 4), rtol=0, atol=1e-10)
    assert cache.lengths.tolist() == (lengths + 4).tolist()


@pytest.mark.parametrize("room", [2, 100])
@torch.no_grad()
def test_rows_leave_come_and_grow(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "GROWTH", room)
    model = exact("qwen3")
    ids = torch.randint(3, tiny.VOCAB, (7, 30), generator=torch.Generator().manual_seed(1))
    first, cache = torch.tensor([9, 6, 5, 2]), Slots(CPU, most=13)
    cache.lay_out(torch.full((4,), -1), first)
    decode.fill(model, ids[:4], first, cache, torch.arange(4))
    written(model, ids[:4], first, cache, 2)
    assert cache.full == (room == 2)
    # Rows 0 and 2 leave, sequences 4 (8 tokens), 5 (7) and 6 (none) come: by length 1 (8), 4 (8), 5 (7), 3 (4), 6 (0).
    sequences, lengths = torch.tensor([1, 4, 5, 3, 6]), torch.tensor([8, 8, 7, 4, 0])
    cache.lay_out(torch.tensor([1, -1, -1, 3, -1]), lengths)
    new = torch.tensor([1, 2, 4])
    decode.fill(model, ids[sequences[new]], lengths[new], cache, new)
    for start in (0, 2):  # with room for 2 the rows have to be laid out once more
        if cache.full:
            cache.lay_out(torch.arange(5), cache.lengths)
        got = written(model, ids[sequences], lengths + start, cache, 2)
        torch.testing.assert_close(got, whole(model, ids[sequences], lengths + start, 2), rtol=0, atol=1e-10)


@torch.no_grad()
def test_equal_prompts_are_computed_once() -> None:
    model, computed = exact("llama-tied"), []
    model.base_model.layers[0].register_forward_pre_hook(lambda _, given: computed.append(given[0].shape[:2].numel()))
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8], [5, 6, 3, 3]])
    lengths, cache = torch.tensor([3, 3, 3, 2]), Slots(CPU, most=20)
    cache.lay_out(torch.full((4,), -1), lengths)
    decode.fill(model, ids, lengths, cache, torch.arange(4))
    assert sum(computed) == 6  # 5 6 7 once, and 5 6 filled up to its length
    got = written(model, ids, lengths, cache, 1)
    torch.testing.assert_close(got, whole(model, ids, lengths, 1), rtol=0, atol=1e-10)


def test_rows_of_like_length_make_a_band() -> None:
    lengths = [100, 90, 80, 79, 78, 77, 76, 75, 74, 20, 10]
    # The ninth is shorter than 80, but only with it are there eight before the next; 20 begins another.
    assert list(slots._bands(lengths)) == [(0, 8, 100), (8, 11, 75 - 1)]
    assert list(slots._bands([100] + [81] * 9 + [80])) == [(0, 11, 100)]  # none is short enough
    assert list(slots._bands([3])) == [(0, 1, 3)] and list(slots._bands([])) == []


@pytest.mark.parametrize("name", NAMES)
def test_models_with_our_attention_can(name: str) -> None:
    model = tiny.families()[name]
    assert not decode.able(model, CPU)  # their own attention
    use_attend(model)
    decode._able.clear()
    assert decode.able(model, CPU)


def test_models_that_look_only_so_far_back_or_go_wrong_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen2Config(**tiny._SHAPE, use_sliding_window=True, sliding_window=2, max_window_layers=1)
    near = Qwen2ForCausalLM(config).eval()
    use_attend(near)
    assert not decode.able(near, CPU)
    monkeypatch.setattr(attention, "_attend_to_slots", lambda module, query, *_, **__: query.transpose(1, 2))
    assert not decode.able(exact("llama-tied"), CPU)


@torch.no_grad()
def test_rows_have_no_more_room_than_they_may_need() -> None:
    model, ids, lengths = exact("qwen2"), torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([3])
    cache = Slots(CPU, most=5)
    cache.lay_out(torch.tensor([-1]), lengths)
    decode.fill(model, ids, lengths, cache, torch.tensor([0]))
    assert not cache.full
    written(model, ids, lengths, cache, 2)
    assert cache.full


@pytest.mark.parametrize(("matrix_units", "kind"), [(True, torch.bfloat16), (False, torch.float32)])
def test_keys_and_values_are_kept_and_attended_to_in_one_format_in_mixed_precision(
    monkeypatch: pytest.MonkeyPatch, matrix_units: bool, kind: torch.dtype
) -> None:
    """In 16 bits half of the memory, and half of what is read for every token, where a CPU attends in them as fast;
    scores stay close to a pass in float32."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units, raising=False)
    model, kinds = tiny.families()["llama-tied"], set()
    use_attend(model)
    original = attention.sdpa_attention_forward

    def noted(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *others: Any, **named: Any) -> Any:
        kinds.add((query.shape[2] == 1, query.dtype, key.dtype))
        return original(module, query, key, *others, **named)

    monkeypatch.setattr(attention, "sdpa_attention_forward", noted)
    lengths = torch.tensor([6, 4, 3])
    ids = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    cache = Slots(CPU, most=12)
    cache.lay_out(torch.full((3,), -1), lengths)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        decode.fill(model, ids, lengths, cache, torch.arange(3))
        found = written(model, ids, lengths, cache, 3)
    assert (True, kind, kind) in kinds
    assert not any(one and (query, key) != (kind, kind) for one, query, key in kinds)
    with torch.no_grad():
        wanted = whole(model, ids, lengths, 3)
    assert 1e-5 < float((found.float() - wanted).abs().mean()) < 1e-2 * float(wanted.abs().max())
