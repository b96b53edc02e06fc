"""The frozen records that travel between stages, and the legend of axis names used in every signature.

Axis names: `batch` sequences; `prompt` prompt tokens; `response` response tokens (the EOS token, where the model
emitted one, is the last of them); `time` prompt and response tokens together; `vocab` the vocabulary; `completions`
the K answers of all prompts of a batch, one after another.

Records live in host memory. Only what is about to be computed is `sent` to a device, so that whatever decides shapes
(lengths, masks, places) is known without asking the device and waiting for its answer.

All sequences are right-padded, with any valid token id as filler: attention is causal, so what stands to the right of
a token cannot change it, and lengths say where a sequence ends. No record needs an attention mask.
Masks have one polarity: True = counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

Same = TypeVar("Same", bound="Record")
Anything = TypeVar("Anything")


def sent(value: Anything, device: torch.device) -> Anything:
    """A tensor on `device`, or a dataclass or tuple with every tensor in it there; anything else as it is.

    To a GPU by way of pinned memory, from which it reads by itself: nobody waits. From there it waits.
    """
    if isinstance(value, Tensor):
        ahead = device.type == "cuda" and value.device.type == "cpu"
        return (value.pin_memory() if ahead else value).to(device, non_blocking=ahead)  # type: ignore
    if isinstance(value, tuple):
        return tuple(sent(item, device) for item in value)  # type: ignore
    if is_dataclass(value):
        return replace(value, **{item.name: sent(getattr(value, item.name), device) for item in fields(value)})  # type: ignore
    return value


class Record:
    """What every record can do: move between devices, take rows. Subclasses are frozen dataclasses."""

    def to(self: Same, device: torch.device | str) -> Same:
        """The same record with every tensor on `device`; see `sent`."""
        return sent(self, torch.device(device))

    def rows_at(self: Same, index: Int[Tensor, " picked"]) -> Same:
        """The record of the picked rows; tensors, and `rows` where there are any, are indexed alike."""
        picked: dict[str, Any] = {name: value[index.to(value.device)] for name, value in self._tensors().items()}
        picked |= {name: record.rows_at(index) for name, record in self._records().items()}
        for item in fields(self):  # type: ignore
            value = getattr(self, item.name)
            if isinstance(value, tuple):
                picked[item.name] = tuple(value[i] for i in index.tolist())
        return replace(self, **picked)  # type: ignore

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(named_tensors(self))[1].device

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(next(named_tensors(self))[1])

    def _tensors(self) -> dict[str, Tensor]:
        own = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def _records(self) -> dict[str, "Record"]:
        own = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore
        return {name: value for name, value in own.items() if isinstance(value, Record)}


AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Sequences(Record):
    """Text to learn by next-token prediction: SFT demonstrations, pretraining text."""

    ids: Int[Tensor, "batch time"]
    lengths: Int[Tensor, " batch"]
    mask: Bool[Tensor, "batch time"]
    """True: the model is trained to predict this token. Never True at position 0, which nothing predicts."""

    def uncounted(self) -> "Sequences":
        """The same text with nothing to learn: what a rank computes when a batch has nothing for it."""
        return replace(self, mask=torch.zeros_like(self.mask))


@dataclass(frozen=True)
class Comparisons(Record):
    """The K completions of each prompt of a batch with what a labeler thought of them."""

    ids: Int[Tensor, "completions time"]
    lengths: Int[Tensor, " completions"]
    response_lengths: Int[Tensor, " completions"]
    prompt_index: Int[Tensor, " completions"]
    """Which prompt of the batch a completion answers: 0, 0, 0, 1, 1, ... Only equal indices are compared."""
    scores: Float[Tensor, " completions"]
    """Higher is better, equal is a tie. Only the order within a prompt means anything."""
    labelers: tuple[str, ...]
    """Who ranked, one name a completion; '' where unknown."""

    def uncounted(self) -> "Comparisons":
        """The same completions, none of which is compared: what a rank computes when a batch has nothing for it."""
        return replace(self, prompt_index=torch.arange(len(self.scores), device=self.scores.device))


@dataclass(frozen=True)
class Prompts(Record):
    """Prompts to be answered."""

    ids: Int[Tensor, "batch prompt"]
    lengths: Int[Tensor, " batch"]
    rows: tuple[dict[str, Any], ...]
    """The examples the prompts were made from, for reward hooks and tables."""
    seeds: Int[Tensor, " batch"] | None = None
    """What decides each response's random draws; None: torch's default generator does."""


@dataclass(frozen=True)
class Completions(Record):
    """Prompts with the responses a model gave."""

    ids: Int[Tensor, "batch time"]
    prompt_lengths: Int[Tensor, " batch"]
    response_lengths: Int[Tensor, " batch"]
    """Response tokens only; counts the EOS token where there is one."""
    finished: Bool[Tensor, " batch"]
    """True: the response ends with EOS. False: it was cut at the length limit."""
    rows: tuple[dict[str, Any], ...]
    sampled_logprobs: Float[Tensor, "batch response"] | None = None
    """log π of each response token at the sampling temperature, as the sampler's own arithmetic had it; None: it does
    not say. Only to be compared with what is learned from, `Rollout.logprobs`."""

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @property
    def token_mask(self) -> Bool[Tensor, "batch time"]:
        """True at response tokens, at their place in `ids`."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (place >= self.prompt_lengths[:, None]) & (place < self.lengths[:, None])

    @property
    def mask(self) -> Bool[Tensor, "batch response"]:
        """True at response tokens, counted from the start of the response; as wide as the longest response."""
        width = int(self.response_lengths.max())
        return torch.arange(width, device=self.ids.device) < self.response_lengths[:, None]


