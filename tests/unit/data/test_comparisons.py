"""Comparisons and prompts: all answers of a prompt in one batch, ties, counts, the demonstrations of the bias."""

import pytest

from align.data.base import ALL_TIED, CUT_RESPONSE, EMPTY_PROMPT, LONG_PROMPT, READ, USED
from align.data.comparisons import ComparisonData
from align.data.prompts import PromptData, encode_prompts


def comparisons(tokenizer, train, **given):
    limits = {"max_prompt_tokens": 3, "max_response_tokens": 3}
    data = ComparisonData(tokenizer=tokenizer, train=train, **{"batch_size": 2, **limits, **given})
    data.setup()
    return data


def test_all_answers_of_a_prompt_come_together_whatever_their_number(bos_tokenizer):
    data = comparisons(
        bos_tokenizer,
        [
            {"prompt": "a", "responses": ["b", "c d", "e"], "ranking": [2, 1, 2], "labeler": 0},
            {"prompt": "f g", "chosen": "h", "rejected": ""},
        ],
    )
    batch = data.collate(data.encoded["train"])
    assert batch.ids.tolist() == [
        [2, 8, 9, 1, 0],
        [2, 8, 10, 11, 1],
        [2, 8, 12, 1, 0],
        [2, 13, 14, 15, 1],
        [2, 13, 14, 1, 0],
    ]
    assert batch.lengths.tolist() == [4, 5, 4, 5, 4]
    assert batch.response_lengths.tolist() == [2, 3, 2, 2, 1]
    assert batch.prompt_index.tolist() == [0, 0, 0, 1, 1]
    assert batch.scores.tolist() == [-2, -1, -2, 1, 0]
    assert batch.labelers == ("0", "0", "0", "", "")


def test_batches_count_prompts_and_are_never_split(tokenizer):
    rows = [{"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 3]} for _ in range(5)]
    loader = comparisons(tokenizer, rows).train_dataloader()
    assert len(loader) == 3
    assert [batch.prompt_index.tolist() for batch in loader] == [[0, 0, 0, 1, 1, 1]] * 2 + [[0, 0, 0]]


def test_drops_and_cuts_are_counted(tokenizer):
    data = comparisons(
        tokenizer,
        [
            {"prompt": "a", "responses": ["b", "c"], "scores": [4, 4]},
            {"prompt": "a b c d", "responses": ["b", "c"], "scores": [1, 0]},
            {"prompt": "a b c", "responses": ["b c d", "e f", "g f e d"], "scores": [1, 0, 0]},
        ],
    )
    assert data.report["train"] == {READ: 3, USED: 1, ALL_TIED: 1, LONG_PROMPT: 1, CUT_RESPONSE: 2}
    batch = data.collate(data.encoded["train"])
    assert batch.ids.tolist() == [[8, 9, 10, 9, 10, 11], [8, 9, 10, 12, 13, 1], [8, 9, 10, 14, 13, 12]]
    assert batch.response_lengths.tolist() == [3, 3, 3]


def test_demonstrations_for_the_bias_are_a_seeded_draw(tokenizer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    shown = [{"prompt": "a", "response": word} for word in "abcdefgh"]
    data = comparisons(tokenizer, rows, demonstrations=shown, max_demonstrations=5)
    batches = list(data.demonstration_batches())
    assert [len(batch.ids) for batch in batches] == [2, 2, 1]
    drawn = [row[1] for batch in batches for row in batch.ids.tolist()]
    assert len(set(drawn)) == 5
    assert drawn == [row[1] for batch in data.demonstration_batches() for row in batch.ids.tolist()]
    assert batches[0].mask.tolist() == [[False, True, True]] * 2
    other = comparisons(tokenizer, rows, demonstrations=shown, max_demonstrations=5, seed=1)
    assert drawn != [row[1] for batch in other.demonstration_batches() for row in batch.ids.tolist()]


def test_without_demonstrations_there_are_none(tokenizer):
    data = comparisons(tokenizer, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert list(data.demonstration_batches()) == []


def test_prompts_travel_with_their_examples(bos_tokenizer):
    rows = [{"prompt": "a b", "place": 7}, {"prompt": "a b c"}, {"prompt": "d", "response": "e"}]
    prompts = encode_prompts(bos_tokenizer, rows, 3)
    assert prompts.ids.tolist() == [[2, 8, 9], [2, 11, 0]]
    assert prompts.lengths.tolist() == [3, 2]
    assert prompts.rows == (rows[0], rows[2])


def test_prompt_data_counts_and_batches(tokenizer):
    rows = [{"prompt": word} for word in ("a", "", "b b", "c c c", "d")]
    data = PromptData(tokenizer=tokenizer, train=rows, valid=rows[:1], batch_size=2, max_prompt_tokens=2)
    data.setup()
    assert data.report["train"] == {READ: 5, USED: 3, LONG_PROMPT: 1, EMPTY_PROMPT: 1}
    assert sorted(row["prompt"] for batch in data.train_dataloader() for row in batch.rows) == ["a", "b b", "d"]
    (batch,) = data.val_dataloader()
    assert batch.ids.tolist() == [[8]]


def test_no_usable_prompt_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=rf"no usable prompt among 1 examples\. 1 {LONG_PROMPT}; max_prompt_tokens=1"):
        encode_prompts(tokenizer, [{"prompt": "a b"}], 1)
