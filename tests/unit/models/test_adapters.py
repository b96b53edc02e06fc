"""LoRA: nothing changes at first, the formula, several adapters apart, merged weights, and peft's own reading."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from align.models import adapters, deferred, hydra, sharding
from align.models.adapters import OWN, LoRA
from align.models.load import load_causal_lm, load_scalar_model, quantise_model, save_model
from align.models.quantised import Bits

FAMILIES = ("gpt2", "llama-tied", "llama-untied", "qwen3", "gemma2")
IDS = torch.arange(3, 21).view(2, 9)


def adapted(model: PreTrainedModel, name: str = OWN, seed: int = 5, **lora: object) -> PreTrainedModel:
    """The model with an adapter that says something."""
    adapters.add(model, LoRA(**{"rank": 4, "alpha": 6.0, **lora}), name=name)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapters.named_parameters(model, name):
        parameter.detach().normal_(std=0.2, generator=generator)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, "8bit", "4bit"])
def test_merged_weights_compute_what_the_adapter_computes(family: str, bits: Bits | None) -> None:
    model = tiny.families()[family]
    plain = copy.deepcopy(model)
    if bits is not None:
        quantise_model(model, bits)
    before = logits(model)
    adapters.add(model, LoRA(rank=4, alpha=6.0))
    assert torch.equal(logits(model), before)  # B is 0
    adapted(model, name="other")
    with adapters.using(model, "other"):
        changed = logits(model)
    with adapters.using(model, None):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before) and float((changed - before).abs().max()) > 0.1
    for (_, own), (_, other) in zip(
        adapters.named_parameters(model, OWN), adapters.named_parameters(model, "other"), strict=True
    ):
        own.detach().copy_(other)
    state = model.state_dict()
    lacking = plain.load_state_dict(dict(adapters.merged(model, state.__getitem__)), strict=False)
    assert not lacking.unexpected_keys and set(lacking.missing_keys) <= {"lm_head.weight"}  # tied
    assert torch.equal(logits(model), changed)
    torch.testing.assert_close(logits(plain), changed, rtol=1e-3, atol=5e-4)


def test_the_update_is_alpha_over_rank_times_b_a() -> None:
    model = tiny.llama()
    base = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    adapted(model, rank=3, alpha=12.0)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(5, 32)
    a, b = layer.lora_A[OWN].weight, layer.lora_B[OWN].weight
    assert a.shape == (3, 32) and b.shape == (48, 3)
    torch.testing.assert_close(layer(x), x @ (base + 12.0 / 3 * b @ a).T, rtol=1e-4, atol=1e-4)


def test_only_what_is_in_use_learns_and_the_frozen_stays_frozen() -> None:
    model = adapted(adapted(tiny.llama()), name="value", rank=2)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for which in (OWN, "value") for name, _ in adapters.named_parameters(model, which)}
    with adapters.using(model, "value"):
        logits(model).square().sum().backward()
    assert all(p.grad is None for _, p in adapters.named_parameters(model, OWN))
    assert all(p.grad is not None and p.grad.any() for _, p in adapters.named_parameters(model, "value"))
    assert learning == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_initial_weights_are_uniform_and_depend_on_the_seed_alone() -> None:
    first, same, other = (tiny.llama() for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        torch.rand(seed)  # what is left over does not matter
        adapters.add(model, LoRA(rank=16), seed=seed)
    drawn = [dict(adapters.named_parameters(model, OWN)) for model in (first, same, other)]
    name = "model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(drawn[0][name], drawn[1][name]) and not torch.equal(drawn[0][name], drawn[2][name])
    largest = float(drawn[0][name].abs().max())
    assert 0.95 / 32**0.5 < largest <= 1 / 32**0.5
    assert float(drawn[0][name].std()) == pytest.approx(1 / (3 * 32) ** 0.5, rel=0.1)
    assert not any(bool(value.any()) for place, value in drawn[0].items() if ".lora_B." in place)


def test_adapters_are_kept_in_float32_whatever_the_weights_are() -> None:
    model = tiny.llama().to(dtype=torch.bfloat16)
    adapters.add(model, LoRA())
    assert {parameter.dtype for _, parameter in adapters.named_parameters(model, OWN)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_targets_are_named_or_all_and_others_refused() -> None:
    model = tiny.llama()
    adapters.add(model, LoRA(targets=["q_proj"]))
    assert {name.split(".")[-4] for name, _ in adapters.named_parameters(model, OWN)} == {"q_proj"}
    everything = tiny.gpt2()
    adapters.add(everything, LoRA())
    assert {name.split(".")[-4] for name, _ in adapters.named_parameters(everything, OWN)} == {
        "c_attn", "c_proj", "c_fc",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no linear layer 'query' in its blocks \(known: down_proj, .*, v_proj\)"):
        adapters.add(tiny.llama(), LoRA(targets=["q_proj", "query"]))


def test_dropout_acts_on_the_update_alone() -> None:
    model = adapted(tiny.llama(), dropout=0.5).train()
    assert not torch.equal(logits(model), logits(model))
    with adapters.using(model, None):
        assert torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny.gpt2(n_embd=64).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize(("bits", "trained"), [(None, None), (None, 1), ("4bit", None)])
def test_peft_reads_what_is_written_of_a_reward_model(
    folder: str, bits: Bits | None, trained: int | None, tmp_path: Path
) -> None:
    lora = LoRA(rank=4, targets=["c_attn", "c_fc"])
    model = load_scalar_model(folder, lora=lora, quantise=bits, trained_blocks=trained, seed=3)
    assert {name for name, p in model.hf.named_parameters() if p.requires_grad and ".lora_" not in name} == {
        "score.weight"
    }
    for _, parameter in adapters.named_parameters(model.hf, OWN):
        parameter.detach().normal_(std=0.3)
    save_model(model, tiny.tokenizer(), tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    theirs = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert len(list(adapters.named_parameters(theirs, OWN))) == len(list(adapters.named_parameters(model.hf, OWN)))
    merged = load_scalar_model(str(tmp_path / "out"))
    model.hf.eval()
    # Without a padding token transformers reads one sequence at a time.
    one = model.hf(IDS[:1]).logits
    torch.testing.assert_close(merged.hf.eval()(IDS[:1]).logits, one, rtol=1e-4, atol=1e-4)
    if bits is None:
        torch.testing.assert_close(theirs(IDS[:1]).logits, one, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_read_again_bit_for_bit_also_without_weights(folder: str, tmp_path: Path) -> None:
    model = load_causal_lm(folder, lora=LoRA(rank=4), quantise="8bit").eval()
    for _, parameter in adapters.named_parameters(model, OWN):
        parameter.detach().normal_(std=0.3)
    save_model(model, tiny.tokenizer(), tmp_path / "out")
    wanted = logits(model)
    again = load_causal_lm(folder, lora=LoRA(rank=2), quantise="8bit").eval()
    with deferred.weights():
        later = load_causal_lm(folder, lora=LoRA(rank=2), quantise="8bit").eval()
    assert all(parameter.is_meta for parameter in later.parameters())
    for one in (again, later):
        rest = adapters.read(one, tmp_path / "out" / "adapter", name="reward", trained=False)
        assert rest == {}
    deferred.fill(later, torch.device("cpu"))
    for one in (again, later):
        with adapters.using(one, "reward"):
            assert torch.equal(logits(one), wanted)
        assert not torch.equal(logits(one), wanted)
        assert not any(parameter.requires_grad for _, parameter in adapters.named_parameters(one, "reward"))
        assert all(parameter.requires_grad for _, parameter in adapters.named_parameters(one, OWN))


@pytest.mark.parametrize("bits", [None, "4bit"])
def test_an_adapter_of_the_last_blocks_is_read_again_as_such(folder: str, bits: Bits | None, tmp_path: Path) -> None:
    model = load_causal_lm(folder, lora=LoRA(rank=4), quantise=bits, trained_blocks=1).eval()
    names = [name for name, _ in adapters.named_parameters(model, OWN)]
    assert names and all(name.startswith("transformer.h.1.") for name in names)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    for _, parameter in adapters.named_parameters(model, OWN):
        parameter.detach().normal_(std=0.3)
    save_model(model, tiny.tokenizer(), tmp_path / "out")
    again = load_causal_lm(folder, lora=LoRA(rank=2), quantise=bits).eval()
    before = logits(again)
    adapters.read(again, tmp_path / "out" / "adapter", name="value", trained=True)
    assert [name.replace(".value.", ".default.") for name, _ in adapters.named_parameters(again, "value")] == names
    assert torch.equal(logits(again), before)
    with adapters.using(again, "value"):
        assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), before)
    lora, blocks = adapters.form(model)
    assert (lora.rank, blocks) == (4, [1]) and adapters.form(again)[1] is None


def test_an_adapter_of_other_weights_or_another_shape_is_refused(folder: str, tmp_path: Path) -> None:
    save_model(load_causal_lm(folder, lora=LoRA(rank=4)), tiny.tokenizer(), tmp_path / "out")
    tiny.gpt2(n_embd=32).save_pretrained(tmp_path / "small")
    small = load_causal_lm(str(tmp_path / "small"))
    with pytest.raises(ValueError, match=r"was trained on .*base, and the policy is .*small"):
        adapters.read(small, tmp_path / "out" / "adapter", name="reward", trained=False)
    small.config._name_or_path = folder
    with pytest.raises(ValueError, match=r"has no transformer.h.0.attn.c_attn.lora_A.weight of shape \(4, 32\)"):
        adapters.read(small, tmp_path / "out" / "adapter", name="reward", trained=False)
    config = tmp_path / "out" / "adapter" / adapters.CONFIG
    config.write_text(config.read_text().replace('"layers_to_transform": null', '"layers_to_transform": [1]'))
    with pytest.raises(ValueError, match=r"a tensor that no layer of the policy takes: transformer.h.0.attn.c_attn"):
        adapters.read(load_causal_lm(folder), tmp_path / "out" / "adapter", name="reward", trained=False)


def test_blocks_are_numbered_as_in_their_list() -> None:
    """Some models keep embeddings on one device, as they do blocks."""
    model = tiny.llama(num_hidden_layers=3)
    model._no_split_modules = ["Embedding", "LlamaDecoderLayer"]
    assert len(sharding.blocks(model)) == 4
    assert list(sharding.numbered_blocks(model).items()) == list(enumerate(model.model.layers))
    adapters.add(model, LoRA(rank=2), blocks=hydra.last_blocks(model, 2))
    assert {name.split(".")[2] for name, _ in adapters.named_parameters(model, OWN)} == {"1", "2"}
    assert adapters.form(model)[1] == [1, 2]
    adapters.add(whole := tiny.llama(), LoRA(rank=2))
    assert adapters.form(whole)[1] is None
    hydra.freeze(other := tiny.llama(num_hidden_layers=3), 1)
    assert not other.model.layers[1].mlp.up_proj.weight.requires_grad


def test_blocks_are_all_that_is_adapted() -> None:
    model = adapted(tiny.llama(tied=False))
    inside = {id(p) for block in sharding.blocks(model) for p in block.parameters()}
    assert all(id(parameter) in inside for _, parameter in adapters.named_parameters(model, OWN))
