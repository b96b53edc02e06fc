"""`python -m tools.e2e.label SAMPLES.jsonl OUT.jsonl`: ranks a model's samples as human labelers would.

A simulated labeler sees how many facts of a text are missing or wrong and how fluent it is (`utility`), and sees it
with noise: the same text looks a little different to each of them. How much noise is set so that two of them agree
about as often as the labelers of the InstructGPT paper do (section 3.4: 72.6 ± 1.5 % and 77.3 ± 1.3 %), counted on the
pairs of texts that neither calls a tie. One labeler ranks all answers to a prompt.
"""

import argparse
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from align.seeds import derive
from tools.e2e.facts import check
from tools.e2e.files import read_rows, write_rows
from tools.e2e.fluency import faults
from tools.e2e.instructions import answer_is_right, says_not_stated, slot_asked

MISSING = 1.0
WRONG = 1.5
"""Labelers were told to put truth before completeness, so an invented fact weighs more than one left out."""
WRONG_ANSWER = 3.0
"""An answer is one fact, and the whole task: as bad as two wrong facts of a description."""
UNFINISHED = 2.0
FAULT = 0.5
MOST_FAULTS = 4
"""More of them do not make a text worse."""

LABELERS = 10
TIE_WIDTH = 0.5
"""Utilities are seen in steps of this size: half a missing fact makes no difference anybody would rank by."""
AGREEMENT = 0.76
CALIBRATED_ON = 1000
"""Prompts, the first of the samples: with K=4, 30,000 pairs, which fix the agreement to about half a point."""


def utility(row: Mapping[str, Any], text: str, finished: bool) -> float:
    """How good a text is to someone without noise: 0 is faultless, a missing fact costs 1.

    Args:
        row: the prompt's row, with `prompt`, `sheet` and `category`.
        text: the answer.
        finished: whether it ended by itself.
    """
    if row["category"] == "describe":
        facts = check(row["sheet"], text)
        cost = MISSING * len(facts.missing) + WRONG * len(facts.wrong)
    else:
        cost = 0.0 if answer_is_right(row, text) else WRONG_ANSWER
    return -cost - FAULT * min(faults(text), MOST_FAULTS) - UNFINISHED * (not finished)


def seen(true: float, noise: float, standard_deviation: float) -> float:
    """The score a labeler gives: the utility with their noise, in steps of `TIE_WIDTH`."""
    return TIE_WIDTH * round((true + standard_deviation * noise) / TIE_WIDTH) + 0.0


def contrasted(rows: Sequence[Mapping[str, Any]], seed: int) -> list[Mapping[str, Any]]:
    """The rows, with something to rank in those questions to which all answers are the same.

    A good model answers a short question alike every time, above all one that has no answer; a reward model that never
    sees such a question answered wrongly learns nothing of it, and PPO finds out. So the last two answers give place to
    what the model said to the same question about other places: to their reader, answers that are made up, or that
    decline a question that has an answer. Declining must lose there as often as it wins elsewhere, or the reward model
    learns to like it always.
    """
    answered: dict[str, list[tuple[str, bool]]] = {}
    for row in rows:
        if (question := slot_asked(row["prompt"])) is not None:
            answered.setdefault(question, []).append((row["responses"][0], row["finished"][0]))
    result = []
    for row in rows:
        pairs = list(zip(row["responses"], row["finished"], strict=True))
        question = slot_asked(row["prompt"])
        if question is not None and len(set(row["responses"])) == 1:
            draw = random.Random(derive(seed, f"made up: {row['prompt']}"))
            others = [pair for pair in answered[question] if pair != pairs[0]]
            declined = [pair for pair in others if says_not_stated(pair[0])]
            for place in range(max(1, len(pairs) - 2), len(pairs)):
                if found := declined if declined and draw.random() < 0.75 else others:
                    pairs[place] = draw.choice(found)
        result.append({**row, "responses": [text for text, _ in pairs], "finished": [done for _, done in pairs]})
    return result


@dataclass(frozen=True)
class Ranked:
    """The answers to one prompt with what there is to see in them."""

    row: Mapping[str, Any]
    utilities: tuple[float, ...]
    noise: tuple[tuple[float, ...], ...]
    """Labeler by answer, standard normal; equal texts look equal to the same labeler."""

    def scores(self, labeler: int, standard_deviation: float) -> list[float]:
        """What a labeler says of the answers."""
        pairs = zip(self.utilities, self.noise[labeler], strict=True)
        return [seen(true, noise, standard_deviation) for true, noise in pairs]


def look_at(row: Mapping[str, Any], seed: int) -> Ranked:
    """Reads the answers of a sampled row for every labeler.

    Raises:
        ValueError: the row has not one `finished` for each of its `responses`.
    """
    texts, finished = row["responses"], row["finished"]
    if len(texts) != len(finished) or not texts:
        raise ValueError(
            f"Expected a row of align.sample with as many 'finished' as 'responses', got {len(finished)} and "
            f"{len(texts)} for the prompt {row['prompt']!r}."
        )
    noise = [_noise(derive(seed, f"how it looks: {row['prompt']}{text}")) for text in texts]
    utilities = tuple(utility(row, text, ended) for text, ended in zip(texts, finished, strict=True))
    return Ranked(row, utilities, tuple(zip(*noise, strict=True)))


