"""`python -m tools.e2e.prepare --out runs/data`: every file the default run reads, from the data in `data/e2e`.

Writes the tokenizer with a randomly initialised model, the pretraining text, the demonstrations, the prompts and the
human rankings. The same seed gives the same bytes; each file appears complete or not at all.
"""

import argparse
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from align.seeds import derive, forked
from tools.e2e.files import DATA, read_rows, write_rows
from tools.e2e.instructions import describe_prompt, describe_row, question_row, slots_to_ask
from tools.e2e.rankings import convert, split
from tools.e2e.sheets import SPLITS, extended, normalise

VOCABULARY = 1024
QUESTION_SHARE = 0.2
"""Of the demonstrations; half of the questions have no answer in the sheet."""
PROMPT_QUESTION_SHARE = 0.25
MADE_UP_SHARE = 0.6
"""Of the sheets in training prompts. Rankings and PPO need no human text, so they can go where demonstrations are few:
4 % of the training sheets give all eight facts, and nearly half of the test's."""
TEST_QUESTIONS = 200
"""Of each kind, enough for a standard error of 3.5 points at worst."""
MAX_POSITIONS = 512
UNITS = r"^name:| \| [a-z ]+:|\n[^\n]+\n| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
"""What no token reaches beyond: a slot's name, a line of its own, a word, a number, signs, white space."""

Row = dict[str, Any]


def human_texts(name: str) -> list[tuple[str, str]]:
    """(sheet, text) of a split's demonstrations, sheets in one spelling, `are n't` joined as people write it."""
    rows = read_rows(DATA / f"demonstrations.{name}.jsonl.gz")
    return [(normalise(row["prompt"]), re.sub(r"(?<=\w) ?n ?'t\b", "n't", row["response"]).strip()) for row in rows]


def demonstrations(texts: Sequence[tuple[str, str]], seed: int) -> list[Row]:
    """Every human text as a description, with questions mixed in, in random order."""
    draw = random.Random(seed)
    rows = [describe_row(sheet, text, draw) for sheet, text in texts]
    wanted = round(len(rows) * QUESTION_SHARE / (1 - QUESTION_SHARE))
    rows += questions([sheet for sheet, _ in texts], wanted, draw)
    draw.shuffle(rows)
    return rows


def questions(sheets: Sequence[str], count: int, draw: random.Random) -> list[Row]:
    """`count` questions about sheets drawn at random, with and without an answer in turn.

    Raises:
        ValueError: no sheet gives a slot that can be asked for, or none lacks one.
    """
    pools = {kind: [sheet for sheet in sheets if slots_to_ask(sheet, kind)] for kind in ("question", "unanswerable")}
    for kind, pool in pools.items():
        if not pool:
            raise ValueError(f"Expected sheets that allow a question of the kind {kind!r}, got none in {len(sheets)}.")
    kinds = ["question" if place % 2 == 0 else "unanswerable" for place in range(count)]
    return [question_row(draw.choice(pools[kind]), kind, draw) for kind in kinds]


