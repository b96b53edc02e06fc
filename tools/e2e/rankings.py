"""The human rankings (RankME) in the task's own form, split so that the test part is about people never seen.

Knows nothing of models; `prepare.py` writes what this makes.
"""

import random
from collections import Counter
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
    judgements = Counter(row["labeler"] for row in rows)
    labelers = sorted(judgements)
    draw.shuffle(labelers)
    labelers_in_train: set[str] = set()
    for labeler in labelers:
        if sum(judgements[name] for name in labelers_in_train) < TRAIN_SHARE * len(rows):
            labelers_in_train.add(labeler)
    train, test = [], []
    for row in rows:
        sides = (row["prompt"] in prompts_in_train, row["labeler"] in labelers_in_train)
        if sides == (True, True) and len(set(row["scores"])) > 1:
            train.append(row)
        elif sides == (False, False):
            test.append(row)
    return {"train": train, "test": test}
