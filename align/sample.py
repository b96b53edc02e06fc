"""`python -m align.sample CONFIG [key=value ...]`: K answers a prompt, as JSON lines for any kind of labelling.

The same configuration writes the same bytes. `align.evaluate` answers its prompts and reads its YAML through this file.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align import atomic, cli, schema, seeds
from align.build import arguments
from align.callbacks.tables import response_texts
from align.config import ConfigError, check, read
from align.data.prompts import encode_prompts
from align.data.sources import Source
from align.data.sources import read as read_source
from align.loggers import SECONDS_BETWEEN_LINES
from align.models.load import frozen
from align.rollout.sampler import Sampler
from align.types import Completions, Prompts, joined

PROG = "python -m align.sample"

DESCRIPTION = """\
Writes K answers of a model to every prompt, for people or programs to rank.
The configuration is checked as a whole before anything is loaded; all errors are reported at once.

The output is one file of JSON lines, the configuration's out: each row of the prompts, in their order, with
  responses      the K answers, without special tokens
  finished       for each, whether the model ended it, or it was cut at the sampler's max_new_tokens
An earlier file of that name is replaced when all answers are there."""

EPILOG = """\
overrides:
  key=value      replaces a value of the YAML; nested keys with dots, values as in YAML
  --key=value    the same

examples:
  python -m align.sample configs/sample.yaml
  python -m align.sample configs/sample.yaml k=2 limit=100 out=runs/samples/few.jsonl
  python -m align.sample configs/sample.yaml model.path=runs/ppo/hf sampler.temperature=0.7

