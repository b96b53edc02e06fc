"""Samplers: from prompts to completions. Any callable with this Protocol can be named in a YAML as `sampler:`.

Two engines are here. `DecodeSampler` is a decoding loop over transformers' forward pass. Its cache has a row of its own
length for each sequence (`align.models.slots`), so no prompt is padded; a finished sequence leaves the batch and the
next prompt takes its place; equal prompts are computed once. Models that cannot be used this way are decoded with
transformers' cache. `GenerateSampler` is transformers' own `generate`, for models whose cache that loop does not know
either, and as the reference both are tested against. On a GPU `DecodeSampler` writes by recorded steps where it can
(`align.rollout.replay`).

Both sample from softmax(logits / temperature) and from nothing else: no top-k, top-p, penalties or forced tokens, so
the log-probabilities of the update's forward pass are those of the distribution that was sampled from (N+
Implementation Details, point 25). Where `Prompts.seeds` is given, a response of `DecodeSampler` depends on the model,
its prompt and its seed alone, whatever else is in the batch; `GenerateSampler` draws from torch's default generator,
which the caller seeds (`align.seeds`).
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from align.models import compiled, decode, products, sharding
from align.models.fixed import FixedSlots
from align.models.groups import GroupedSlots
from align.models.quantised import rounded
from align.models.slots import Slots
from align.models.trials import evaluating
from align.rollout import replay
from align.rollout.draws import draw
from align.types import Completions, Prompts, joined

SHARED_FROM = 128
"""Tokens of a mean prompt from which prompts are kept once for all their answers: with shorter ones, finding out whose
they are costs as much as reading them for each."""

LEAVE_AT = 0.8
"""Finished rows are taken out when fewer than this share of the batch is still being written."""


@runtime_checkable
class Sampler(Protocol):
    """Writes one response to each prompt.

    Called by `PPOModule.collect` once a rollout, under `torch.no_grad`, in the trainer's precision, with torch's
    default generator seeded for this rollout; by `align.sample` and the sample table in the same way.
    """

    temperature: float
    """Of the sampling distribution; 0 takes the likeliest token. PPO's log-probabilities use the same."""

    def __call__(self, policy: PreTrainedModel, prompts: Prompts) -> Completions:
        """The completions, row i answering prompt i, on the prompts' device."""
        ...


@dataclass(frozen=True, kw_only=True)
class BatchSampler(ABC):
    """What both engines share: prompts of like length are answered together.

    Attributes:
        max_new_tokens: A response without EOS is cut at this many tokens.
        temperature: See `Sampler`.
        batch_size: Prompts decoded together.
    """

    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 256

    @classmethod
    def config_errors(cls, arguments: dict[str, object]) -> list[str]:
        """What is wrong with these constructor arguments, in words."""
        return _sizes_wrong(arguments)

    def __call__(self, policy: PreTrainedModel, prompts: Prompts) -> Completions:
        """See `Sampler`."""
        return _in_batches(self._answer, policy, prompts, self.batch_size)

    @abstractmethod
    def _answer(self, policy: PreTrainedModel, prompts: Prompts) -> Completions: ...


