"""Frozen lower blocks: what learns, that going on from them gives what whole passes give, and who may share them."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from unit.modules.test_ppo import Collecting, data

from align.models import adapters, forward, hydra
from align.models.adapters import LoRA
from align.models.attention import use_attend
from align.models.heads import ScalarModel
from align.models.load import add_residual_dropout, frozen, load_causal_lm, load_scalar_model, save_model
from align.models.trunk import Adapter, Head
from align.modules.ppo import PPO
from align.optim import Optim
from align.rollout.sampler import DecodeSampler

TEXTS = {"pretraining": [{"text": "w3 w4 w5"}] * 8, "pretraining_batch": 4, "max_pretraining_tokens": 20}

FAMILIES = ["gpt2", "llama-tied", "llama-untied", "qwen2", "qwen3", "gemma2"]


def scalar_of(model: Any, seed: int = 1) -> ScalarModel:
    """A scalar model with a trunk like a Llama's, and a head of its own."""
    made = tiny.scalar_model(seed, tied=model.config.tie_word_embeddings, num_hidden_layers=3)
    made.hf.base_model.load_state_dict(model.base_model.state_dict())
    return made


def three_blocks(**changes: Any) -> Any:
    return tiny.llama(initializer_range=0.1, num_hidden_layers=3, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_from_frozen_blocks_is_a_whole_pass(family: str) -> None:
    model = tiny.families()[family].train()
    for module in model.modules():  # GPT-2's own, which loading switches off
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    hydra.freeze(model, 1)
    episodes = tiny.completions([3, 6, 2], [5, 2, 7])
    ids, mask = episodes.ids, episodes.token_mask
    states = hydra.below(model, ids, hydra.depth(model))
    assert states.depth == 1 and not states.hidden.requires_grad
    calls = []
    first = next(m for m in model.modules() if type(m).__name__ in model._no_split_modules)
    first.register_forward_hook(lambda *_: calls.append(1))
    value = Head().on(model, "value", trained=True)
    torch.nn.init.normal_(value.head.weight)
    forward.token_logprobs(model, ids, mask)  # a trial of the model's head comes with the first pass
    calls.clear()
    found = []
    for below in (None, states):
        logprobs, entropies, values = forward.token_logprobs_entropies_and_values(model, value, ids, mask, 0.7, below)
        weights = torch.linspace(-1.0, 1.0, len(logprobs))
        loss = (weights * logprobs).sum() + (weights * entropies).sum() + values.square().sum()
        assert torch.equal(logprobs, forward.token_logprobs(model, ids, mask, 0.7, below))
        assert torch.equal(entropies, forward.token_logprobs_and_entropies(model, ids, mask, 0.7, below)[1])
        assert torch.equal(values, forward.token_values(value, ids, mask, below))
        gradients = tiny.gradients(torch.nn.ModuleList([model, value]), [(loss, None)])
        found.append((logprobs, entropies, values, gradients))
        assert bool(calls) == (below is None)
        calls.clear()
    (*whole, own), (*gone_on, theirs) = found
    for one, other in zip(whole, gone_on, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    tiny.assert_same_gradients(own, theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_last_blocks_and_what_stands_behind_them_learn(tied: bool) -> None:
    model = three_blocks(tied=tied)
    assert hydra.depth(model) == 0
    hydra.freeze(model, 2)
    learns = {".".join(name.split(".")[:3]) for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"model.layers.1", "model.layers.2", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert hydra.depth(model) == 1 and hydra.depth(frozen(model)) == 2
    model.model.embed_tokens.requires_grad_(True)
    assert hydra.depth(model) == 0


@pytest.mark.parametrize("count", [0, 4])
def test_a_number_of_blocks_that_the_model_lacks_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"trained_blocks: got {count}, expected 1 to 3, the number of the model's"):
        hydra.freeze(three_blocks(), count)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_frozen_alike_is_kept_once(tied: bool) -> None:
    policy = three_blocks(tied=tied)
    value, reward = scalar_of(policy), frozen(scalar_of(policy, 2))
    for model in (policy, value.hf):
        hydra.freeze(model, 1)
    reference = frozen(copy.deepcopy(policy))
    grown = hydra.grow(policy, {"a": reference, "b": value.hf, "c": reward.hf, "d": policy, "e": None})
    assert grown.depth == 2 and grown.described() == "2 frozen blocks are one for policy, a, b, c, d, e"
    own = {id(p) for p in policy.parameters()}
    for model in (reference, value.hf, reward.hf):
        for name, parameter in model.named_parameters():
            lower = any(part in name for part in ("embed_tokens", "layers.0.", "layers.1.")) or (tied and "lm" in name)
            assert (id(parameter) in own) == lower, name
    if tied:
        assert reference.lm_head.weight is policy.model.embed_tokens.weight
    states = grown.below(torch.tensor([[3, 4]]))
    assert states is not None and grown.given(policy, states) is grown.given(value.hf, states) is states
    assert grown.given(three_blocks(), states) is None
    assert hydra.Hydra(policy).below(torch.tensor([[3, 4]])) is None
    assert hydra.grow(policy, {"x": three_blocks()}).described() == "the policy's frozen blocks are no other network's"


def _other_weights(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.detach()[0, 0] += 1e-3


def _other_embeddings(model: Any) -> None:
    model.model.embed_tokens.weight.detach()[-1, 0] += 1e-3  # of a token that no trial would see


def _learns_below(model: Any) -> None:
    model.model.layers[0].requires_grad_(True)


def _other_angles(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 1.1


def _looks_less_far(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}


def _drops(model: Any) -> None:
    add_residual_dropout(model, 0.5)


@pytest.mark.parametrize(
    "change", [_other_weights, _other_embeddings, _learns_below, _other_angles, _looks_less_far, _drops]
)
def test_what_is_not_alike_is_not_shared(change: Any) -> None:
    policy = three_blocks()
    hydra.freeze(policy, 1)
    other = copy.deepcopy(policy)
    change(other)
    assert not hydra.join(policy, other)
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in other.parameters()}
    assert hydra.join(policy, copy.deepcopy(policy))


def _learns_before_its_blocks(model: Any) -> None:
    model.model.shift = torch.nn.Parameter(torch.zeros(32))
    model.model.embed_tokens.register_forward_hook(lambda *about: about[-1] + model.model.shift)


def _names_no_blocks(model: Any) -> None:
    model.requires_grad_(True)
    model._no_split_modules = None


def test_a_policy_that_drops_or_learns_below_shares_nothing() -> None:
    for change in (_drops, _learns_below, _learns_before_its_blocks, _names_no_blocks):
        policy = three_blocks()
        hydra.freeze(policy, 1)
        change(policy)
        assert not hydra.join(policy, frozen(copy.deepcopy(policy)))


def test_blocks_that_cannot_be_stood_in_for_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = three_blocks()
    hydra.freeze(policy, 1)
    plain = hydra.StandIn.forward

    def halved(self: Any, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        given = self.hidden is not None
        return plain(self, hidden_states) / (2.0 if given else 1.0)

    def refused(self: Any, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        raise TypeError("no such argument")

    for wrong in (halved, refused):
        monkeypatch.setattr(hydra.StandIn, "forward", wrong)
        assert not hydra.join(policy, frozen(copy.deepcopy(policy)))
        names = [type(block).__name__ for block in policy.model.layers]
        assert names == ["LlamaDecoderLayer"] * 3  # they are back in their places


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a reward model that is an adapter of its last block."""
    folder = tmp_path_factory.mktemp("models")
    save_model(three_blocks(), tiny.tokenizer(), folder / "base")
    reward = load_scalar_model(str(folder / "base"), lora=LoRA(rank=3), trained_blocks=1, seed=1)
    for number, (_, parameter) in enumerate(adapters.named_parameters(reward.hf, adapters.OWN)):
        parameter.detach().normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    save_model(reward, tiny.tokenizer(), folder / "reward")
    return folder


def adapted(folders: Path, value: str, share: bool, checkpointing: bool) -> Collecting:
    """PPO whose networks are adapters of the last block: of one trunk, or the value network's of its own."""
    base: dict[str, Any] = {
        "path": str(folders / "base"), "trained_blocks": 1, "gradient_checkpointing": checkpointing,
        "quantise": "4bit" if value.endswith("4bit") else None,
    }  # fmt: skip
    adapter = Adapter(path=str(folders / "reward"))
    apart = "apart" in value
    return Collecting(
        policy=load_causal_lm(lora=LoRA(rank=4), seed=2, **base), reward=tiny.scalar_model(2) if apart else adapter,
        value=load_scalar_model(lora=LoRA(rank=3), seed=2, **base) if apart else adapter, share_frozen=share,
        sampler=DecodeSampler(max_new_tokens=9, temperature=0.7), tokenizer=tiny.tokenizer(),
        ppo=PPO(ptx_coef=0.3), optim=Optim(lr=1e-2), micro_batch_tokens=40,
    )  # fmt: skip


def ppo_of(share: bool, value: str, checkpointing: bool = False) -> Collecting:
    policy = three_blocks()
    network: Any = Head() if value == "head" else scalar_of(policy)
    for model in (policy, *([network.hf] if value == "frozen alike" else [])):
        hydra.freeze(model, 1)
        if checkpointing:
            model.gradient_checkpointing_enable()
    return Collecting(
        policy=policy, value=network, reward=tiny.scalar_model(2), share_frozen=share,
        sampler=DecodeSampler(max_new_tokens=9, temperature=0.7), tokenizer=tiny.tokenizer(),
        ppo=PPO(ptx_coef=0.3), optim=Optim(lr=1e-2), micro_batch_tokens=40,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "checkpointing"),
    [
        ("frozen alike", False), ("frozen alike", True), ("trained whole", False), ("head", False),
        ("adapters, 4bit", True), ("adapters apart", False),
    ],
)  # fmt: skip
def test_ppo_learns_the_same_with_shared_blocks_in_fewer_passes(
    tmp_path: Path, value: str, checkpointing: bool, folders: Path
) -> None:
    runs, computed, lora = [], [], value.startswith("adapters")
    for share in (False, True):
        ppo = adapted(folders, value, share, checkpointing) if lora else ppo_of(share, value, checkpointing)
        rows = [0]

        def counting(_block: Any, _: Any, named: Any, hidden: Tensor, rows: list[int] = rows) -> None:
            lying = named.get("packed")  # end to end
            count = sum(sequences for sequences, _ in lying.bands) if lying else hidden.shape[0]
            rows[0] += count * (hidden.shape[1] > 1)  # of passes that write no token

        for model in {ppo.policy, ppo.reference, ppo.value.hf} - {None}:
            model.base_model.layers[0].register_forward_hook(counting, with_kwargs=True)
        tiny.fit(ppo, data(**TEXTS, epochs=2), tmp_path / str(share))
        runs.append(ppo)
        computed.append(rows[0])
    apart, together = runs
    assert (together.frozen.hydra.depth, apart.frozen.hydra.depth) == (2, 0)
    if value == "adapters, 4bit":  # whose reward model is on the policy as well, but may reach further down
        assert list(together.frozen.hydra.heads) == ["reference", "value"]
    # 32 episodes: once by policy, reference and value network, and twice more by those that learn from each twice; the
    # policy's once for all of them. Texts (32 rows), prompts and trials come to both.
    own = 1 if value == "head" else 2
    once = 32 * (3 * own + 1)
    now = 32 * (1 + (3 if value == "trained whole" else 0))
    assert computed[0] - computed[1] == pytest.approx(once - now, abs=16)
    for (batch, metrics), (other_batch, other) in zip(apart.seen, together.seen, strict=True):
        assert torch.equal(batch.episodes.completions.ids, other_batch.episodes.completions.ids)
        for name in metrics.keys() - {name for name in metrics if name.startswith("speed/")}:
            torch.testing.assert_close(
                metrics[name].float(),
                other[name].float(),
                rtol=1e-4,
                atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    assert float(together.seen[0][1]["policy/ratio_max"]) == 1.0
    assert float(together.seen[0][1]["rollout/kl"]) == 0.0 != float(together.seen[4][1]["rollout/kl"])
    ours, theirs = (dict(run.named_parameters()) for run in (together, apart))
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    sizes = [sum(p.numel() for p in run.parameters()) for run in (together, apart)]
    assert sizes[0] == sizes[1] if lora and "apart" not in value else sizes[0] < sizes[1]


def test_adapters_of_the_last_block_share_the_others_in_few_bits_too(folders: Path) -> None:
    ppo, whole = (adapted(folders, f"adapters apart, {bits}", True, False) for bits in ("4bit", "32bit"))
    assert not hydra.join(ppo.policy, whole.value.hf)  # rounded or not
    assert hydra.join(ppo.policy, ppo.value.hf) and hydra.depth(ppo.policy) == 2
    for number, alike in ((0, True), (2, False)):
        codes, theirs = (model.base_model.layers[number].mlp.up_proj for model in (ppo.policy, ppo.value.hf))
        if number == 2:
            codes, theirs = codes.base_layer, theirs.base_layer
        assert (codes.weight is theirs.weight, codes.scales is theirs.scales) == (alike, alike)
    everywhere = load_causal_lm(str(folders / "base"), lora=LoRA(rank=4))
    assert hydra.depth(everywhere) == 0


def test_what_is_kept_is_what_would_be_computed_again(tmp_path: Path) -> None:
    ppo = ppo_of(True, "frozen alike")
    tiny.fit(ppo, data(**TEXTS, epochs=2), tmp_path)
    batch, _ = ppo.seen[-1]  # of the last rollout, in another order than it was collected
    states = ppo.frozen.of(batch, 1)
    assert states is not None and batch.index.tolist() != sorted(batch.index.tolist())
    kept = tiny.gradients(ppo, ppo.ppo_losses(batch.episodes, states))
    again = tiny.gradients(ppo, ppo.ppo_losses(batch.episodes, None))
    tiny.assert_same_gradients(kept, again)
    wrong = tiny.gradients(ppo, ppo.ppo_losses(batch.episodes, lambda rows, width: states(rows.flip(0), width)))
    assert any(not torch.allclose(wrong[name], again[name], atol=1e-4) for name in again)
    before = states(torch.tensor([0]), 3).hidden
    other = replace(batch, whole=batch.whole.rows_at(torch.arange(15, -1, -1)))
    found = ppo.frozen.of(other, 1)  # other episodes under the same numbers
    assert found is not None and not torch.equal(found(torch.tensor([0]), 3).hidden, before)
    assert ppo.frozen.of(batch, 2) is None


def test_the_first_ratio_is_exactly_one_in_mixed_precision(tmp_path: Path) -> None:
    ppo = ppo_of(True, "frozen alike")
    for model in (ppo.policy, ppo.reference, ppo.value.hf):
        use_attend(model)
    tiny.fit(ppo, data(**TEXTS), tmp_path, precision="bf16-mixed")
    assert ppo.frozen.hydra.depth == 2
    assert float(ppo.seen[0][1]["policy/ratio_max"]) == 1.0 and float(ppo.seen[0][1]["rollout/kl"]) == 0.0
    assert float(ppo.seen[0][1]["rollout/mismatch"]) < 0.05


def test_it_goes_on_from_a_checkpoint_without_the_shared_weights(tmp_path: Path) -> None:
    whole, continued = ppo_of(True, "frozen alike"), ppo_of(True, "frozen alike")
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    tiny.fit(whole, data(**TEXTS, epochs=2), tmp_path / "whole", [saved], enable_checkpointing=True)
    kept = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".layers.")[1][0] for name in kept if ".layers." in name} == {"2"}
    assert not any("embed" in name for name in kept)
    # In the second epoch of a rollout, whose states are then computed again, in the shapes of the first.
    tiny.fit(continued, data(**TEXTS, epochs=2), tmp_path / "continued", from_checkpoint=tmp_path / "step=3.ckpt")
    assert (len(whole.seen), len(continued.seen)) == (8, 5)
    for (name, one), other in zip(whole.named_parameters(), continued.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert continued.policy.model.layers[0].mlp.up_proj.weight is continued.value.hf.model.layers[0].mlp.up_proj.weight


def test_folders_are_loaded_frozen_and_saved_whole(tmp_path: Path) -> None:
    save_model(three_blocks(), tiny.tokenizer(), tmp_path / "base")
    path = str(tmp_path / "base")
    model = load_causal_lm(path, trained_blocks=1, gradient_checkpointing=True)
    reward = load_scalar_model(path, trained_blocks=2)
    calls: list[int] = []
    model.model.layers[1].register_full_backward_hook(lambda *_: calls.append(1))
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert not calls and model.model.layers[2].mlp.up_proj.weight.grad is not None
    assert hydra.depth(model) == 2 and hydra.depth(reward.hf) == 1 and reward.head.weight.requires_grad
    save_model(reward, tiny.tokenizer(), tmp_path / "reward")
    again = load_scalar_model(str(tmp_path / "reward"), trained_blocks=1)
    assert hydra.join(model, again.hf)
    with pytest.raises(ValueError, match=r"trained_blocks: got 4, expected 1 to 3"):
        load_causal_lm(path, trained_blocks=4, lora=LoRA(rank=2))
    with pytest.raises(ValueError, match=r"trained_blocks: got 1 beside quantise, which freezes all weights already"):
        load_scalar_model(path, trained_blocks=1, quantise="8bit")
