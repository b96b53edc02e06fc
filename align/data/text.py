"""Pretraining text: every token of a text is learned. For a base model, and for the pretraining term of PPO-ptx.

Examples are `{text}`. A text longer than the limit becomes several sequences, none of it is lost.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.data.base import CUT_TEXT, NOTHING_LEARNED, AlignData, Encoded, compact, filler, sequences
from align.data.sources import Source
from align.data.templates import tokenize, whole_text
from align.types import Sequences


class TextData(AlignData):
    """Plain text to learn as a whole; batches are `Sequences`.

    Args:
        tokenizer: Must have an EOS token, which ends every text.
        train: Texts to train on, as `{text}`.
        valid: Texts to validate on.
        batch_size: Sequences of one optimizer step, all ranks together.
        valid_batch_size: Sequences of one validation batch; default: batch_size.
        max_tokens: Length of the longest sequence, in tokens; longer texts are cut into several.
        seed: Decides the training order.
        num_workers: Processes that collate batches.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        train: Source,
        valid: Source | None = None,
        batch_size: int,
        valid_batch_size: int | None = None,
        max_tokens: int,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            train=train,
            valid=valid,
            batch_size=batch_size,
            valid_batch_size=valid_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.require(max_tokens=max_tokens)
        self.max_tokens = max_tokens

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """See `AlignData`."""
        return super().config_errors(arguments) + too_short(arguments, "max_tokens")

    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Texts -> sequences of at most `max_tokens` tokens."""
        return encode_texts(self.tokenizer, examples, self.max_tokens, counts)

    def collate(self, encoded: list[Encoded]) -> Sequences:
        """Right-padded sequences; the mask is True everywhere but at position 0, which nothing predicts."""
        return sequences(encoded, filler(self.tokenizer))


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]], max_tokens: int, counts: "Counter[str]"
) -> list[Encoded]:
    """Texts -> `ids` and `mask` of sequences of at most `max_tokens` tokens.

    The pieces of a long text overlap by one token, so each of its tokens but the first is learned exactly once.
    """
    encoded: list[Encoded] = []
    for ids in tokenize(tokenizer, [whole_text(row) for row in examples]):
        counts[NOTHING_LEARNED] += len(ids) < 2
        counts[CUT_TEXT] += len(ids) > max_tokens
        for start in range(0, len(ids) - 1, max_tokens - 1):
            piece = compact(ids[start : start + max_tokens])
            mask = torch.ones(len(piece), dtype=torch.bool)
            mask[0] = False
            encoded.append({"ids": piece, "mask": mask})
    return encoded


def too_short(arguments: dict[str, Any], name: str) -> list[str]:
    """What is wrong with a limit on a text's tokens: of a single token, none would be learned."""
    if arguments.get(name) == 1:
        return [f"{name}: got 1, expected at least 2, since a text's first token is not learned"]
    return []
