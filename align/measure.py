"""What `align.evaluate` measures of texts: log-probabilities, rewards, metrics, wins, agreement with labelers.

Every function takes one model or none and goes through texts in micro-batches. Knows no configuration, no tables, and
not what the metrics mean.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align import seeds
from align.bootstrap import Interval
from align.build import build
from align.data.base import Encoded, compact, filler, padded
from align.data.comparisons import ComparisonData
from align.data.sources import Source, origin, read
from align.data.templates import Piece, tokenize
from align.formulas.losses import preference_pairs
from align.models import forward, trials
from align.models.heads import ScalarModel
from align.modules.ranking import RankingMetrics
from align.schema import TARGET
from align.types import Completions, Prompts, Sequences

PEOPLE = "people"
"""Stands among the models for the references of the prompts' rows, one drawn for each prompt."""

OWN_METRICS: Mapping[str, str] = {"win": "higher", "kl": "", "length": "", "finished": ""}
"""What is measured of every text besides its reward and the configuration's metrics, and which way is better."""

COMPARED_AT_ONCE = 64
"""Prompts whose answers are compared together: the memory of pairs grows with the square."""

Advance = Callable[[int], None]
"""Called with the number of texts done since the last call."""


@runtime_checkable
class Metric(Protocol):
    """Judges texts. Any class with this shape can be named under `metrics` in the YAML."""

    better: Mapping[str, str]
    """The names of what it measures, and which way is better: "lower" or "higher"."""

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], responses: Sequence[str], finished: Sequence[bool]
    ) -> Mapping[str, Sequence[float | None]]:
        """For each name one value a text, None where it does not apply. Called once for each model and sampler.

        Args:
            rows: The prompts' rows, with all their fields.
            responses: What was answered, without special tokens.
            finished: Whether the answer was ended, or cut at the limit.
        """
        ...


@dataclass(frozen=True)
class Texts:
    """What a model, or people, wrote to the prompts."""

    completions: Completions
    responses: list[str]
    place: Int[Tensor, " texts"]
    """Which prompt each answers."""

    def by_prompt(self, values: Shaped[Tensor, " texts"], prompts: int) -> Float[Tensor, " prompts"]:
        """Numbers of the texts laid out by prompt; NaN where a prompt has no text."""
        return torch.full((prompts,), float("nan")).index_put((self.place,), values.float())


Key = tuple[str, str]
"""Sampler and model, or `people` for the model."""


@dataclass(frozen=True)
class Finding:
    """One number with its interval."""

    model: str
    sampler: str
    """Empty where no text was written."""
    metric: str
    value: Interval


@dataclass(frozen=True)
class Results:
    """All that was found."""

    findings: list[Finding]
    texts: dict[Key, Texts]
    numbers: dict[Key, dict[str, Float[Tensor, " prompts"]]]
    """What was measured of each text."""
    prompts: Prompts
    agreement: dict[str, dict[str, float]]
    """By the name of the comparisons: all of `RankingMetrics`."""
    better: dict[str, str]
    """Metric -> "lower", "higher", or "" where neither is better."""


def directions(metrics: Sequence[Metric], win_by: str | None, rewarded: bool) -> dict[str, str]:
    """Everything that is measured of a text, in the order of the tables, and which way is better.

    Args:
        metrics: The configuration's.
        win_by: What decides who wins.
        rewarded: Whether there is a reward model.

    Raises:
        ValueError: Two metrics share a name, a direction is none, or nothing is called `win_by`.
    """
    better = {"reward": "higher"} if rewarded else {}
    for metric in metrics:
        for name, way in metric.better.items():
            if name in better or name in OWN_METRICS:
                raise ValueError(f"metrics: two metrics are called {name!r}; every name must be its own")
            if way not in ("lower", "higher"):
                raise ValueError(f"metrics: {name}: expected that 'lower' or 'higher' is better, got {way!r}")
            better[name] = way
    if win_by is not None and win_by not in better:
        raise ValueError(f"win_by: got {win_by!r}, expected one of {', '.join(better) or 'none: no metrics'}")
    return {**better, **OWN_METRICS}