@dataclass(frozen=True, kw_only=True)
class DecodeSampler(BatchSampler):
    """Decodes step by step; finished sequences leave the batch, and waiting prompts take their places.

    Attributes:
        graphs: On a GPU, in 16 bits, a step is recorded once and replayed (`align.rollout.replay`), where the model
            allows it, its weights are not sharded, and `slots` is on. The same to rounding.
        slots: Keeps keys and values in rows of their own lengths where the model allows it, else in transformers'
            cache. The same to rounding.
        share_prompts: Keeps those of a prompt once for all its answers, where there are several and prompts are long;
            recorded steps do not. The same to rounding where prompts bring seeds.
        dtype: In which it computes: bfloat16 is mixed precision, float32 none, null as the trainer does. Weights stay
            as they are. What is learned from is computed as the trainer does in any case; the metric
            `rollout/mismatch` says how far apart the two are.
    """

    graphs: bool = True
    slots: bool = True
    share_prompts: bool = True
    dtype: Literal["float32", "bfloat16"] | None = None

    def __call__(self, policy: PreTrainedModel, prompts: Prompts) -> Completions:
        """See `Sampler`."""
        with self._arithmetic(prompts.device.type):
            if self._replays(policy, prompts.device):
                return _in_batches(self._replay, policy, prompts, len(prompts.ids))
            if not (self.slots and decode.able(policy, prompts.device)):
                return super().__call__(policy, prompts)
            which = _which(prompts) if self.share_prompts else None
            if which is None or not decode.able(policy, prompts.device, GroupedSlots):
                return _in_batches(self._write, policy, prompts, len(prompts.ids))
            order, write = which.argsort(stable=True), functools.partial(self._write, grouped=True)
            return _in_batches(write, policy, prompts.rows_at(order), len(order)).rows_at(order.argsort())

    def _replays(self, policy: PreTrainedModel, device: torch.device) -> bool:
        suits = self.graphs and self.slots and device.type == "cuda" and not sharding.is_sharded(policy)
        return suits and decode.able(policy, device, FixedSlots)

    def _arithmetic(self, device: str) -> contextlib.AbstractContextManager[object]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")

    def _replay(self, policy: PreTrainedModel, prompts: Prompts) -> Completions:
        """Answers prompts, longest first, `batch_size` at a time, by recorded steps."""
        stops, points = _stop_ids(policy, prompts.device), _points(prompts, self.max_new_tokens)
        kind, mixed = products.arithmetic(prompts.device, policy.dtype), torch.is_autocast_enabled(prompts.device.type)
        with rounded(policy, kind) if mixed else contextlib.nullcontext(), compiled.on():
            found = replay.write(
                policy, prompts, points, stops, temperature=self.temperature, rows=self.batch_size
            )  # fmt: skip
        return _joined(prompts, found.tokens, found.lengths, found.finished, found.logprobs)

    def _write(self, policy: PreTrainedModel, prompts: Prompts, *, grouped: bool = False) -> Completions:
        """Answers prompts, longest first and equal ones side by side, `batch_size` at a time."""
        count, limit, device = len(prompts.ids), self.max_new_tokens, prompts.device
        stops, points = _stop_ids(policy, device), _points(prompts, limit)
        batch, begun = _Writing.start(count, limit, device), 0
        batch.row = batch.row[:0]
        slots = GroupedSlots(device, most=limit) if grouped else Slots(device, most=int(prompts.lengths.max()) + limit)
        last = prompts.ids.gather(1, prompts.lengths[:, None] - 1)[:, 0]
        token = last[:0]
        while True:
            running = batch.running()
            going = int(running.sum())
            if going + count - begun == 0:
                return _joined(prompts, batch.tokens, batch.written, batch.finished, batch.logprobs)
            if going < LEAVE_AT * max(len(running), 1) or slots.full:
                new = torch.arange(begun, min(count, begun + self.batch_size - going), device=device)
                begun += len(new)
                source = torch.cat([running.nonzero()[:, 0], torch.full_like(new, -1)])
                lengths = torch.cat([slots.positions[running], prompts.lengths[new] - 1])
                order = slots.order(lengths)
                batch.row = torch.cat([batch.row[running], new])[order]
                token = torch.cat([token[running], last[new]])[order]
                slots.lay_out(source[order], lengths[order])
                # All of a prompt but its last token, which is the first to be put in: so there is one way to a token.
                fresh = (source[order] < 0).nonzero()[:, 0]
                own = batch.row[fresh]
                decode.fill(policy, prompts.ids[own], prompts.lengths[own] - 1, slots, fresh)
            logits = decode.next_logits(policy, token, slots).float()
            token, logprobs = draw(logits, self.temperature, points[batch.row, batch.step()])
            batch.put(token, torch.isin(token, stops), logprobs)

    def _answer(self, policy: PreTrainedModel, prompts: Prompts) -> Completions:
        """With transformers' cache: prompts padded on the left."""
        ids, seen = _left_padded(prompts)
        stops = _stop_ids(policy, ids.device)
        batch = _Writing.start(len(ids), self.max_new_tokens, ids.device)
        points = _points(prompts, self.max_new_tokens)
        cache, place = DynamicCache(config=policy.config), (seen.cumsum(1) - 1).clamp_min(0)
        while True:
            out = policy(
                input_ids=ids,
                attention_mask=seen.long(),
                position_ids=place,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = out.logits[:, -1].float()
            token, logprobs = draw(logits, self.temperature, points[batch.row, batch.step()])
            batch.put(token, torch.isin(token, stops), logprobs)
            running = batch.running()
            if not running.any():
                return _joined(prompts, batch.tokens, batch.written, batch.finished, batch.logprobs)
            if running.float().mean() < LEAVE_AT:
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                batch.row = batch.row[keep]
                token, seen, place = token[keep], seen[keep], place[keep]
            ids, place = token[:, None], place[:, -1:] + 1
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)


