"""Drawing from a vocabulary in stretches, as on a GPU, and as a whole; `test_sampler` has what is drawn."""

import pytest
import torch
from torch import Tensor

from align.rollout import draws
from align.rollout.draws import draw


def logits(rows: int, vocab: int) -> Tensor:
    return 4.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))


@pytest.mark.parametrize("vocab", [3, 1024, 1025, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("as_product", [False, True])
def test_stretches_hit_what_the_whole_hits(
    vocab: int, temperature: float, as_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, points = logits(64, vocab), torch.rand(64, dtype=torch.float64)
    expected = draw(given, temperature, points)
    monkeypatch.setattr(draws, "SHORT", 0)
    if as_product:
        monkeypatch.setattr(draws, "_running_sums", lambda own: own @ own.new_ones(own.shape[1], own.shape[1]).triu())
    token, logprobs = draw(given, temperature, points)
    assert torch.equal(token, expected[0]) and len(token.unique()) > 1
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-6, atol=1e-6)
    exact = (given.double() / temperature).log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("short", [0, draws.SHORT])
def test_what_has_no_probability_is_never_hit(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "SHORT", short)
    given = torch.full((5, 3000), float("-inf"))
    given[:, [7, 1023, 1024, 2990]] = 0.0
    points = torch.tensor([0.0, 0.26, 0.5, 0.75, 1.0 - 2**-53], dtype=torch.float64)
    token, logprobs = draw(given, 1.0, points)
    assert token.tolist() == [7, 1023, 1024, 2990, 2990]
    torch.testing.assert_close(logprobs, torch.full((5,), 0.25).log())


@pytest.mark.parametrize("short", [0, draws.SHORT])
def test_numbers_that_are_none_hit_a_token(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is out of range would end a GPU's work."""
    monkeypatch.setattr(draws, "SHORT", short)
    token, logprobs = draw(torch.full((2, 1500), float("nan")), 1.0, torch.rand(2, dtype=torch.float64))
    assert ((token >= 0) & (token < 1500)).all() and logprobs.isnan().all()
