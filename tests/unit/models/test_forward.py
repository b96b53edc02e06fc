"""Log-probs, values and scores against transformers' own full forward pass, sequence by sequence, without padding."""

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.models import forward, packed, trials
from align.models.heads import ScalarModel
from align.models.load import load_scalar_model
from align.types import Completions

FAMILIES = tiny.families()


def one_by_one(model: PreTrainedModel, episodes: Completions, temperature: float) -> Tensor:
    """The response tokens' log-probs from logits of each sequence alone."""
    parts = []
    for row in range(len(episodes.ids)):
        start, end = int(episodes.prompt_lengths[row]), int(episodes.lengths[row])
        logits = model(episodes.ids[row : row + 1, :end]).logits[0]
        scored = (logits / temperature).log_softmax(-1)[start - 1 : end - 1]
        parts.append(scored.gather(1, episodes.ids[row, start:end, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_sequence_alone(name: str, temperature: float) -> None:
    episodes = tiny.completions([3, 9, 1, 5], [4, 1, 7, 5])
    with torch.no_grad():
        ours = forward.token_logprobs(FAMILIES[name], episodes.ids, episodes.token_mask, temperature)
        theirs = one_by_one(FAMILIES[name], episodes, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gemma_is_the_family_whose_logits_are_capped() -> None:
    device = torch.device("cpu")
    assert {name for name, model in FAMILIES.items() if not trials.has_plain_head(model, device)} == {"gemma2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_columns_change_nothing(name: str) -> None:
    episodes = tiny.completions([3, 6], [4, 2])
    ids, mask = episodes.ids, episodes.token_mask
    padded_ids = torch.nn.functional.pad(ids, (0, 7), value=tiny.EOS)
    padded_mask = torch.nn.functional.pad(mask, (0, 7), value=False)
    with torch.no_grad():
        narrow = forward.token_logprobs(FAMILIES[name], ids, mask)
        wide = forward.token_logprobs(FAMILIES[name], padded_ids, padded_mask)
    torch.testing.assert_close(wide, narrow, rtol=1e-5, atol=1e-5)


def test_chunks_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    episodes, model = tiny.completions([3, 6, 2], [4, 5, 3]), tiny.llama()
    whole = forward.token_logprobs(model, episodes.ids, episodes.token_mask)
    whole.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(forward, "LOGITS_PER_CHUNK", 5 * tiny.VOCAB)
    chunked = forward.token_logprobs(model, episodes.ids, episodes.token_mask)
    chunked.square().sum().backward()
    torch.testing.assert_close(chunked, whole)
    assert expected and all(
        torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
        for name, p in model.named_parameters()
    )
    with torch.no_grad():
        torch.testing.assert_close(forward.token_logprobs(model, episodes.ids, episodes.token_mask), whole)


def test_entropies_and_hits_belong_to_the_scored_tokens() -> None:
    episodes, model = tiny.completions([3, 2], [2, 3]), FAMILIES["llama-tied"]
    with torch.no_grad():
        logprobs, entropies = forward.token_logprobs_and_entropies(model, episodes.ids, episodes.token_mask, 0.7)
        _, hits = forward.token_logprobs_and_hits(model, episodes.ids, episodes.token_mask)
        logits = torch.cat(
            [model(episodes.ids[row : row + 1, :5]).logits[0, start - 1 : 4] for row, start in ((0, 3), (1, 2))]
        )
    logp = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(entropies, -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-5)
    targets = torch.cat([episodes.ids[0, 3:5], episodes.ids[1, 2:5]])
    torch.testing.assert_close(logprobs, logp.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    assert hits.tolist() == (logits.argmax(-1) == targets).float().tolist()


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> ScalarModel:
    folder = tmp_path_factory.mktemp("lm")
    tiny.llama().save_pretrained(folder)
    return load_scalar_model(str(folder), seed=3)


def test_final_score_is_transformers_own_at_the_last_token(scalar: ScalarModel) -> None:
    episodes = tiny.completions([3, 6, 2], [4, 2, 3])
    with torch.no_grad():
        ours = forward.final_scores(scalar, episodes.ids, episodes.lengths)
        theirs = [scalar.hf(episodes.ids[i : i + 1, : int(episodes.lengths[i])]).logits[0, 0] for i in range(3)]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=1e-5)


def test_bias_is_subtracted_from_scores_and_values(scalar: ScalarModel) -> None:
    episodes = tiny.completions([3, 6], [4, 2])
    with torch.no_grad():
        before = forward.final_scores(scalar, episodes.ids, episodes.lengths)
        values = forward.token_values(scalar, episodes.ids, episodes.token_mask)
        scalar.bias = 0.75
        torch.testing.assert_close(forward.final_scores(scalar, episodes.ids, episodes.lengths), before - 0.75)
        torch.testing.assert_close(forward.token_values(scalar, episodes.ids, episodes.token_mask), values - 0.75)
        scalar.bias = 0.0


def test_the_scalar_head_is_in_float32_in_mixed_precision(scalar: ScalarModel) -> None:
    """Values and scores are told to seven digits, not to the two or three of bfloat16."""
    episodes = tiny.completions([3, 5, 2], [4, 1, 3])
    packed.padded.add(scalar.hf)  # so that states are the very same below
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = forward.final_scores(scalar, episodes.ids, episodes.lengths)
        rows = scalar.hf.base_model(input_ids=episodes.ids, use_cache=False).last_hidden_state
        values = forward.token_values(scalar, episodes.ids, episodes.token_mask)
    last = rows[torch.arange(3), episodes.lengths - 1]
    assert last.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, (last @ scalar.head.weight.T)[:, 0] - scalar.bias, rtol=1e-5, atol=1e-6)
    assert not torch.equal(values, values.bfloat16().float())


def test_a_value_is_read_before_its_token(scalar: ScalarModel) -> None:
    episodes = tiny.completions([3], [4])
    with torch.no_grad():
        values = forward.token_values(scalar, episodes.ids, episodes.token_mask)
        hidden = scalar.hf.base_model(episodes.ids).last_hidden_state[0]
        torch.testing.assert_close(values, scalar.hf.score(hidden)[2:6, 0])  # tokens 3..6 are read at 2..5
        changed = episodes.ids.clone()
        changed[0, 6] = 5  # the last token cannot change any value
        torch.testing.assert_close(forward.token_values(scalar, changed, episodes.token_mask), values)


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = torch.tensor([5, 30, 7, 7, 6, 31, 2])
    groups = packed.micro_batches(lengths, 32)
    assert [sorted(group.tolist()) for group in groups] == [[5], [1], [0, 2, 3, 4], [6]]
    assert all(len(group) * int(lengths[group].max()) <= 32 for group in groups)
    assert [group.tolist() for group in packed.micro_batches(lengths, 1)] == [[5], [1], [2], [3], [4], [0], [6]]


def test_by_response_lays_tokens_out_in_rows_and_passes_gradients() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    flat = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    laid = forward.by_response(flat, mask)
    assert laid.tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]
    (laid * torch.tensor([[1.0, 10.0, 100.0], [1000.0, 1.0, 1.0]])).sum().backward()
    assert flat.grad is not None and flat.grad.tolist() == [1.0, 10.0, 1000.0]


def test_evaluating_restores_each_submodules_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model.train()
    model[1].eval()
    with trials.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
