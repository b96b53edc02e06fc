"""The human rankings (RankME) in the task's own form, split so that the test part is about people never seen.

Knows nothing of models; `prepare.py` writes what this makes.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tools.e2e.instructions import describe_prompt
from tools.e2e.sheets import normalise

TRAIN_SHARE = 0.6
"""Of the prompts, and of the judgements by labelers: of all, 36 % are then left to learn from and 16 % to test on."""


def convert(judged: Mapping[str, Any]) -> dict[str, Any]:
    """A judgement as a comparison of three descriptions; labelers are called `human-7`."""
    sheet = normalise(judged["prompt"])
    return {
        "prompt": describe_prompt(sheet),
        "responses": list(judged["responses"]),
        "scores": [float(score) for score in judged["scores"]],
        "labeler": f"human-{judged['labeler']}",
        "criterion": judged["criterion"],
        "category": "describe",
        "sheet": sheet,
    }


def split(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """`train` and `test`, with neither a prompt nor a labeler in common.

    Judgements of a test prompt by a training labeler, or the reverse, belong to neither. Rows in which all scores are
    equal hold no preference: they are left out of `train` and kept in `test`, where ties say how sure people are.
    """
    draw = random.Random(seed)
    prompts = sorted({row["prompt"] for row in rows})
    draw.shuffle(prompts)
    prompts_in_train = set(prompts[: round(TRAIN_SHARE * len(prompts))])
    labelers_in_train = _labelers_in_train(rows, draw)
    train, test = [], []
    for row in rows:
        sides = (row["prompt"] in prompts_in_train, row["labeler"] in labelers_in_train)
        if sides == (True, True) and len(set(row["scores"])) > 1:
            train.append(row)
        elif sides == (False, False):
            test.append(row)
    return {"train": train, "test": test}


def _labelers_in_train(rows: Sequence[dict[str, Any]], draw: random.Random) -> set[str]:
    """Labelers drawn until they hold `TRAIN_SHARE` of the judgements, among those of each criterion by itself.

    Most people judged by one criterion, so a draw among all of them would put one criterion on one side.
    """
    judged: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        judged[row["labeler"]][row["criterion"]] += 1
    of_criterion: dict[str, list[str]] = defaultdict(list)
    for labeler, counts in sorted(judged.items()):
        of_criterion[max(sorted(counts), key=lambda name: counts[name])].append(labeler)
    chosen: set[str] = set()
    for labelers in of_criterion.values():
        draw.shuffle(labelers)
        wanted = TRAIN_SHARE * sum(judged[labeler].total() for labeler in labelers)
        while wanted > 0:
            labeler = labelers.pop()
            chosen.add(labeler)
            wanted -= judged[labeler].total()
    return chosen
