"""The E2E task: what the checker finds, whom it agrees with, instructions, labelers, and the data files."""

import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from tools.e2e import facts, files, instructions, label, prepare, rankings, sheets
from tools.e2e.fluency import faults
from tools.e2e.metrics import FactMetrics

SHEET = (
    "name: The Mill | eat type: pub | food: Italian | price range: cheap | customer rating: high | area: riverside | "
    "family friendly: yes | near: Café Rouge"
)
RIGHT = "The Mill is a cheap, highly rated Italian pub by the river near Café Rouge. It is family friendly."


def found(sheet: str, text: str) -> tuple[set[str], set[str]]:
    result = facts.check(sheet, text)
    return set(result.missing), set(result.wrong)


def test_right_text_has_no_error():
    assert facts.check(SHEET, RIGHT) == facts.Facts((), ())


@pytest.mark.parametrize(
    ("slot", "without"),
    [
        ("name", RIGHT.replace("The Mill", "This")),
        ("eat type", RIGHT.replace("pub", "place")),
        ("food", RIGHT.replace("Italian ", "")),
        ("price range", RIGHT.replace("cheap, ", "")),
        ("customer rating", RIGHT.replace("highly rated ", "")),
        ("area", RIGHT.replace("by the river ", "")),
        ("family friendly", RIGHT.replace(" It is family friendly.", "")),
        ("near", RIGHT.replace("near Café Rouge", "")),
    ],
)
def test_fact_left_out_is_missing_and_nothing_else(slot: str, without: str):
    assert found(SHEET, without) == ({slot}, set())


@pytest.mark.parametrize(
    ("slot", "text"),
    [
        ("eat type", RIGHT.replace("pub", "coffee shop")),
        ("eat type", RIGHT.replace("pub", "restaurant")),
        ("food", RIGHT.replace("Italian", "Japanese")),
        ("price range", RIGHT.replace("cheap", "expensive")),
        ("price range", RIGHT.replace("cheap", "moderately priced")),
        ("price range", RIGHT.replace("a cheap", "a more than £20")),
        ("customer rating", RIGHT.replace("highly rated", "poorly rated")),
        ("customer rating", RIGHT.replace("highly rated", "3 star")),
        ("area", RIGHT.replace("by the river", "in the city centre")),
        ("family friendly", RIGHT.replace("is family", "is not family")),
        ("near", RIGHT.replace("Café Rouge", "Burger King")),
    ],
)
def test_fact_replaced_is_missing_and_wrong(slot: str, text: str):
    assert found(SHEET, text) == ({slot}, {slot})


@pytest.mark.parametrize(
    ("slot", "text"),
    [
        ("eat type", "Cotto is a coffee shop."),
        ("food", "Cotto serves Chinese food."),
        ("price range", "Cotto costs more than £30."),
        ("customer rating", "Cotto has a low customer rating."),
        ("area", "Cotto is in the riverside area."),
        ("family friendly", "Cotto is not kid friendly."),
        ("near", "Cotto is near The Bakers."),
        ("near", "Cotto is near Cotto."),
    ],
)
def test_fact_the_sheet_lacks_is_wrong(slot: str, text: str):
    assert found("name: Cotto", text) == (set(), {slot})


