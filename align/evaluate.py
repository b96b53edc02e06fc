"""`python -m align.evaluate CONFIG [key=value ...]`: several models side by side, in tables and text by text.

Models are loaded one after another, so that only one at a time needs memory: each answers the prompts and reads the
texts, then the reference model reads what the others wrote, then the reward model does. What else a text is worth, the
configuration's metrics say; nothing here knows the task.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from align import cli, measure, seeds, tables
from align.bootstrap import cluster_sums, mean_intervals, ratio_intervals
from align.build import arguments, build
from align.callbacks.tables import response_texts
from align.data.base import Encoded, filler, sequences
from align.data.comparisons import ComparisonData
from align.data.demonstrations import encode_demonstrations
from align.data.prompts import encode_prompts
from align.data.sources import Source, read
from align.data.templates import Templates
from align.data.text import encode_texts
from align.formulas.returns import kl_k1
from align.measure import PEOPLE, Finding, Key, Metric, Results, Texts
from align.models.heads import ScalarModel
from align.models.load import DType, frozen
from align.paths import ModelPath
from align.rollout.sampler import Sampler
from align.sample import answers, default_device, progress, read_checked, sizes_wrong
from align.schema import TARGET
from align.types import Completions, Sequences

PROG = "python -m align.evaluate"

DESCRIPTION = """\
Lets several models answer the same prompts and compares what they wrote, with each other and with what people wrote.
The configuration is checked as a whole before anything is loaded; all errors are reported at once.

The run writes one folder, the configuration's run_dir:
  table.md       the tables that are also printed: means with 95 % confidence intervals
  table.csv      the same numbers, one a line: model, sampler, metric, mean, low, high, n
  texts.jsonl    every text with its own numbers, prompt by prompt
  results.json   the numbers of table.csv with all that the reward model's agreement with labelers was measured in
  config.yaml    the configuration with all overrides, references resolved"""

EPILOG = """\
overrides:
  key=value      replaces a value of the YAML; nested keys with dots, values as in YAML
  --key=value    the same

examples:
  python -m align.evaluate configs/evaluate.yaml
  python -m align.evaluate configs/evaluate.yaml limit=100 run_dir=runs/evaluate-quick
  python -m align.evaluate configs/evaluate.yaml models.PPO=runs/ppo-2/hf overwrite=true

