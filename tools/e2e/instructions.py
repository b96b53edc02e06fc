"""Instructions in plain English made from fact sheets, and the grading of short answers.

A prompt is the sheet on the first line and the instruction on the second; the response follows directly. Categories:
`describe` (say all the facts in fluent English), `question` (one fact of the sheet, in a short sentence) and
`unanswerable` (a fact the sheet does not give: the right answer says so).
"""

import hashlib
import random
import re
from collections.abc import Mapping
from typing import Any

from tools.e2e.facts import check
from tools.e2e.sheets import SLOTS, normalise, parse

DESCRIBE = (
    "Describe this place in one or two sentences.",
    "Write a short text about this place.",
    "Tell me about this place.",
)
QUESTIONS: Mapping[str, str] = {
    "eat type": "What kind of place is it?",
    "food": "What food does it serve?",
    "price range": "What is the price range?",
    "customer rating": "What is the customer rating?",
    "area": "Which area is it in?",
    "family friendly": "Is it family friendly?",
    "near": "What is it near?",
}
"""One wording a slot; the name is never asked for, as every sheet gives it."""

NOT_STATED = "That is not stated."

_SLOT_ASKED = {question: slot for slot, question in QUESTIONS.items()}
_SAYS_NOT_STATED = re.compile(r"\bnot (?:stated|said|given|known|mentioned|specified|clear)\b", re.IGNORECASE)


def prompt_of(sheet: str, instruction: str) -> str:
    """The text a model is given."""
    return f"{normalise(sheet)}\n{instruction}\n"


def describe_prompt(sheet: str) -> str:
    """The prompt that asks for a description, always in the same wording for the same sheet."""
    digest = hashlib.blake2b(normalise(sheet).encode(), digest_size=4).digest()
    return prompt_of(sheet, DESCRIBE[int.from_bytes(digest, "big") % len(DESCRIBE)])


def answer(sheet: str, slot: str) -> str:
    """The right answer to the question about a slot: a short sentence, or that the sheet does not say.

    Raises:
        ValueError: there is no question about this slot.
    """
    if slot not in QUESTIONS:
        raise ValueError(f"There are questions about {', '.join(QUESTIONS)}; got {slot!r}.")
    value = parse(sheet).get(slot)
    if value is None:
        return NOT_STATED
    return {
        "eat type": f"It is a {value}.",
        "food": f"It serves {value} food." if value != "Fast food" else "It serves fast food.",
        "price range": f"The price range is {value}.",
        "customer rating": f"The customer rating is {value}.",
        "area": f"It is in the {value}." if value == "city centre" else f"It is in the {value} area.",
        "family friendly": "Yes, it is family friendly." if value == "yes" else "No, it is not family friendly.",
        "near": f"It is near {value}.",
    }[slot]


def describe_row(sheet: str, text: str, draw: random.Random) -> dict[str, Any]:
    """A demonstration of the description, in a wording drawn at random."""
    prompt = prompt_of(sheet, draw.choice(DESCRIBE))
    return {"prompt": prompt, "response": text, "category": "describe", "sheet": normalise(sheet)}


def slots_to_ask(sheet: str, category: str) -> list[str]:
    """Slots with a question that the sheet gives (category `question`) or lacks (`unanswerable`)."""
    facts = parse(sheet)
    return [slot for slot in SLOTS if slot in QUESTIONS and (slot in facts) == (category == "question")]


def question_row(sheet: str, category: str, draw: random.Random) -> dict[str, Any]:
    """A question with its answer, about one of `slots_to_ask` drawn at random."""
    slot = draw.choice(slots_to_ask(sheet, category))
    prompt = prompt_of(sheet, QUESTIONS[slot])
    return {"prompt": prompt, "response": answer(sheet, slot), "category": category, "sheet": normalise(sheet)}


def slot_asked(prompt: str) -> str | None:
    """The slot a prompt asks about; None where it asks for a description."""
    return _SLOT_ASKED.get(prompt.rstrip("\n").rpartition("\n")[2])


def says_not_stated(text: str) -> bool:
    """Whether the text declines to answer because the sheet does not say."""
    return _SAYS_NOT_STATED.search(text) is not None


def answer_is_right(row: Mapping[str, Any], text: str) -> bool:
    """Whether a text answers the question of `row` (fields `prompt`, `sheet`) rightly.

    A question is answered by the sheet's value in any wording the checker knows, with nothing that contradicts the
    sheet; one that has no answer, by saying that it is not stated and stating nothing false.

    Raises:
        ValueError: the prompt asks no question.
    """
    slot = slot_asked(row["prompt"])
    if slot is None:
        raise ValueError(f"Expected a prompt that ends in one of the questions of the task, got {row['prompt']!r}.")
    found = check(row["sheet"], text)
    if found.wrong:
        return False
    if slot not in parse(row["sheet"]):
        return says_not_stated(text)
    return slot not in found.missing and not says_not_stated(text)
