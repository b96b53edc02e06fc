"""Demonstrations for supervised fine-tuning: prompts with the responses to imitate, and pretraining text mixed in.

Source: InstructGPT (arXiv:2203.02155) section 3.5 and appendix C.1; the mix is appendix C.3, the model PPO starts from.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.base import (
    CUT_RESPONSE,
    LONG_PROMPT,
    NOTHING_LEARNED,
    AlignData,
    Encoded,
    compact,
    filler,
    sequences,
    tokenize_groups,
)
from align.data.loader import stream
from align.data.sources import Source
from align.data.templates import Piece, Templates
from align.data.text import encode_texts
from align.types import Sequences


class DemonstrationData(AlignData):
    """Prompts and responses for SFT; batches are `Sequences`.

    The prompt of a conversation, as far as limits go, is everything before its last assistant turn.

    Args:
        tokenizer: Must have an EOS token, which ends every response.
        train: Demonstrations to train on.
        valid: Demonstrations to validate on.
        batch_size: Examples of one optimizer step, all ranks together.
        valid_batch_size: Examples of one validation batch; default: batch_size.
        max_prompt_tokens: Examples with longer prompts are dropped.
        max_response_tokens: Longer responses are cut and lose their EOS; counts the EOS.
        loss_on_prompt: Also learn to write the prompts.
        mix: Pretraining texts, as `{text}`, to mix into training.
        mix_fraction: Share of such texts in the training examples, from 0 (none) to below 1; InstructGPT's is 0.1.
        seed: Decides the training order and which texts are mixed in.
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
        max_prompt_tokens: int,
        max_response_tokens: int,
        loss_on_prompt: bool = False,
        mix: Source | None = None,
        mix_fraction: float = 0.0,
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
        self.require(
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            mix=mix,
            mix_fraction=mix_fraction,
        )
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.loss_on_prompt = loss_on_prompt
        self.mix_fraction = mix_fraction
        if mix is not None and mix_fraction > 0:
            self.sources["mix"] = mix

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """See `AlignData`."""
        errors = super().config_errors(arguments)
        mix, fraction = arguments.get("mix"), arguments.get("mix_fraction", 0.0)
        if not 0 <= fraction < 1:
            errors.append(f"mix_fraction: got {fraction}, expected at least 0 and less than 1")
        elif mix is None and fraction > 0:
            errors.append(f"mix: missing, but mix_fraction is {fraction}; name the texts to mix in, or set it to 0")
        return errors

    @property
    def mixed(self) -> int:
        """Pretraining texts in one training epoch."""
        return round(len(self.encoded["train"]) * self.mix_fraction / (1 - self.mix_fraction))

    @property
    def train_size(self) -> int:
        """Demonstrations and mixed-in texts of one training epoch."""
        return len(self.encoded["train"]) + self.mixed

    def training_examples(self) -> list[Encoded]:
        """The demonstrations, and behind them all texts that may be mixed in."""
        return self.encoded["train"] + self.encoded.get("mix", [])

    def order(self, epoch: int) -> Int[Tensor, " size"]:
        """All demonstrations and the epoch's share of the texts, shuffled together; later epochs draw other texts."""
        shuffled = super().order(epoch)
        own = len(self.encoded["train"])
        if self.mixed == 0:
            return shuffled
        texts = stream(len(self.encoded["mix"]), epoch * self.mixed, self.mixed, self.seed, "mix")
        return torch.cat([torch.arange(own), own + texts])[shuffled]

    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Demonstrations -> ids, and a mask that is True at what the assistant says; texts -> all of them."""
        if split == "mix":
            return encode_texts(self.tokenizer, examples, self.max_prompt_tokens + self.max_response_tokens, counts)
        return encode_demonstrations(
            self.templates,
            examples,
            counts,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            loss_on_prompt=self.loss_on_prompt,
        )

    def collate(self, encoded: list[Encoded]) -> Sequences:
        """Right-padded prompts with their responses."""
        return sequences(encoded, filler(self.tokenizer))


def encode_demonstrations(
    templates: Templates,
    examples: Sequence[dict[str, Any]],
    counts: "Counter[str]",
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    loss_on_prompt: bool = False,
) -> list[Encoded]:
    """Demonstrations -> `ids` and `mask`; drops over-long prompts, cuts over-long responses, counts both."""
    groups: list[Sequence[Piece]] = [templates.demonstration(row) for row in examples]
    encoded: list[Encoded] = []
    for pieces, rows in zip(groups, tokenize_groups(templates.tokenizer, groups), strict=True):
        if sum(len(ids) for ids in rows[:-1]) > max_prompt_tokens:
            counts[LONG_PROMPT] += 1
            continue
        if rows and len(rows[-1]) > max_response_tokens:
            counts[CUT_RESPONSE] += 1
            rows[-1] = rows[-1][:max_response_tokens]
        learned = [piece.learned or loss_on_prompt for piece, ids in zip(pieces, rows, strict=True) for _ in ids]
        mask = torch.tensor(learned, dtype=torch.bool)
        mask[:1] = False
        if not mask.any():
            counts[NOTHING_LEARNED] += 1
            continue
        encoded.append({"ids": compact([token for ids in rows for token in ids]), "mask": mask})
    return encoded