def shared_tokenizer(models: Mapping[str, str], reference: str) -> PreTrainedTokenizerBase:
    """The reference model's tokenizer, once it is known that all models share its vocabulary.

    Args:
        models: Name -> folder or hub name.
        reference: A name among them.

    Raises:
        ValueError: A model has another vocabulary, so that KL would compare different tokens.
    """
    nodes = {name: {TARGET: "align.models.load.load_tokenizer", "path": path} for name, path in models.items()}
    found = {name: build(node, f"models.{name}") for name, node in nodes.items()}
    for name, tokenizer in found.items():
        if tokenizer.get_vocab() != found[reference].get_vocab():
            raise ValueError(
                f"models.{name}: its tokenizer's vocabulary is not that of {reference}, so their tokens cannot be "
                "compared; evaluate models of one family at a time"
            )
    return found[reference]


def summed_logprobs(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch time"],
    lengths: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    *,
    micro_batch_tokens: int,
    advance: Advance,
) -> Float[Tensor, " batch"]:
    """Σ log π of each sequence's tokens where the mask is True, at temperature 1, in nats."""
    sums = torch.zeros(len(ids))
    for group in trials.micro_batches(lengths, micro_batch_tokens, model.device, model):
        part_ids, part_mask = (forward.fitted(columns[group], lengths[group]) for columns in (ids, mask))
        flat = forward.token_logprobs(model, part_ids.to(model.device), part_mask)
        sums[group] = forward.by_response(flat, part_mask).sum(1).cpu()
        advance(len(group))
    return sums


def sequence_rewards(
    reward: ScalarModel,
    ids: Int[Tensor, "batch time"],
    lengths: Int[Tensor, " batch"],
    *,
    micro_batch_tokens: int,
    advance: Advance,
) -> Float[Tensor, " batch"]:
    """The reward of each sequence, read at its last token."""
    rewards, device = torch.zeros(len(ids)), reward.hf.device
    for group in trials.micro_batches(lengths, micro_batch_tokens, device, reward.hf):
        part = forward.fitted(ids[group], lengths[group]).to(device)
        rewards[group] = forward.final_scores(reward, part, lengths[group]).cpu()
        advance(len(group))
    return rewards


def people_wrote(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, max_response_tokens: int, seed: int
) -> Texts | None:
    """One of the `references` of each prompt's row, drawn at random; None where no row has any.

    A reference longer than `max_response_tokens` is cut for the reward model, and counts as not finished.
    """
    place = [number for number, row in enumerate(prompts.rows) if row.get("references")]
    if not place:
        return None
    draw = seeds.generator(seed, "references")
    responses: list[str] = []
    for row in (prompts.rows[number] for number in place):
        known = row["references"]
        if not isinstance(known, list) or not all(isinstance(text, str) for text in known):
            raise ValueError(f"{origin(row)}: references: expected a list of texts, got {str(known)[:80]!r}")
        responses.append(known[int(torch.randint(len(known), (), generator=draw))])
    ids = tokenize(tokenizer, [Piece(text, learned=True, close=True) for text in responses])
    asked = prompts.rows_at(torch.tensor(place))
    joined = [
        torch.cat([row[:length], compact(written[:max_response_tokens])])
        for row, length, written in zip(asked.ids, asked.lengths.tolist(), ids, strict=True)
    ]
    completions = Completions(
        ids=padded(joined, filler(tokenizer))[0],
        prompt_lengths=asked.lengths,
        response_lengths=torch.tensor([min(len(written), max_response_tokens) for written in ids]),
        finished=torch.tensor([len(written) <= max_response_tokens for written in ids]),
        rows=asked.rows,
    )
    return Texts(completions, responses, torch.tensor(place))


def metric_values(metrics: Iterable[Metric], texts: Texts) -> dict[str, Float[Tensor, " texts"]]:
    """What the metrics say of the texts, by name; NaN where one does not apply.

    Raises:
        ValueError: A metric returned other names than it announced, or not one value a text.
    """
    values: dict[str, Tensor] = {}
    for metric in metrics:
        found = metric(list(texts.completions.rows), texts.responses, texts.completions.finished.tolist())
        kind = type(metric).__name__
        if set(found) != set(metric.better):
            raise ValueError(f"{kind}: its `better` names {sorted(metric.better)}, but it measured {sorted(found)}")
        for name, numbers in found.items():
            if len(numbers) != len(texts.responses):
                raise ValueError(f"{kind}: {len(numbers)} values of {name!r} for {len(texts.responses)} texts")
            values[name] = torch.tensor([float("nan") if number is None else float(number) for number in numbers])
    return values


