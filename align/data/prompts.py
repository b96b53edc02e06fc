"""Prompts to be answered: for sampling, evaluation and PPO. The examples travel along, for reward hooks and tables."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from align.data.base import EMPTY_PROMPT, LONG_PROMPT, AlignData, Encoded, compact, filler, padded, tokenize_groups
from align.data.sources import Source, located
from align.data.templates import Templates
from align.types import Prompts


class PromptData(AlignData):
    """The prompts of examples in any format; batches are `Prompts`.

    Args:
        tokenizer: Must have an EOS token.
        train: Examples whose prompts are answered in training.
        valid: Examples whose prompts are answered in validation.
        batch_size: Prompts of one batch, all ranks together.
        valid_batch_size: Prompts of one validation batch; default: batch_size.
        max_prompt_tokens: Longer prompts are dropped.
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
        max_prompt_tokens: int,
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
        self.require(max_prompt_tokens=max_prompt_tokens)
        self.max_prompt_tokens = max_prompt_tokens

    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Examples -> the ids of their prompts, and the examples themselves."""
        return encode_rows(self.templates, examples, self.max_prompt_tokens, counts)

    def collate(self, encoded: list[Encoded]) -> Prompts:
        """Right-padded prompts."""
        return batch_of(encoded, filler(self.tokenizer))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], max_prompt_tokens: int
) -> Prompts:
    """All usable prompts of the rows as one record, to be cut into batches with `rows_at`.

    Args:
        tokenizer: Must have an EOS token.
        rows: Examples in any format that has a prompt; `Prompts.rows` are those whose prompts were kept.
        max_prompt_tokens: Longer prompts are dropped and counted in a log line.

    Raises:
        ValueError: no prompt is usable.
    """
    counts: Counter[str] = Counter()
    examples = [located(row, f"example {number}") for number, row in enumerate(rows)]
    encoded = encode_rows(Templates(tokenizer), examples, max_prompt_tokens, counts)
    dropped = "; ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    if not encoded:
        raise ValueError(f"no usable prompt among {len(rows)} examples. {dropped}; {max_prompt_tokens=}")
    if dropped:
        rank_zero_info(f"prompts: {len(rows):,} examples; {dropped}; {max_prompt_tokens=}")
    return batch_of(encoded, filler(tokenizer))


def encode_rows(
    templates: Templates, examples: Sequence[dict[str, Any]], max_prompt_tokens: int, counts: "Counter[str]"
) -> list[Encoded]:
    """Examples -> the ids of their prompts, and the examples; drops over-long and empty prompts and counts both."""
    ids = tokenize_groups(templates.tokenizer, [(templates.prompt(row),) for row in examples])
    encoded: list[Encoded] = []
    for row, (prompt,) in zip(examples, ids, strict=True):
        counts[LONG_PROMPT] += len(prompt) > max_prompt_tokens
        counts[EMPTY_PROMPT] += not prompt
        if 0 < len(prompt) <= max_prompt_tokens:
            encoded.append({"ids": compact(prompt), "row": row})
    return encoded


def batch_of(encoded: Sequence[Encoded], fill: int) -> Prompts:
    """Encoded prompts -> one right-padded record."""
    ids, lengths = padded([item["ids"] for item in encoded], fill)
    return Prompts(ids=ids, lengths=lengths, rows=tuple(item["row"] for item in encoded))