exit codes: 0 written, 2 a mistake in the configuration or the data (nothing to debug), 1 anything else"""

STALE = ("scores", "ranking")
"""Fields of a prompt's row that speak of other responses than those written here."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The keys of the YAML.

    Attributes:
        out: The file to write, `.jsonl`.
        seed: Of every draw.
        tokenizer: The model's.
        model: Answers; on a GPU where there is one.
        prompts: Examples of any format that has a prompt.
        sampler: How to answer.
        k: Answers a prompt.
        limit: Take so many prompts, the first ones; null takes all.
        max_prompt_tokens: Longer prompts are left out, and counted.
        batch: Prompts answered in one call, k answers each. The draws depend on it.
    """

    out: str
    seed: int
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    prompts: Source
    sampler: Sampler
    k: int
    limit: int | None = None
    max_prompt_tokens: int
    batch: int = 64

    @classmethod
    def config_errors(cls, arguments: Mapping[str, Any]) -> list[str]:
        """What is wrong with these values, in words; those that are missing are not judged."""
        errors = sizes_wrong(arguments, "k", "limit", "max_prompt_tokens", "batch")
        out, prompts, k, sampler = (arguments.get(key) for key in ("out", "prompts", "k", "sampler"))
        if isinstance(out, str):
            if not out.endswith(".jsonl") or Path(out).is_dir():
                errors.append(f"out: got {out!r}, expected the name of a .jsonl file")
            elif blocked := next((folder for folder in Path(out).parents if folder.is_file()), None):
                errors.append(f"out: {out} cannot be written, since {blocked} is a file; choose another folder")
            elif out in (prompts if isinstance(prompts, list) else [prompts]):
                errors.append(f"out: {out} is also where the prompts come from, and would be replaced")
        if isinstance(k, int) and k > 1 and isinstance(sampler, dict) and sampler.get("temperature") == 0:
            errors.append(f"k: got {k}, but at sampler.temperature 0 all answers are alike; set k=1 or a temperature")
        return errors


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(sample, argv, prog=PROG, description=DESCRIPTION, epilog=EPILOG)


def sample(path: str, overrides: Sequence[str]) -> None:
    """Reads, checks, builds, answers and writes.

    Args:
        path: Of the YAML file.
        overrides: `key=value`.

    Raises:
        ConfigError: The user's mistakes.
    """
    plan = Sampling(**arguments(Sampling, read_checked(path, overrides, Sampling)))
    rows = read_source(plan.prompts)[: plan.limit]
    prompts = encode_prompts(plan.tokenizer, rows, plan.max_prompt_tokens)
    frozen(plan.model).to(default_device())  # type: ignore[arg-type]
    count = len(prompts.rows)
    with progress(f"{plan.k} answers a prompt", count * plan.k, "answers") as advance:
        repeated = prompts.rows_at(torch.arange(count).repeat_interleave(plan.k))
        completions = answers(
            plan.model,
            plan.sampler,
            repeated,
            batch=plan.batch * plan.k,
            seed=plan.seed,
            purpose="sample",
            advance=advance,
        )
    written = grouped(prompts.rows, response_texts(plan.tokenizer, completions), completions.finished.tolist(), plan.k)
    out = Path(plan.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out, json_lines(written))
    ended, tokens = completions.finished.float().mean(), completions.response_lengths.float().mean()
    print(f"{out}: {count:,} prompts with {plan.k} answers of {tokens:.1f} tokens on average, {ended:.1%} finished")


def read_checked(path: str, overrides: Sequence[str], keys: type) -> DictConfig:
    """A YAML whose top-level keys are the arguments of a class, checked as a whole.

    Args:
        path: Of the YAML file.
        overrides: `key=value`.
        keys: The class; it has a class method `config_errors(arguments) -> messages`.

    Raises:
        ConfigError: With all errors.
    """
    parameters, _ = schema.parameters(keys)
    config = read(path, overrides, parameters)
    errors: list[str] = []
    try:
        check(
            config,
            known_keys={name: parameter.annotation for name, parameter in parameters.items()},
            required_keys=[name for name, parameter in parameters.items() if parameter.default is parameter.empty],
        )
    except ConfigError as error:
        errors += error.errors
    with contextlib.suppress(OmegaConfBaseException):  # a reference that cannot be followed: `check` has said so
        errors += keys.config_errors(OmegaConf.to_container(config, resolve=True))  # type: ignore[attr-defined]
    if errors:
        raise ConfigError(errors)
    return config


def sizes_wrong(arguments: Mapping[str, Any], *names: str) -> list[str]:
    """What to say of values that must be at least 1 where they are given."""
    sizes = {name: arguments.get(name) for name in names}
    return [
        f"{name}: got {size}, expected at least 1" for name, size in sizes.items() if isinstance(size, int) and size < 1
    ]


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def answers(
    model: PreTrainedModel,
    sampler: Sampler,
    prompts: Prompts,
    *,
    batch: int,
    seed: int,
    purpose: str,
    advance: Callable[[int], None],
) -> Completions:
    """One response to each prompt, on the CPU, as a pure function of the arguments.

    Args:
        model: On the device to use.
        sampler: How to answer.
        prompts: On the CPU.
        batch: Prompts a call of the sampler.
        seed: Of the draws.
        purpose: What the draws are for (see `align.seeds`).
        advance: Called with the number of prompts answered.
    """
    count = len(prompts.rows)
    prompts = replace(prompts, seeds=seeds.derive_all(seed, purpose, range(count)))
    parts = []
    for number, index in enumerate(torch.arange(count).split(batch)):
        with torch.no_grad(), seeds.forked(seed, purpose, number):
            parts.append(sampler(model, prompts.rows_at(index).to(model.device)).to("cpu"))
        advance(len(index))
    return joined(parts)


def grouped(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str], finished: Sequence[bool], k: int
) -> list[dict[str, Any]]:
    """The output's rows: each prompt's row with its K answers, which stand one after another in `texts`."""
    return [
        {
            **{key: value for key, value in row.items() if key not in STALE},
            "responses": list(texts[number * k : (number + 1) * k]),
            "finished": list(finished[number * k : (number + 1) * k]),
        }
        for number, row in enumerate(rows)
    ]


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextlib.contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal; elsewhere a line now and then, and one at the end.

    Yields:
        A function to be called with the number of units done since the last call.
    """
    if not sys.stdout.isatty():
        yield _Lines(what, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.advance(task, done)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self.unit}/s" if speed else f"- {self.unit}/s")


class _Lines:
    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.start = self.shown = time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if self.done < self.total and now - self.shown < SECONDS_BETWEEN_LINES:
            return
        self.shown, taken = now, max(now - self.start, 1e-9)
        left = taken / max(self.done, 1) * (self.total - self.done)
        rest = f", {left:.0f} s left" if self.done < self.total else ""
        rate = self.done / taken
        print(
            f"{self.what}: {self.done:,}/{self.total:,} {self.unit} in {taken:.1f} s, {rate:,.0f}/s{rest}", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