@dataclass(frozen=True, kw_only=True)
class GenerateSampler(BatchSampler):
    """transformers' `generate`. Every row costs until the batch's last one is finished."""

    def _answer(self, policy: PreTrainedModel, prompts: Prompts) -> Completions:
        ids, seen = _left_padded(prompts)
        stops = _stop_ids(policy, ids.device)
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0.0,
            temperature=self.temperature or 1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=stops.tolist(),
            pad_token_id=int(stops[0]),
        )
        with _generation_config(policy, settings):
            whole = policy.generate(ids, attention_mask=seen.long())  # type: ignore[operator]
        tokens = whole[:, ids.shape[1] :]
        stop = torch.isin(tokens, stops)
        finished = stop.any(1)
        written = torch.where(finished, stop.int().argmax(1) + 1, tokens.shape[1])
        return _joined(prompts, tokens, written, finished)


def _which(prompts: Prompts) -> Int[Tensor, " batch"] | None:
    """Which of the different prompts each is; None where keeping them once would not pay."""
    if int(prompts.lengths.sum()) < SHARED_FROM * len(prompts.lengths):
        return None
    different, which = decode.without_padding(prompts.ids, prompts.lengths).unique(dim=0, return_inverse=True)
    return which if 2 * len(different) <= len(which) else None


def _points(prompts: Prompts, limit: int) -> Float[Tensor, "batch limit"]:
    """The random numbers of each response, one a token."""
    shape = {"dtype": torch.float64, "device": prompts.ids.device}
    if prompts.seeds is None:
        return torch.rand(len(prompts.ids), limit, **shape)
    rows = [torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in prompts.seeds.tolist()]  # fmt: skip
    return torch.stack(rows).to(**shape)


@dataclass
class _Writing:
    """The responses being written: which row of the shrinking batch writes which response."""

    tokens: Int[Tensor, "batch limit"]
    written: Int[Tensor, " batch"]
    finished: Bool[Tensor, " batch"]
    logprobs: Float[Tensor, "batch limit"]
    row: Int[Tensor, " running"] = field(repr=False)

    @classmethod
    def start(cls, size: int, limit: int, device: torch.device) -> "_Writing":
        return cls(
            tokens=torch.zeros(size, limit, dtype=torch.long, device=device),
            written=torch.zeros(size, dtype=torch.long, device=device),
            finished=torch.zeros(size, dtype=torch.bool, device=device),
            logprobs=torch.zeros(size, limit, device=device),
            row=torch.arange(size, device=device),
        )

    def running(self) -> Bool[Tensor, " running"]:
        """Which rows of the batch are not done."""
        return ~self.finished[self.row] & (self.written[self.row] < self.tokens.shape[1])

    def step(self) -> Int[Tensor, " running"]:
        """How many tokens each row of the batch has; of a row that is done, some number in range."""
        return self.written[self.row].clamp_max(self.tokens.shape[1] - 1)

    def put(
        self, token: Int[Tensor, " running"], stop: Bool[Tensor, " running"], logprobs: Float[Tensor, " running"]
    ) -> None:
        """Writes one token to every response that is not done."""
        running = self.running()
        row, token, stop = self.row[running], token[running], stop[running]
        self.tokens[row, self.written[row]] = token
        self.logprobs[row, self.written[row]] = logprobs[running]
        self.written[row] += 1
        self.finished[row] = stop


