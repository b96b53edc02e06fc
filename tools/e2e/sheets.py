"""Fact sheets: `name: Cotto | eat type: pub | near: The Bakers` as a mapping from slot to value, and the places known.

Everything else of the task starts from here. Knows nothing of texts, instructions or models.
"""

import functools
import random
import re
from collections.abc import Mapping

from tools.e2e.files import DATA, read_rows

SLOTS = ("name", "eat type", "food", "price range", "customer rating", "area", "family friendly", "near")
"""In the order in which sheets name them."""

SPLITS = ("train", "valid", "test")


def normalise(sheet: str) -> str:
    """One spelling of a sheet: the training split writes `£ 20 - 25` where the others write `£20-25`."""
    sheet = re.sub(r"£\s+(?=\d)", "£", sheet.strip())
    return re.sub(r"(?<=\d)\s*-\s*(?=\d)", "-", sheet)


@functools.lru_cache(maxsize=16_384)
def parse(sheet: str) -> Mapping[str, str]:
    """The facts of a sheet, slot -> value, prices in the spelling of the valid and test splits.

    Takes a whole prompt too: only the first line is read.

    Raises:
        ValueError: a part is not `slot: value`, or the slot is unknown or given twice.
    """
    facts: dict[str, str] = {}
    for part in normalise(sheet.split("\n", 1)[0]).split(" | "):
        slot, colon, value = part.partition(":")
        slot, value = slot.strip(), value.strip()
        if not colon or not value or slot not in SLOTS or slot in facts:
            raise ValueError(
                f"A fact sheet is 'slot: value | slot: value', each slot once and one of {', '.join(SLOTS)}; "
                f"got {part!r} in {sheet!r}."
            )
        facts[slot] = value
    return facts


@functools.cache
def known_sheets() -> frozenset[str]:
    """Every sheet of the data, of all splits."""
    files = [DATA / f"demonstrations.{split}.jsonl.gz" for split in SPLITS]
    return frozenset(normalise(row["prompt"]) for file in files for row in read_rows(file))


@functools.cache
def known_values() -> Mapping[str, tuple[str, ...]]:
    """Every value each slot has anywhere in the data, sorted."""
    values: dict[str, set[str]] = {slot: set() for slot in SLOTS}
    for split in SPLITS:
        for prompt in {row["prompt"] for row in read_rows(DATA / f"demonstrations.{split}.jsonl.gz")}:
            for slot, value in parse(prompt).items():
                values[slot].add(value)
    return {slot: tuple(sorted(found)) for slot, found in values.items()}


@functools.cache
def known_places() -> tuple[str, ...]:
    """Every place the data names, as the place described or as its neighbour, sorted."""
    values = known_values()
    return tuple(sorted({*values["name"], *values["near"]}))


def extended(sheet: str, draw: random.Random) -> str:
    """A place about which more is known: every slot the sheet lacks gets a value, or every slot but one.

    Never a sheet of the data: another value is drawn until it is a new one.
    """
    facts = dict(parse(sheet))
    lacking = [slot for slot in SLOTS if slot not in facts]
    filled = lacking if draw.random() < 0.5 else draw.sample(lacking, max(0, len(lacking) - 1))
    for _ in range(1000):
        for slot in filled or SLOTS[1:]:
            facts[slot] = draw.choice(known_values()[slot])
        made = " | ".join(f"{slot}: {facts[slot]}" for slot in SLOTS if slot in facts)
        if facts.get("near") != facts["name"] and made not in known_sheets():
            return made
    raise ValueError(f"No sheet that extends {sheet!r} is new.")
