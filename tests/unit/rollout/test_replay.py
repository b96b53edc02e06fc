"""Steps that are the same every time, recorded or not, against rows that are laid out anew."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from align import seeds
from align.models import compiled, decode, forward
from align.models.attention import use_attend
from align.models.fixed import FixedSlots
from align.rollout import replay, sampler
from align.rollout.sampler import DecodeSampler
from align.types import Completions, Prompts

CPU = torch.device("cpu")
NAMES = [name for name in tiny.families() if name != "gemma2"]
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def ours(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = tiny.llama(initializer_range=0.1).eval() if name == "llama-untied" else tiny.families()[name]
    use_attend(model)
    return model


def prompts(count: int = 80) -> Prompts:
    """Every fourth of one token, of which nothing is kept before the first step; some are alike."""
    made = tiny.prompts([4, 8, 2, 1] * (count // 4))
    ids = made.ids.clone()
    ids[4:8] = ids[:4]
    return replace(made, ids=ids, seeds=seeds.derive_all(3, "sample", range(count)))


def replayed(how: DecodeSampler, model: PreTrainedModel, asked: Prompts) -> Completions:
    """As on a GPU, but not recorded."""
    return sampler._in_batches(how._replay, model, asked, len(asked.ids))


@pytest.mark.parametrize("name", NAMES)
def test_answers_as_slots_do(name: str) -> None:
    model = ours(name)
    assert decode.able(model, CPU, FixedSlots)
    for at_once in (5, 16, 80):
        how = DecodeSampler(max_new_tokens=40, batch_size=at_once)
        expected, found = how(model, prompts()), replayed(how, model, prompts())
        assert 0 < int(expected.finished.sum()) < 80
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.finished, expected.finished)
        assert torch.equal(found.response_lengths, expected.response_lengths)
        torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs, rtol=1e-4, atol=2e-5)


def test_the_likeliest_tokens_are_certain() -> None:
    how = DecodeSampler(max_new_tokens=12, temperature=0.0, batch_size=16)
    model = ours("qwen2")
    found = replayed(how, model, prompts())
    assert torch.equal(found.ids, how(model, prompts()).ids)
    assert found.sampled_logprobs is not None and not found.sampled_logprobs.any()


def test_rows_are_filled_again_and_at_last_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes, begun = ours("llama-untied"), [], []
    next_logits, begin = decode.next_logits, replay.Rows.begin
    monkeypatch.setattr(
        decode, "next_logits", lambda *given: sizes.append(len(given[1])) or next_logits(*given)
    )  # fmt: skip
    monkeypatch.setattr(
        replay.Rows, "begin", lambda self, *given: begun.append(len(given[3])) or begin(self, *given)
    )  # fmt: skip
    replayed(DecodeSampler(max_new_tokens=40, batch_size=32), model, prompts())
    assert begun[0] == 32 and sum(begun) == 80 and min(begun[:-1]) >= 32 * replay.REFILLED
    assert set(sizes) >= {32, 16} and sizes == sorted(sizes, reverse=True) and min(sizes) >= replay.FEWEST


def test_fewer_rows_only_where_those_left_have_room() -> None:
    assert [replay._fewer(256, going) for going in (256, 129, 128, 65, 64, 1)] == [256, 256, 128, 128, 64, 8]


def test_rows_that_do_not_fit_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, next_logits = [], decode.next_logits
    monkeypatch.setattr(
        decode, "next_logits", lambda *given: sizes.append(len(given[1])) or next_logits(*given)
    )  # fmt: skip
    monkeypatch.setattr(replay, "_that_fit", lambda *_: 9)
    how = DecodeSampler(max_new_tokens=40, batch_size=32)
    found = replayed(how, ours("llama-untied"), prompts())
    assert max(sizes) == 9 and torch.equal(found.ids, how(ours("llama-untied"), prompts()).ids)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_a_token_are_those_kept(name: str) -> None:
    model = ours(name)
    assert decode.able(model, CPU, FixedSlots)
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert decode.bytes_a_token(model, CPU) == 2 * 4 * config.num_hidden_layers * heads * size


def test_rows_that_are_done_ask_for_no_position_that_a_model_lacks() -> None:
    """The last token that is written is never put in, so as many positions are enough."""
    torch.manual_seed(0)
    model = tiny.gpt2(n_positions=24).eval()
    use_attend(model)
    asked = tiny.prompts([8, 2, 5, 8])
    how = DecodeSampler(max_new_tokens=17, temperature=0.0, batch_size=4)
    found = replayed(how, model, asked)
    assert torch.equal(found.ids, how(model, asked).ids) and int(found.lengths.max()) == 25


def test_in_16_bits_weights_are_rounded_once_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, next_logits = ours("llama-tied"), set(), decode.next_logits

    def noting(*given: object) -> torch.Tensor:
        seen.update(id(weight) for weight in model.parameters() if weight.dtype == torch.bfloat16)
        return next_logits(*given)

    monkeypatch.setattr(decode, "next_logits", noting)
    before = dict(model.named_parameters(remove_duplicate=False))
    how = DecodeSampler(max_new_tokens=8, batch_size=80, dtype="bfloat16")
    with how._arithmetic("cpu"):
        found = replayed(how, model, prompts())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert len(seen) == 1 + 7 * model.config.num_hidden_layers  # the same in every step
    assert before.keys() == after.keys() and all(parameter is after[name] for name, parameter in before.items())
    mask = found.mask
    logprobs = forward.by_response(forward.token_logprobs(model, found.ids, found.token_mask), mask)
    assert found.sampled_logprobs is not None
    assert float((found.sampled_logprobs - logprobs.detach())[mask].abs().mean()) < 0.03


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_answer_as_slots_do(name: str) -> None:
    model = ours(name).cuda()
    for at_once in (16, 80):
        found = [
            write(DecodeSampler(max_new_tokens=40, batch_size=at_once), model, prompts().to("cuda")).to("cpu")
            for write in (replayed, DecodeSampler.__call__)  # which records no steps in float32 by itself
        ]
        assert torch.equal(found[0].ids, found[1].ids) and torch.equal(found[0].finished, found[1].finished)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_in_16_bits_know_their_logprobs(name: str) -> None:
    recorded_in_16_bits(name, compiles=False)


@pytest.mark.gpu
@ON_A_GPU
def test_recorded_steps_of_compiled_blocks() -> None:
    """In a process of its own, since what checks shapes in tests cannot be compiled."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, Path(__file__)], check=True, env=environment)


def recorded_in_16_bits(name: str, *, compiles: bool) -> None:
    """What the sampler says of its tokens against a pass in float32."""
    model = ours(name).cuda()
    if compiles:
        compiled.compile_blocks([model], ragged=True)
    how = DecodeSampler(max_new_tokens=40, batch_size=32, dtype="bfloat16")
    with compiled.off():
        found = how(model, prompts().to("cuda")).to("cpu")
    mask, exact = found.mask, ours(name)
    logprobs = forward.by_response(forward.token_logprobs(exact, found.ids, found.token_mask), mask)
    assert found.sampled_logprobs is not None and 0 < int(found.finished.sum()) < 80
    assert float((found.sampled_logprobs - logprobs.detach())[mask].abs().mean()) < 0.03


if __name__ == "__main__":
    recorded_in_16_bits("llama-untied", compiles=True)
