"""Compiled blocks: what stays as it is, and what is refused. Whole steps are in tests/e2e/test_compiled_steps.py."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from compiling import afresh, graphs, model, text

from align.data.comparisons import ComparisonData
from align.data.demonstrations import DemonstrationData
from align.models import compiled, forward, packed, sharding
from align.models.attention import use_attend
from align.modules.reward import RewardModule
from align.modules.sft import SFTModule
from align.optim import Optim

ROWS = [{"prompt": f"w{3 + i} w{4 + i}", "response": f"w{9 + i} w{8 + i}"} for i in range(8)]

SHORT = {"max_prompt_tokens": 20, "max_response_tokens": 20}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    with afresh():
        yield


def sft(**arguments: bool) -> SFTModule:
    return SFTModule(model=model("llama"), tokenizer=tiny.tokenizer(), optim=Optim(lr=1e-3), **arguments)


def data() -> DemonstrationData:
    return DemonstrationData(tokenizer=tiny.tokenizer(), train=ROWS, batch_size=4, **SHORT)


def test_names_copies_and_numbers_stay_what_they_are() -> None:
    plain, ours = model("llama"), model("llama")
    compiled.compile_blocks([ours])
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [type(block) for block in sharding.blocks(ours)] == [type(block) for block in sharding.blocks(plain)]
    ids, mask = torch.arange(3, 15).view(2, 6), torch.tensor([[False] + [True] * 5] * 2)
    expected = forward.token_logprobs(plain, ids, mask)
    assert torch.equal(forward.token_logprobs(copy.deepcopy(ours), ids, mask), expected)
    assert graphs() == 0, "a copy is compiled too"
    packed.padded.add(plain)  # as blocks are that shall be compiled
    expected = forward.token_logprobs(plain, ids, mask)
    with compiled.off():
        assert torch.equal(forward.token_logprobs(ours, ids, mask), expected)
    assert graphs() == 0, "off has no effect"
    assert torch.equal(forward.token_logprobs(ours, ids, mask), expected)
    assert graphs() == 1


def test_what_cannot_be_compiled_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def fails(*_: object) -> None:
        raise NotImplementedError("no such kernel")

    module = sft(compile=True)
    with torch.compiler.set_stance(force_backend=fails), pytest.raises(ValueError, match="no such kernel") as error:
        tiny.fit(module, data(), tmp_path)
    assert "compile: got true, but the blocks of LlamaForCausalLM" in str(error.value)
    assert "C++ compiler" in str(error.value) and "compile: false" in str(error.value)
    assert module.trainer.global_step == 0


def test_a_model_without_blocks_is_refused() -> None:
    made = model("llama")
    made._no_split_modules = []
    with pytest.raises(ValueError, match="does not say what its blocks are"):
        compiled.compile_blocks([made])


def test_a_reward_model_is_compiled_too(tmp_path: Path) -> None:
    module = RewardModule(model=tiny.scalar_model(), tokenizer=tiny.tokenizer(), optim=Optim(lr=1e-3), compile=True)
    rows = [{"prompt": "w3 w4", "responses": ["w5", "w6"], "scores": [1, 0]}] * 4
    tiny.fit(module, ComparisonData(tokenizer=tiny.tokenizer(), train=rows, batch_size=4, **SHORT), tmp_path)
    assert graphs() > 0


def test_a_rehearsal_changes_nothing(tmp_path: Path) -> None:
    plain, ours = sft(), sft(compile=True)
    for module, name in ((plain, "plain"), (ours, "ours")):
        tiny.fit(module, data(), tmp_path / name)
        assert graphs() == (module is ours)  # two steps, of shapes that the rehearsal had not
    for name, weight in plain.model.state_dict().items():
        # Compiled kernels round otherwise, on some CPUs; a step is of 1e-3.
        torch.testing.assert_close(ours.model.state_dict()[name], weight, rtol=0.0, atol=1e-6, msg=name)
    short = tiny.gpt2(n_positions=8)
    compiled.compile_blocks([short])
    compiled.rehearse(short, torch.device("cpu"))
    assert all(parameter.grad is None for parameter in short.parameters())


def test_a_rehearsal_is_as_long_as_nothing_in_a_model() -> None:
    """Of 64 tokens it would be compiled for exactly as many, the size of a head, and again for the first batch."""
    made = tiny.llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64).train()
    use_attend(made)
    compiled.compile_blocks([made])
    compiled.rehearse(made, torch.device("cpu"))
    batch = text([3, 9, 1, 5], [4, 1, 7, 5])
    forward.token_logprobs(made, batch.ids, batch.mask).sum().backward()
    assert graphs() == 1