@pytest.mark.parametrize(
    ("fact", "phrase"),
    [
        ("price range: less than £20", "Food costs under 20 pounds."),
        ("price range: less than £20", "It is inexpensive."),
        ("price range: £ 20 - 25", "Prices are between £20-£25."),
        ("price range: £20-25", "It has an average price range of 20 to 25."),
        ("price range: moderate", "It is mid-priced."),
        ("price range: more than £30", "Prices are higher than average."),
        ("price range: more than £ 30", "An average price of over £30."),
        ("price range: high", "It is quite pricey."),
        ("customer rating: 5 out of 5", "It has a five-star rating."),
        ("customer rating: 5 out of 5", "It is rated 5/5 by customers."),
        ("customer rating: 3 out of 5", "Its rating is 3 out of 5 stars."),
        ("customer rating: 1 out of 5", "An average rating of one out of five stars."),
        ("customer rating: low", "It does not have very good reviews."),
        ("customer rating: average", "Customers gave it a mediocre rating."),
        ("customer rating: high", "Customers rate it highly."),
        ("area: city centre", "It is in the center of the city."),
        ("area: city centre", "You find it downtown."),
        ("area: riverside", "It lies on the bank of the river, just outside the city centre."),
        ("family friendly: yes", "It welcomes children."),
        ("family friendly: yes", "Bring the kids."),
        ("family friendly: no", "It is a non-family-friendly place."),
        ("family friendly: no", "It doesn't cater to families with children."),
        ("family friendly: no", "Children are not allowed."),
        ("family friendly: no", "It is for adults only."),
        ("family friendly: no", "It isn 't child friendly."),
        ("food: Fast food", "It sells burgers and fries."),
        ("food: Japanese", "It has sushi."),
        ("food: English", "It serves British dishes."),
        ("eat type: restaurant", "It is a restaurant."),
        ("eat type: coffee shop", "It is a café."),
        ("near: Crowne Plaza Hotel", "It is close to the Crown Plaza."),
        ("near: Rainbow Vegetarian Café", "It is by the Rainbow Vegetarian Cafe."),
    ],
)
def test_paraphrases_say_the_fact(fact: str, phrase: str):
    assert found(f"name: Zizzi | {fact}", f"This is Zizzi. {phrase}") == (set(), set())


@pytest.mark.parametrize(
    "text",
    [
        "Zizzi is a restaurant.",  # what people call any place
        "Zizzi has good coffee.",
        "Zizzi is near the city.",
        "Zizzi is a place to eat.",
    ],
)
def test_vague_words_invent_nothing(text: str):
    assert found("name: Zizzi", text) == (set(), set())


def test_level_belongs_to_its_own_noun():
    sheet = "name: Aromi | price range: cheap | customer rating: high"
    assert found(sheet, "Aromi has low prices and a high customer rating.") == (set(), set())
    swapped = ({"price range", "customer rating"}, {"price range", "customer rating"})
    assert found(sheet, "Aromi has high prices and a low customer rating.") == swapped
    assert found(sheet, "Aromi is priced high, but rated low.") == swapped


def test_negation_does_not_cross_a_clause():
    sheet = "name: Aromi | price range: cheap | family friendly: yes"
    assert found(sheet, "Aromi is not expensive and is family friendly.") == (set(), set())
    contradicts = found(sheet, "Aromi is cheap and family friendly, but it is not kid friendly.")
    assert contradicts == (set(), {"family friendly"})


def test_place_names_state_nothing_but_themselves():
    sheet = "name: The Golden Curry | near: Raja Indian Cuisine"
    assert found(sheet, "The Golden Curry is near Raja Indian Cuisine.") == (set(), set())
    sheet = "name: Strada | near: Yippee Noodle Bar"
    assert found(sheet, "Strada is near Yippee Noodle Bar.") == (set(), set())


def test_checker_reads_whole_prompts_and_both_spellings():
    prompt = instructions.describe_prompt("name: Aromi | price range: £ 20 - 25")
    assert prompt.startswith("name: Aromi | price range: £20-25\n")
    assert found(prompt, "Aromi costs £20-25.") == (set(), set())


@pytest.mark.parametrize("sheet", ["", "name Aromi", "name: Aromi | colour: red", "name: A | name: B"])
def test_broken_sheets_are_refused(sheet: str):
    with pytest.raises(ValueError, match="fact sheet"):
        sheets.parse(sheet)


def test_checker_agrees_with_people_as_measured():
    """Measured with `python -m tools.e2e.facts`; people agree with each other to 0.87 and 0.95."""
    missing, added = facts.detection("missing"), facts.detection("added")
    assert missing.accuracy >= 0.92
    assert missing.recall >= 0.97
    assert missing.accuracy_each >= missing.people
    assert added.accuracy >= 0.94
    assert added.recall >= 0.97