def _noise(seed: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(0.0, 1.0) for _ in range(LABELERS)]


def agreement(ranked: Sequence[Ranked], standard_deviation: float) -> float:
    """How often two labelers order two answers alike, where neither calls them a tie; 1.0 where there is no such pair.

    Labelers are paired off (0 with 1, 2 with 3, ...) and each pair of labelers judges everything.
    """
    same = compared = 0
    for item in ranked:
        for labeler in range(0, LABELERS - 1, 2):
            first = item.scores(labeler, standard_deviation)
            second = item.scores(labeler + 1, standard_deviation)
            for i, j in itertools.combinations(range(len(first)), 2):
                product = (first[i] - first[j]) * (second[i] - second[j])
                compared += product != 0
                same += product > 0
    return same / compared if compared else 1.0


def calibrate(ranked: Sequence[Ranked], target: float = AGREEMENT) -> float:
    """The standard deviation of the noise, in units of a missing fact, at which two labelers agree to `target`.

    By bisection, with the labelers' own noise, on the first `CALIBRATED_ON` prompts.

    Raises:
        ValueError: the answers differ so little that no noise in (0, 20) gives that agreement.
    """
    ranked = ranked[:CALIBRATED_ON]
    low, high = 0.0, 20.0
    if not agreement(ranked, high) < target < agreement(ranked, 0.01):
        raise ValueError(
            f"No noise makes two labelers agree to {target:.2f} on these samples: they agree to "
            f"{agreement(ranked, 0.01):.2f} with none. Sample more prompts, or at temperature 1."
        )
    for _ in range(20):
        middle = (low + high) / 2
        if agreement(ranked, middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def judge(ranked: Sequence[Ranked], standard_deviation: float, seed: int) -> list[dict[str, Any]]:
    """One comparison a prompt by a labeler drawn at random; prompts whose answers all tie are left out."""
    rows = []
    for item in ranked:
        labeler = derive(seed, f"who ranks {item.row['prompt']}") % LABELERS
        scores = item.scores(labeler, standard_deviation)
        if len(set(scores)) > 1:
            kept = {key: item.row[key] for key in ("prompt", "responses", "category", "sheet")}
            rows.append({**kept, "scores": scores, "labeler": f"sim-{labeler}"})
    return rows


def measured(ranked: Sequence[Ranked], standard_deviation: float) -> dict[str, float]:
    """Shares of pairs over all labelers: `ties`, and `right` (as the noise-free utility has it, where both differ)."""
    ties = pairs = right = decided = 0
    for item, labeler in itertools.product(ranked, range(LABELERS)):
        scores = item.scores(labeler, standard_deviation)
        for i, j in itertools.combinations(range(len(scores)), 2):
            product = (scores[i] - scores[j]) * (item.utilities[i] - item.utilities[j])
            pairs += 1
            ties += scores[i] == scores[j]
            decided += product != 0
            right += product > 0
    return {"ties": ties / pairs if pairs else 0.0, "right": right / decided if decided else 0.0}


def main(arguments: Sequence[str] | None = None) -> None:
    """Ranks the samples, mixes the human rankings in, writes the comparisons and prints how labelers agree."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.e2e.label", description="Ranks samples with simulated labelers."
    )
    parser.add_argument(
        "samples", type=Path, help="JSONL of align.sample: prompt, responses, finished, sheet, category"
    )
    parser.add_argument("out", type=Path, help="JSONL of comparisons to write")
    parser.add_argument("--human", type=Path, help="rankings by people, mixed in at random places")
    parser.add_argument("--seed", type=int, default=0, help="of noise, labelers and order (default: 0)")
    options = parser.parse_args(arguments)
    console = Console()
    samples = contrasted(list(read_rows(options.samples)), options.seed)
    ranked = [look_at(row, options.seed) for row in track(samples, "Reading samples", console=console)]
    deviation = calibrate(ranked)
    rows = judge(ranked, deviation, options.seed)
    simulated = len(rows)
    people = list(read_rows(options.human)) if options.human else []
    rows += people
    random.Random(derive(options.seed, "order of comparisons")).shuffle(rows)
    write_rows(options.out, rows)
    shares = measured(ranked, deviation)
    table = Table("what", "value", title=f"Comparisons written to {options.out}", show_header=False)
    table.add_row("prompts ranked by simulated labelers", f"{simulated:,}")
    table.add_row("prompts left out, all answers tied", f"{len(ranked) - simulated:,}")
    table.add_row("rankings by people", f"{len(people):,}")
    table.add_row("noise, standard deviation in missing facts", f"{deviation:.2f}")
    table.add_row("two labelers agree, ties left out", f"{agreement(ranked, deviation):.3f}")
    table.add_row("pairs a labeler calls a tie", f"{shares['ties']:.3f}")
    table.add_row("pairs a labeler ranks as the noise-free checker", f"{shares['right']:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