def wins(own: Float[Tensor, " prompts"], other: Float[Tensor, " prompts"], better: str) -> Float[Tensor, " prompts"]:
    """1 where the own number is the better one, a half where both are equal, 0 where it is worse; NaN without a pair.

    Args:
        own: One number a prompt.
        other: Of the opponent's text on the same prompt.
        better: "lower" or "higher".
    """
    difference = other - own if better == "lower" else own - other
    return torch.where(difference.isnan(), difference, (difference.sign() + 1.0) / 2.0)


def encoded_rows(
    source: Source,
    limit: int | None,
    what: str,
    encode: Callable[[list[dict[str, Any]], "Counter[str]"], list[Encoded]],
) -> list[Encoded]:
    """The usable examples of a source.

    Args:
        source: Of the examples.
        limit: Take so many, the first ones; None takes all.
        what: Name of the source in the configuration, for messages.
        encode: (examples, counts) -> encoded examples.

    Raises:
        ValueError: None is usable.
    """
    counts: Counter[str] = Counter()
    rows = read(source)[:limit]
    encoded = encode(rows, counts)
    happened = "; ".join(f"{count:,} {text}" for text, count in counts.items() if count)
    if not encoded:
        raise ValueError(f"{what}: no usable example among {len(rows)}. {happened}")
    if happened:
        print(f"{what}: {len(rows):,} read; {happened}", flush=True)
    return encoded


def prompt_keys(demonstrations: Sequences) -> list[Hashable]:
    """For each demonstration its prompt: the tokens before the first that is learned."""
    lengths = demonstrations.mask.int().argmax(1).tolist()
    return [tuple(ids[:length].tolist()) for ids, length in zip(demonstrations.ids, lengths, strict=True)]


@dataclass(frozen=True)
class Agreement:
    """How a reward model's order of answers compares with a labeler's."""

    metrics: dict[str, float]
    """All of `RankingMetrics`."""
    hits: Float[Tensor, "prompts 2"]
    """By prompt: pairs ordered as the labeler did, by the reward model and by preferring the longer answer."""
    pairs: Float[Tensor, " prompts"]
    """By prompt: pairs that the labeler told apart."""
    keys: list[Hashable]
    """Equal for judgements of the same prompt."""


def agreement(
    reward: ScalarModel,
    data: ComparisonData,
    encoded: Sequence[Encoded],
    *,
    micro_batch_tokens: int,
    advance: Advance,
) -> Agreement:
    """Scores the answers of every prompt and counts how often the labeler's preference is met."""
    metrics, hits, pairs = RankingMetrics(), [], []
    for start in range(0, len(encoded), COMPARED_AT_ONCE):
        batch = data.collate(list(encoded[start : start + COMPARED_AT_ONCE]))
        rewards = sequence_rewards(
            reward, batch.ids, batch.lengths, micro_batch_tokens=micro_batch_tokens, advance=advance
        )
        metrics.update(rewards, batch)
        found = preference_pairs(batch.scores, batch.prompt_index)
        lengths = batch.response_lengths.float()
        better = [wins(scores[found.winner], scores[found.loser], "higher") for scores in (rewards, lengths)]
        counted = torch.stack([*better, torch.ones(len(found.winner))], dim=1)
        size = int(batch.prompt_index.max()) + 1
        sums = torch.zeros(size, 3).index_add_(0, found.prompt_index, counted)
        hits.append(sums[:, :2])
        pairs.append(sums[:, 2])
    keys: list[Hashable] = [tuple(item["prompt"].tolist()) for item in encoded]
    values = {name: float(value) for name, value in metrics.compute().items()}
    return Agreement(values, torch.cat(hits), torch.cat(pairs), keys)