def test_people_score_texts_by_the_errors_found():
    scores = facts.scores_by_errors("informativeness")
    means = [statistics.mean(scores[count]) for count in range(4)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 97
    assert means[3] < 50


def test_human_texts_have_few_errors():
    checked = [facts.check(sheet, text) for sheet, text in prepare.human_texts("valid")[::5]]
    assert statistics.mean(len(result.missing) for result in checked) < 0.46
    assert statistics.mean(len(result.wrong) for result in checked) < 0.09


@pytest.mark.parametrize("slot", list(instructions.QUESTIONS))
def test_answers_are_right_and_others_are_not(slot: str):
    values = sheets.known_values()[slot]
    for value in values:
        sheet = sheets.normalise(f"name: Zizzi | {slot}: {value}")
        row = {"prompt": instructions.prompt_of(sheet, instructions.QUESTIONS[slot]), "sheet": sheet}
        assert instructions.slot_asked(row["prompt"]) == slot
        assert instructions.answer_is_right(row, instructions.answer(sheet, slot))
        assert not instructions.answer_is_right(row, instructions.NOT_STATED)
    other = instructions.answer(f"name: Zizzi | {slot}: {values[0]}", slot)
    row = {"prompt": instructions.prompt_of("name: Zizzi", instructions.QUESTIONS[slot]), "sheet": "name: Zizzi"}
    assert instructions.answer_is_right(row, instructions.NOT_STATED)
    assert not instructions.answer_is_right(row, other)


def test_answers_read_as_english():
    assert instructions.answer(SHEET, "food") == "It serves Italian food."
    assert instructions.answer(SHEET, "area") == "It is in the riverside area."
    assert instructions.answer("name: Zizzi", "near") == "That is not stated."
    with pytest.raises(ValueError, match="name"):
        instructions.answer(SHEET, "name")


def test_metrics_apply_to_their_category_only():
    asked = instructions.prompt_of(SHEET, instructions.QUESTIONS["food"])
    rows = [
        {"prompt": instructions.describe_prompt(SHEET), "sheet": SHEET, "category": "describe"},
        {"prompt": asked, "sheet": SHEET, "category": "question"},
        {"prompt": asked.replace("food: Italian | ", ""), "sheet": "name: The Mill", "category": "unanswerable"},
    ]
    texts = [RIGHT.replace("Italian", "Indian"), "It serves Italian food.", "It serves Italian food."]
    values = FactMetrics()(rows, texts, [True, True, True])
    assert values == {
        "missing": [1.0, None, None],
        "wrong": [1.0, None, None],
        "missing_or_wrong": [2.0, None, None],
        "hallucination": [1.0, None, None],
        "right_answer": [None, 1.0, None],
        "rightly_not_stated": [None, None, 0.0],
    }
    assert values.keys() == FactMetrics.better.keys()
    with pytest.raises(ValueError, match="1 responses"):
        FactMetrics()(rows, texts[:1], [True])


def test_faults_of_style():
    assert faults(RIGHT) == 0
    assert faults("The Mill is is a pub.") == 1
    assert faults("The Mill is a pub. The Mill is a pub.") == 2  # the sentence and the phrase
    assert faults("The Mill is a pubbling.") == 1
    assert faults("") == 1
    assert faults(instructions.NOT_STATED) == 0


def test_utility_costs():
    row = {"prompt": instructions.describe_prompt(SHEET), "sheet": SHEET, "category": "describe"}
    assert label.utility(row, RIGHT, True) == 0
    assert label.utility(row, RIGHT, False) == -2
    assert label.utility(row, RIGHT.replace("Italian ", ""), True) == -1
    assert label.utility(row, RIGHT.replace("Italian", "Indian"), True) == -2.5
    asked = {"prompt": instructions.prompt_of(SHEET, "Is it family friendly?"), "sheet": SHEET, "category": "question"}
    assert label.utility(asked, "No, it is not family friendly.", True) == -3
    assert label.utility(asked, "Yes, it is family friendly.", True) == 0


@pytest.fixture(scope="module")
def ranked() -> list[label.Ranked]:
    """Each of 250 sheets with its own human text and those of three other sheets."""
    texts = prepare.human_texts("valid")
    draw = random.Random(0)
    rows = []
    for sheet, text in draw.sample(texts, 250):
        others = [other for _, other in draw.sample(texts, 3)]
        prompt = instructions.describe_prompt(sheet)
        rows.append({"prompt": prompt, "sheet": sheet, "category": "describe", "responses": [text, *others]})
    return [label.look_at({**row, "finished": [True] * 4}, seed=0) for row in rows]


def test_labelers_agree_like_the_papers(ranked: list[label.Ranked]):
    deviation = label.calibrate(ranked)
    assert 0.73 <= label.agreement(ranked, deviation) <= 0.77
    # Two who are each right with chance p, independently, agree with chance p² + (1-p)²: 0.75 needs p = 0.854.
    assert 0.8 <= label.measured(ranked, deviation)["right"] <= 0.9
    assert label.agreement(ranked, 0.0) == 1.0
    assert label.measured(ranked, 0.0)["right"] == 1.0


def test_judgements_name_their_labeler_and_repeat(ranked: list[label.Ranked]):
    rows = label.judge(ranked, 1.0, seed=0)
    assert rows == label.judge(ranked, 1.0, seed=0)
    assert {row["labeler"] for row in rows} == {f"sim-{i}" for i in range(label.LABELERS)}
    assert all(len(row["scores"]) == len(row["responses"]) == 4 and len(set(row["scores"])) > 1 for row in rows)


def test_same_text_looks_the_same_to_a_labeler():
    row = {"prompt": instructions.describe_prompt(SHEET), "sheet": SHEET, "category": "describe"}
    item = label.look_at({**row, "responses": [RIGHT, RIGHT], "finished": [True, True]}, seed=0)
    assert item.scores(3, 5.0)[0] == item.scores(3, 5.0)[1]
    with pytest.raises(ValueError, match="No noise"):
        label.calibrate([item])
    with pytest.raises(ValueError, match="'finished'"):
        label.look_at({**row, "responses": [RIGHT], "finished": []}, seed=0)


@pytest.fixture(scope="module")
def tables() -> dict[str, list[dict[str, Any]]]:
    return prepare.tables(0)


def test_splits_share_no_sheet(tables: dict[str, list[dict[str, Any]]]):
    of = {name: {row["sheet"] for row in tables[f"demonstrations.{name}"]} for name in sheets.SPLITS}
    assert not of["train"] & of["valid"] | of["train"] & of["test"] | of["valid"] & of["test"]
    assert not {row["sheet"] for row in tables["prompts.train"]} & (of["valid"] | of["test"])
    judged = {row["sheet"] for row in tables["rankings.human.train"]}
    asked = {row["sheet"] for row in tables["prompts.test"]}
    assert asked | judged <= of["test"]
    assert not asked & judged | judged & {row["sheet"] for row in tables["rankings.human.test"]}


def test_people_of_the_test_part_are_unseen(tables: dict[str, list[dict[str, Any]]]):
    train, test = tables["rankings.human.train"], tables["rankings.human.test"]
    assert not {row["labeler"] for row in train} & {row["labeler"] for row in test}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len(train) > 150
    assert len(test) > 100
    assert {row["criterion"] for row in train + test} == {"informativeness", "quality"}
    assert all(len(set(row["scores"])) > 1 for row in train)


def test_prompts_are_distinct_and_mixed_as_stated(tables: dict[str, list[dict[str, Any]]]):
    for name in sheets.SPLITS:
        asked = [row["prompt"] for row in tables[f"prompts.{name}"]]
        assert len(asked) == len(set(asked))
        kinds = [row["category"] for row in tables[f"demonstrations.{name}"]]
        asked_for = kinds.count("question") + kinds.count("unanswerable")
        assert asked_for / kinds.count("describe") == pytest.approx(0.25, abs=1e-3)
    kinds = [row["category"] for row in tables["prompts.test"]]
    assert kinds.count("question") == kinds.count("unanswerable") == prepare.TEST_QUESTIONS
    assert all(row["references"] for row in tables["prompts.test"])
    with pytest.raises(ValueError, match="found 14"):
        prepare.distinct_questions([SHEET, "name: Zizzi"], 20, random.Random(0))
    with pytest.raises(ValueError, match="'unanswerable'"):
        prepare.questions([SHEET], 2, random.Random(0))


def test_extended_sheets_are_new_and_give_seven_or_eight_facts():
    draw = random.Random(0)
    given = sorted(sheets.known_sheets())[::60]
    made = [sheets.extended(sheet, draw) for sheet in given]
    assert not sheets.known_sheets() & set(made)
    sizes = [len(sheets.parse(sheet)) for sheet in made]
    assert set(sizes) == {7, 8} and 0.4 < sizes.count(8) / len(sizes) < 0.75  # those that gave 7 or 8 stay or grow
    for sheet, longer in zip(given, made, strict=True):
        before, after = sheets.parse(sheet), sheets.parse(longer)
        assert list(after) == [slot for slot in sheets.SLOTS if slot in after]
        assert all(value in sheets.known_values()[slot] for slot, value in after.items())
        assert after["name"] == before["name"] != after.get("near")
        if len(before) < 7:
            assert before.items() <= after.items()


def test_training_prompts_go_where_demonstrations_are_few(tables: dict[str, list[dict[str, Any]]]):
    described = [row for row in tables["prompts.train"] if row["category"] == "describe"]
    made_up = [row for row in described if not row["references"]]
    assert len(made_up) / len(described) == pytest.approx(prepare.MADE_UP_SHARE, abs=0.01)
    assert not {row["sheet"] for row in made_up} & sheets.known_sheets()


def test_questions_that_all_answers_agree_on_get_made_up_ones():
    asked = instructions.prompt_of(SHEET, instructions.QUESTIONS["food"])
    other = instructions.prompt_of("name: Zizzi", instructions.QUESTIONS["food"])
    shared = {"category": "question", "finished": [True] * 4}
    rows = [
        {**shared, "prompt": asked, "responses": ["It serves Italian food."] * 4},
        {**shared, "prompt": other, "responses": ["That is not stated."] * 4},
        {**shared, "prompt": asked, "responses": ["It serves Italian food.", "It serves Thai food."] * 2},
        {**shared, "prompt": instructions.describe_prompt(SHEET), "responses": [RIGHT] * 4},
    ]
    found = label.contrasted(rows, seed=0)
    assert found == label.contrasted(rows, seed=0)
    italian, declined = "It serves Italian food.", "That is not stated."
    assert found[0]["responses"] == [italian, italian, declined, declined]
    assert found[1]["responses"] == [declined, declined, italian, italian]
    assert [row["responses"] for row in found[2:]] == [row["responses"] for row in rows[2:]]


def test_converted_rankings_keep_the_order():
    judged = next(files.read_rows(files.DATA / "rankings.rankme.jsonl.gz"))
    row = rankings.convert(judged)
    assert row["scores"] == judged["scores"]
    assert row["responses"] == judged["responses"]
    assert row["prompt"] == instructions.describe_prompt(judged["prompt"])


def test_model_folder_is_deterministic_and_text_comes_back(tmp_path: Path):
    texts = [prompt + text for prompt, text in prepare.human_texts("valid")[:1500]]
    for name in ("one", "two"):
        prepare.write_model(tmp_path / name, texts, seed=0)
    prepare.write_model(tmp_path / "two", texts, seed=0)  # replaces what is there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    tokenizer = prepare.train_tokenizer(texts)
    special = {tokenizer.get_vocab()[token] for token in ("<pad>", "<bos>", "<eos>")}
    assert len(special) == 3
    for text in [*texts[:200], "£20-25, 5 out of 5 — Café\n", " two  spaces"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not special & set(ids)
    model = prepare.random_model(tokenizer, 0)
    assert 0.75e6 < model.num_parameters() < 1.2e6
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_rows_come_back_and_bytes_repeat(tmp_path: Path):
    rows = [{"text": "Café £20"}, {"text": "two\nlines"}]
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.jsonl"):
        assert files.write_rows(tmp_path / name, rows) == 2
        assert list(files.read_rows(tmp_path / name)) == rows
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text":\n')
    with pytest.raises(ValueError, match="line 2"):
        list(files.read_rows(tmp_path / "broken.jsonl"))