exit codes: 0 evaluated, 2 a mistake in the configuration or the data (nothing to debug), 1 anything else"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The keys of the YAML.

    Attributes:
        run_dir: The folder to write.
        overwrite: Delete an earlier run in it.
        seed: Of every draw: answers, references, resamples.
        models: Name -> folder or hub name; with one vocabulary.
        reference: Name of the model that KL and wins are measured against.
        dtype: Of the models' weights.
        reward: The reward model; null leaves rewards out.
        prompts: Examples with a prompt, and `references`, a list of texts, where people answered it too.
        limit: Take so many prompts, the first ones; null takes all.
        max_prompt_tokens: Longer prompts are left out, and counted.
        max_response_tokens: Longer texts of people are cut, and counted. Models are cut by their sampler.
        samplers: Name -> how to answer. Where the temperature is 1, KL to the reference is measured.
        metrics: Name -> `Metric`.
        win_by: What decides who wins: a name of the metrics', or `reward`; null leaves wins out.
        human_text: Demonstrations; each model's loss on the responses is measured.
        plain_text: Texts; each model's loss is measured.
        max_texts: Take so many of each of these two, the first ones; null takes all.
        comparisons: Name -> ranked answers; the reward model's agreement with who ranked them is measured.
        batch: Prompts answered in one call. The draws depend on it.
        micro_batch_tokens: The most tokens, padding included, computed at once when reading.
        resamples: Of the bootstrap.
    """

    run_dir: str
    overwrite: bool = False
    seed: int
    models: dict[str, ModelPath]
    reference: str
    dtype: DType = "float32"
    reward: ScalarModel | None = None
    prompts: Source
    limit: int | None = None
    max_prompt_tokens: int
    max_response_tokens: int
    samplers: dict[str, Sampler]
    metrics: dict[str, Metric] | None = None
    win_by: str | None = None
    human_text: Source | None = None
    plain_text: Source | None = None
    max_texts: int | None = None
    comparisons: dict[str, Source] | None = None
    batch: int = 256
    micro_batch_tokens: int = 8192
    resamples: int = 1000

    @classmethod
    def config_errors(cls, arguments: Mapping[str, Any]) -> list[str]:
        """What is wrong with these values, in words; those that are missing are not judged."""
        limits = ("limit", "max_texts", "max_prompt_tokens", "max_response_tokens")
        errors = sizes_wrong(arguments, *limits, "batch", "micro_batch_tokens", "resamples")
        models, reference, samplers = (arguments.get(key) for key in ("models", "reference", "samplers"))
        if isinstance(models, dict) and isinstance(reference, str) and reference not in models:
            errors.append(f"reference: got {reference!r}, expected one of the models: {', '.join(map(str, models))}")
        if isinstance(models, dict) and PEOPLE in models:
            errors.append(f"models.{PEOPLE}: the name stands for the prompts' references; choose another")
        if samplers == {}:
            errors.append("samplers: none given, so no model would write anything")
        if arguments.get("comparisons") and arguments.get("reward") is None:
            errors.append("comparisons: given without a reward model, whose agreement they measure; name it as reward")
        return errors


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(evaluate, argv, prog=PROG, description=DESCRIPTION, epilog=EPILOG)


def evaluate(path: str, overrides: Sequence[str]) -> None:
    """Reads, checks, measures, writes and prints one evaluation.

    Args:
        path: Of the YAML file.
        overrides: `key=value`.

    Raises:
        ConfigError: The user's mistakes.
    """
    start = time.monotonic()
    config = read_checked(path, overrides, Evaluation)
    with cli.RunFolder(config) as folder:
        run_dir = folder.path
        plan = Evaluation(**arguments(Evaluation, config))
        with torch.no_grad():
            results = Measuring(plan).results()
        temperatures = {name: sampler.temperature for name, sampler in plan.samplers.items()}
        tables.write(run_dir, results, reference=plan.reference, win_by=plan.win_by, temperatures=temperatures)
    print(f"{run_dir}: {len(plan.models)} models in {time.monotonic() - start:.0f} s; every text is in texts.jsonl")


class Measuring:
    """One evaluation under way: which model is loaded when, and what it is asked.

    Args:
        plan: What to do. Everything it names is read when this is made, so that mistakes show before the work begins.
    """

    def __init__(self, plan: Evaluation) -> None:
        self.plan = plan
        self.better = measure.directions(list((plan.metrics or {}).values()), plan.win_by, plan.reward is not None)
        self.tokenizer = measure.shared_tokenizer(plan.models, plan.reference)
        rows = read(plan.prompts)[: plan.limit]
        self.prompts = encode_prompts(self.tokenizer, rows, plan.max_prompt_tokens)
        self.corpora = self._read_corpora()
        self.compared = {
            name: self._read_comparisons(name, source) for name, source in (plan.comparisons or {}).items()
        }
        self.texts: dict[Key, Texts] = {}
        self.numbers: dict[Key, dict[str, Tensor]] = {}

    def results(self) -> Results:
        """Goes through all models and returns what was found."""
        own, losses = self._models()
        people = measure.people_wrote(self.tokenizer, self.prompts, self.plan.max_response_tokens, self.plan.seed)
        if people is not None:
            self.texts |= {(sampler, PEOPLE): people for sampler in self.plan.samplers}
        order = list(self.plan.samplers)
        self.texts = dict(sorted(self.texts.items(), key=lambda item: order.index(item[0][0])))
        self.numbers = {key: self._plain_numbers(texts) for key, texts in self.texts.items()}
        self._kl(own)
        agreements = self._rewards()
        self._wins()
        findings = self._text_findings() + self._loss_findings(losses)
        findings += [line for name, found in agreements.items() for line in self._agreement_findings(name, found)]
        agreement = {name: item.metrics for name, item in agreements.items()}
        return Results(findings, self.texts, self.numbers, self.prompts, agreement, self.better)

    def _read_corpora(self) -> dict[str, Sequences]:
        """The texts whose loss is measured."""
        plan, templates = self.plan, Templates(self.tokenizer)
        prompt, response = plan.max_prompt_tokens, plan.max_response_tokens
        encode = {
            "human_text": lambda rows, counts: encode_demonstrations(
                templates, rows, counts, max_prompt_tokens=prompt, max_response_tokens=response
            ),
            "plain_text": lambda rows, counts: encode_texts(self.tokenizer, rows, prompt + response, counts),
        }
        sources = {"human_text": plan.human_text, "plain_text": plan.plain_text}
        encoded = {
            name: measure.encoded_rows(source, plan.max_texts, name, encode[name])
            for name, source in sources.items()
            if source is not None
        }
        return {name: sequences(items, filler(self.tokenizer)) for name, items in encoded.items()}

    def _read_comparisons(self, name: str, source: Source) -> tuple[ComparisonData, list[Encoded]]:
        data = ComparisonData(
            tokenizer=self.tokenizer,
            train=source,
            batch_size=1,
            max_prompt_tokens=self.plan.max_prompt_tokens,
            max_response_tokens=self.plan.max_response_tokens,
        )
        what = f"comparisons.{name}"
        return data, measure.encoded_rows(source, None, what, lambda rows, counts: data.encode(rows, counts, name))

    def _models(self) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """Lets every model write and read; returns Σ log π of its own texts, and its loss on each corpus's texts."""
        own: dict[Key, Tensor] = {}
        losses: dict[Key, Tensor] = {}
        for name in self.plan.models:
            model = self._load(name)
            self._write(name, model)
            sampled = {key: self.texts[key, name].completions for key in self._sampled()}
            read = self._summed(model, {**sampled, **self.corpora}, f"{name}: reading")
            own |= {(key, name): read[key] for key in sampled}
            losses |= {(corpus, name): -read[corpus] for corpus in self.corpora}
        return own, losses

    def _sampled(self) -> list[str]:
        """The samplers whose texts tell the KL to the reference."""
        return [key for key, sampler in self.plan.samplers.items() if sampler.temperature == 1.0]

    def _write(self, name: str, model: PreTrainedModel) -> None:
        """A model's texts with every sampler; all models draw alike, which makes their differences less noisy."""
        with progress(f"{name}: writing", len(self.prompts.rows) * len(self.plan.samplers), "texts") as advance:
            for key, sampler in self.plan.samplers.items():
                completions = answers(
                    model,
                    sampler,
                    self.prompts,
                    batch=self.plan.batch,
                    seed=self.plan.seed,
                    purpose=f"evaluate {key}",
                    advance=advance,
                )
                written = response_texts(self.tokenizer, completions)
                self.texts[key, name] = Texts(completions, written, torch.arange(len(written)))

    def _kl(self, own: Mapping[Key, Tensor]) -> None:
        """KL to the reference, k1: the log-ratio of each text that was sampled at temperature 1."""
        if not own:
            return
        completions = {key: self.texts[key].completions for key in own}
        read = self._summed(self._load(self.plan.reference), completions, f"{self.plan.reference}: reading the others")
        for key, logprobs in own.items():
            self._put(key, "kl", kl_k1(logprobs, read[key]))

    def _rewards(self) -> dict[str, measure.Agreement]:
        """The reward of every text, and the reward model's agreement with labelers."""
        reward = self.plan.reward
        if reward is None:
            return {}
        frozen(reward).to(default_device())
        budget = self.plan.micro_batch_tokens
        compared = [item["responses"] for _, encoded in self.compared.values() for item in encoded]
        total = sum(map(len, compared)) + sum(len(texts.responses) for texts in self.texts.values())
        with progress("reward model: reading", total, "texts") as advance:
            for key, texts in self.texts.items():
                done = texts.completions
                rewards = measure.sequence_rewards(
                    reward, done.ids, done.lengths, micro_batch_tokens=budget, advance=advance
                )
                self._put(key, "reward", rewards)
            return {
                name: measure.agreement(reward, data, encoded, micro_batch_tokens=budget, advance=advance)
                for name, (data, encoded) in self.compared.items()
            }

    def _wins(self) -> None:
        """Who wrote the better text to each prompt, against the reference model with the same sampler."""
        by = self.plan.win_by
        if by is None:
            return
        for (sampler, name), numbers in self.numbers.items():
            if name != self.plan.reference:
                other = self.numbers[sampler, self.plan.reference][by]
                numbers["win"] = measure.wins(numbers[by], other, self.better[by])

    def _plain_numbers(self, texts: Texts) -> dict[str, Tensor]:
        """What needs no model."""
        found = measure.metric_values((self.plan.metrics or {}).values(), texts)
        found |= {"length": texts.completions.response_lengths, "finished": texts.completions.finished}
        return {name: texts.by_prompt(values, len(self.prompts.rows)) for name, values in found.items()}

    def _put(self, key: Key, name: str, values: Tensor) -> None:
        self.numbers[key][name] = self.texts[key].by_prompt(values, len(self.prompts.rows))

    def _text_findings(self) -> list[Finding]:
        """Means over prompts."""
        columns = [(key, name) for key in self.texts for name in self.better if name in self.numbers[key]]
        values = torch.stack([self.numbers[key][name] for key, name in columns], dim=1).double()
        found = mean_intervals(values, self.plan.resamples, self._draws("texts"))
        return [
            Finding(model, sampler, name, value)
            for ((sampler, model), name), value in zip(columns, found, strict=True)
            if value is not None
        ]

    def _loss_findings(self, losses: Mapping[Key, Tensor]) -> list[Finding]:
        """Nats a token, and how far above the reference's; resampled are prompts, or texts without one."""
        findings: list[Finding] = []
        for corpus, batch in self.corpora.items():
            keys = measure.prompt_keys(batch) if corpus == "human_text" else list(range(len(batch.ids)))
            tokens = batch.mask.sum(1)
            others = [name for name in self.plan.models if name != self.plan.reference]
            base = losses[corpus, self.plan.reference]
            names = [(name, f"loss/{corpus}") for name in self.plan.models]
            names += [(name, f"loss/{corpus}/above") for name in others]
            nats = [losses[corpus, name] for name in self.plan.models]
            nats += [losses[corpus, name] - base for name in others]
            above = cluster_sums(torch.stack(nats, 1).double(), keys)
            below = cluster_sums(tokens[:, None].double(), keys).expand_as(above)
            found = ratio_intervals(above, below, self.plan.resamples, self._draws(corpus))
            findings += [Finding(name, "", metric, value) for (name, metric), value in zip(names, found, strict=True)]
        return findings

    def _agreement_findings(self, name: str, found: measure.Agreement) -> list[Finding]:
        """The share of pairs ordered as labelers did; resampled are prompts with all judgements of them."""
        hits = cluster_sums(found.hits.double(), found.keys)
        pairs = cluster_sums(found.pairs[:, None].double(), found.keys).expand_as(hits)
        values = ratio_intervals(hits, pairs, self.plan.resamples, self._draws(name))
        judges = ("reward model", "longer is better")
        return [Finding(judge, "", f"agreement/{name}", value) for judge, value in zip(judges, values, strict=True)]

    def _draws(self, purpose: str) -> torch.Generator:
        return seeds.generator(self.plan.seed, f"bootstrap {purpose}")

    def _load(self, name: str) -> PreTrainedModel:
        node = {TARGET: "align.models.load.load_causal_lm", "path": self.plan.models[name], "dtype": self.plan.dtype}
        model: PreTrainedModel = build(node, f"models.{name}")
        frozen(model).to(default_device())  # type: ignore[arg-type]
        return model

    def _summed(
        self, model: PreTrainedModel, batches: Mapping[Any, Completions | Sequences], what: str
    ) -> dict[Any, Float[Tensor, " batch"]]:
        """By the same keys, Σ log π of each text's response tokens, or of those to be learned."""
        if not batches:
            return {}
        found: dict[Any, Tensor] = {}
        with progress(what, sum(len(batch.ids) for batch in batches.values()), "texts") as advance:
            for key, batch in batches.items():
                found[key] = measure.summed_logprobs(
                    model,
                    batch.ids,
                    batch.lengths,
                    batch.token_mask if isinstance(batch, Completions) else batch.mask,
                    micro_batch_tokens=self.plan.micro_batch_tokens,
                    advance=advance,
                )
        return found


if __name__ == "__main__":
    sys.exit(main())