@dataclass(frozen=True)
class Rollout(Record):
    """One batch of complete episodes: all that a PPO update needs, computed once, before the first gradient step."""

    completions: Completions
    mask: Bool[Tensor, "batch response"]
    logprobs: Float[Tensor, "batch response"]
    """log π_old(a_t | s_t) at the sampling temperature; 0 where the mask is False, like every field below."""
    ref_logprobs: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"]
    """V(s_t) before token t is emitted."""
    entropies: Float[Tensor, "batch response"]
    """Of π_old(· | s_t), in nats."""
    scores: Float[Tensor, " batch"]
    """The reward model's score of each whole response, after the missing-EOS rule."""
    rewards: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]

    def uncounted(self) -> "Rollout":
        """The same episodes without a response token."""
        nothing = torch.zeros_like(self.completions.response_lengths)
        return replace(
            self,
            completions=replace(self.completions, response_lengths=nothing),
            mask=torch.zeros_like(self.mask),
        )


@dataclass(frozen=True)
class Minibatch(Record):
    """What one PPO step learns from."""

    episodes: Rollout
    pretraining: Sequences | None
    """Text for the PPO-ptx term of Eq. 2; None where γ is 0."""
    fresh: Rollout | None
    """The whole rollout, with the first minibatch made from it, for callbacks; None with the others."""
    iteration: int
    """How many rollouts were collected before this one."""
    whole: Rollout
    """The rollout that the episodes are from."""
    index: Int[Tensor, " batch"]
    """Which of its rows they are."""

    BESIDE: ClassVar = ("fresh", "whole")
    """Fields that are not learned from."""


def named_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a record and of the records in it, by dotted field name; a tensor alone is "the tensor"."""
    if isinstance(value, Tensor):
        yield prefix or "the tensor", value
    elif isinstance(value, Record):
        for item in fields(value):  # type: ignore[arg-type]
            yield from named_tensors(getattr(value, item.name), f"{prefix}.{item.name}" if prefix else item.name)


def joined(parts: Sequence[AnyRecord]) -> AnyRecord:
    """The rows of all parts, one part after another; narrower parts are filled up on the right with 0 or False."""
    values: dict[str, Any] = {}
    for item in fields(parts[0]):  # type: ignore[arg-type]
        own = [getattr(part, item.name) for part in parts]
        if isinstance(own[0], Tensor):
            width = max(value.shape[-1] for value in own)
            wide = [pad(value, (0, width - value.shape[-1])) if value.ndim > 1 else value for value in own]
            values[item.name] = torch.cat(wide)
        elif isinstance(own[0], Record):
            values[item.name] = joined(own)
        else:
            values[item.name] = sum(own, ()) if isinstance(own[0], tuple) else own[0]
    return type(parts[0])(**values)