def _in_batches(
    answer: Callable[[PreTrainedModel, Prompts], Completions], policy: PreTrainedModel, prompts: Prompts, size: int
) -> Completions:
    """Answers prompts of like length together and puts the answers back in order."""
    order = torch.argsort(prompts.lengths, descending=True, stable=True)
    with torch.no_grad(), evaluating(policy):
        parts = [answer(policy, prompts.rows_at(index)) for index in order.split(size)]
    return joined(parts).rows_at(torch.argsort(order))


def _left_padded(prompts: Prompts) -> tuple[Int[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"]]:
    """Prompt ids shifted to the right end of the batch, where decoding needs them, and where they are."""
    width = int(prompts.lengths.max())
    place = torch.arange(width, device=prompts.ids.device) - (width - prompts.lengths[:, None])
    return prompts.ids.gather(1, place.clamp_min(0)), place >= 0


def _joined(
    prompts: Prompts,
    tokens: Int[Tensor, "batch limit"],
    written: Int[Tensor, " batch"],
    finished: Bool[Tensor, " batch"],
    logprobs: Float[Tensor, "batch limit"] | None = None,
) -> Completions:
    """Prompt and response in one right-padded row."""
    total = prompts.lengths + written
    place = torch.arange(int(total.max()), device=tokens.device).expand(len(tokens), -1)
    in_prompt, in_response = place < prompts.lengths[:, None], place < total[:, None]
    from_prompt = prompts.ids.gather(1, place.clamp_max(prompts.ids.shape[1] - 1))
    behind = (place - prompts.lengths[:, None]).clamp(0, tokens.shape[1] - 1)
    ids = torch.where(in_prompt, from_prompt, tokens.gather(1, behind)) * in_response
    return Completions(
        ids=ids,
        prompt_lengths=prompts.lengths,
        response_lengths=written,
        finished=finished,
        rows=prompts.rows,
        sampled_logprobs=None if logprobs is None else logprobs[:, : int(written.max())],
    )


def _stop_ids(policy: PreTrainedModel, device: torch.device) -> Int[Tensor, " stops"]:
    settings = policy.generation_config
    stops = settings.eos_token_id if settings is not None else None
    stops = policy.config.eos_token_id if stops is None else stops
    if stops is None:
        raise ValueError(
            f"the policy ({type(policy).__name__}) names no eos_token_id, so no response could end; set it in the "
            "folder's config.json or generation_config.json"
        )
    return torch.tensor([stops] if isinstance(stops, int) else list(stops), device=device)


@contextlib.contextmanager
def _generation_config(policy: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """The policy's own generation defaults (penalties, top-p) put aside: they would change the distribution."""
    own = policy.generation_config
    policy.generation_config = settings
    try:
        yield
    finally:
        policy.generation_config = own


def _sizes_wrong(arguments: dict[str, object]) -> list[str]:
    errors = []
    for name in ("max_new_tokens", "batch_size"):
        value = arguments.get(name)
        if isinstance(value, int) and value < 1:
            errors.append(f"{name}: got {value}, expected at least 1")
    temperature = arguments.get("temperature")
    if isinstance(temperature, int | float) and temperature < 0:
        errors.append(f"temperature: got {temperature}, expected 0 (greedy) or more")
    return errors