def distinct_questions(sheets: Sequence[str], count: int, draw: random.Random) -> list[Row]:
    """As `questions`, no prompt twice, with the answer as the only reference.

    Raises:
        ValueError: the sheets do not allow that many distinct questions.
    """
    kept: dict[str, Row] = {}
    wanted = Counter({"question": (count + 1) // 2, "unanswerable": count // 2})
    for row in questions(sheets, 20 * count, draw):
        if row["prompt"] not in kept and wanted[row["category"]] > 0:
            wanted[row["category"]] -= 1
            kept[row["prompt"]] = {**_without_response(row), "references": [row["response"]]}
    if len(kept) == count:
        return list(kept.values())
    raise ValueError(f"Expected {count} distinct questions, found {len(kept)} in {len(sheets)} sheets; ask for fewer.")


def prompts(
    texts: Sequence[tuple[str, str]], question_count: int | None, seed: int, made_up_share: float = 0.0
) -> list[Row]:
    """Distinct prompts: a description of each sheet, and questions (a fixed share where no count is given).

    A share of the sheets is extended to seven or eight facts, about a place that nobody has described.
    """
    draw = random.Random(seed)
    references: dict[str, list[str]] = {}
    for sheet, text in texts:
        references.setdefault(sheet, []).append(text)
    for sheet in draw.sample(list(references), round(made_up_share * len(references))):
        del references[sheet]
        references[extended(sheet, draw)] = []
    rows: list[Row] = [
        {"prompt": describe_prompt(sheet), "category": "describe", "sheet": sheet, "references": found}
        for sheet, found in references.items()
    ]
    if question_count is None:
        question_count = round(len(rows) * PROMPT_QUESTION_SHARE / (1 - PROMPT_QUESTION_SHARE))
    rows += distinct_questions(list(references), question_count, draw)
    draw.shuffle(rows)
    return rows


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no special token by itself and gives back every text unchanged.

    The names of a sheet's slots and the lines that instruct may become one token each, which shortens prompts by half.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(UNITS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=MAX_POSITIONS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def random_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about one million parameters, the size two CPU cores train well in minutes."""
    special = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=special["<pad>"],
        bos_token_id=special["<bos>"],
        eos_token_id=special["<eos>"],
    )
    with forked(seed, "e2e initial weights"):
        return LlamaForCausalLM(config).float()


def write_model(folder: Path, texts: Iterable[str], seed: int) -> LlamaForCausalLM:
    """The tokenizer trained on `texts` and the initial model as one Hugging Face folder, replaced as a whole."""
    tokenizer = train_tokenizer(texts)
    model = random_model(tokenizer, seed)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return model


def tables(seed: int) -> dict[str, list[Row]]:
    """Every JSONL file to write, name without ending -> rows."""
    texts = {name: human_texts(name) for name in SPLITS}
    written: dict[str, list[Row]] = {}
    judged = [convert(row) for row in read_rows(DATA / "rankings.rankme.jsonl.gz")]
    human = split(judged, derive(seed, "e2e split of people"))
    # How natural a text reads is another question than how well it says what is so, and was often answered against it.
    for part, rows in human.items():
        written[f"rankings.human.{part}"] = [row for row in rows if row["criterion"] != "naturalness"]
    written["rankings.naturalness.test"] = [row for row in human["test"] if row["criterion"] == "naturalness"]
    # The people judged sheets of the test split: what the reward model may learn from is no longer a test.
    seen = {row["sheet"] for row in human["train"]}
    asked = {**texts, "test": [(sheet, text) for sheet, text in texts["test"] if sheet not in seen]}
    for name in SPLITS:
        if name != "test":
            written[f"pretraining.{name}"] = [{"text": text} for _, text in texts[name]]
        drawn = derive(seed, f"e2e demonstrations {name}")
        written[f"demonstrations.{name}"] = demonstrations(texts[name], drawn)
        if name == "test":
            written["human.test"] = [row for row in written["demonstrations.test"] if row["category"] == "describe"]
        count = 2 * TEST_QUESTIONS if name == "test" else None
        share = MADE_UP_SHARE if name == "train" else 0.0
        written[f"prompts.{name}"] = prompts(asked[name], count, derive(seed, f"e2e prompts {name}"), share)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes everything and prints what was written."""
    parser = argparse.ArgumentParser(prog="python -m tools.e2e.prepare", description="Writes the data of the E2E task.")
    parser.add_argument("--out", type=Path, default=Path("runs/data"), help="folder to write to (default: runs/data)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    options = parser.parse_args(arguments)
    out: Path = options.out
    seed: int = options.seed
    logging.disable_progress_bar()
    written = tables(seed)
    for name, rows in sorted(written.items()):
        write_rows(out / f"{name}.jsonl.gz", rows)
    spoken = (row["prompt"] + row["response"] for row in written["demonstrations.train"])
    model = write_model(out / "init", spoken, seed)
    _print_summary(out, written, model.num_parameters())


def _without_response(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "response"}


def _print_summary(out: Path, written: dict[str, list[Row]], parameters: int) -> None:
    table = Table("file", "rows", "prompts", "what is in it", title=f"Written to {out}")
    for name, rows in sorted(written.items()):
        kinds = Counter(row.get("category") or row.get("criterion") or "text" for row in rows)
        distinct = len({row["prompt"] for row in rows if "prompt" in row})
        parts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        table.add_row(f"{name}.jsonl.gz", f"{len(rows):,}", f"{distinct:,}" if distinct else "", parts)
    table.add_row("init/", "", "", f"tokenizer of {VOCABULARY:,} tokens, Llama of {parameters:,} parameters")
    Console().print(table)


if __name__ == "__main__":
    main()
