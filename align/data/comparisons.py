"""Comparisons for the reward model: each prompt with its K answers, which always stay in one batch.

Source: InstructGPT (arXiv:2203.02155) section 3.5: all pairs of a prompt are one batch element, since pairs spread over
batches make a model overfit in one epoch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align import seeds
from align.data.base import (
    ALL_TIED,
    CUT_RESPONSE,
    LONG_PROMPT,
    AlignData,
    Encoded,
    compact,
    filler,
    padded,
    sequences,
    tokenize_groups,
)
from align.data.demonstrations import encode_demonstrations
from align.data.sources import Source
from align.data.templates import Ranked
from align.types import Comparisons, Sequences


class ComparisonData(AlignData):
    """Ranked answers for the reward model; batches are `Comparisons`. K may differ from prompt to prompt.

    Prompts whose answers all have the same score are dropped: there is no pair to learn from.

    Args:
        tokenizer: Must have an EOS token, which ends every answer.
        train: Comparisons to train on.
        valid: Comparisons to validate on.
        batch_size: Prompts of one optimizer step, all ranks together; each brings its K answers.
        valid_batch_size: Prompts of one validation batch; default: batch_size.
        max_prompt_tokens: Comparisons with longer prompts are dropped.
        max_response_tokens: Longer answers are cut and lose their EOS; counts the EOS.
        demonstrations: Labelers' demonstrations, whose mean reward becomes 0 when training ends.
        max_demonstrations: How many of them are used, drawn at random; 1,000 settle the mean to 3 % of its spread.
        seed: Decides the training order and which demonstrations are drawn.
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
        demonstrations: Source | None = None,
        max_demonstrations: int = 1000,
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
            max_demonstrations=max_demonstrations,
        )
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.max_demonstrations = max_demonstrations
        if demonstrations is not None:
            self.sources["demonstrations"] = demonstrations

    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Comparisons -> prompt ids once, the ids of every answer, and scores; demonstrations as for SFT."""
        if split == "demonstrations":
            return encode_demonstrations(
                self.templates,
                examples,
                counts,
                max_prompt_tokens=self.max_prompt_tokens,
                max_response_tokens=self.max_response_tokens,
            )
        compared = [self.templates.ranked(row) for row in examples]
        ids = tokenize_groups(self.tokenizer, [(item.prompt, *item.responses) for item in compared])
        encoded = [
            self._encoded(row, item, rows, counts) for row, item, rows in zip(examples, compared, ids, strict=True)
        ]
        return [item for item in encoded if item is not None]

    def collate(self, encoded: list[Encoded]) -> Comparisons:
        """All answers of all prompts, each behind its prompt."""
        rows = [torch.cat([item["prompt"], answer]) for item in encoded for answer in item["responses"]]
        ids, lengths = padded(rows, filler(self.tokenizer))
        counts = torch.tensor([len(item["responses"]) for item in encoded])
        return Comparisons(
            ids=ids,
            lengths=lengths,
            response_lengths=torch.tensor([len(answer) for item in encoded for answer in item["responses"]]),
            prompt_index=torch.arange(len(encoded)).repeat_interleave(counts),
            scores=torch.cat([item["scores"] for item in encoded]),
            labelers=tuple(item["labeler"] for item in encoded for _ in item["responses"]),
        )

    def demonstration_batches(self) -> Iterator[Sequences]:
        """The drawn demonstrations, on every rank all of them; none where no source was named.

        Called by `RewardModule` when training ends.
        """
        known = self.encoded.get("demonstrations", [])
        drawn = torch.randperm(len(known), generator=seeds.generator(self.seed, "demonstrations"))
        for part in drawn[: self.max_demonstrations].split(self.valid_batch_size):
            if len(part):
                yield sequences([known[place] for place in part.tolist()], filler(self.tokenizer))

    def _encoded(
        self, row: dict[str, Any], item: Ranked, ids: list[list[int]], counts: "Counter[str]"
    ) -> Encoded | None:
        prompt, answers = ids[0], ids[1:]
        if len(prompt) > self.max_prompt_tokens:
            counts[LONG_PROMPT] += 1
            return None
        if len(set(item.scores)) == 1:
            counts[ALL_TIED] += 1
            return None
        counts[CUT_RESPONSE] += sum(len(answer) > self.max_response_tokens for answer in answers)
        labeler = row.get("labeler")
        return {
            "prompt": compact(prompt),
            "responses": [compact(answer[: self.max_response_tokens]) for answer in answers],
            "scores": torch.tensor(item.scores, dtype=torch.float32),
            "labeler": "" if labeler is None else str(labeler),
        }
