"""Demonstrations and text: ids, masks and every count, derived by hand from the word tokenizer."""

import json

import pytest
import torch

from align.data.base import CUT_RESPONSE, CUT_TEXT, LONG_PROMPT, NOTHING_LEARNED, READ, USED, AlignData
from align.data.demonstrations import DemonstrationData
from align.data.text import TextData


def demonstrations(tokenizer, train, **given):
    limits = {"max_prompt_tokens": 20, "max_response_tokens": 20}
    data = DemonstrationData(tokenizer=tokenizer, train=train, **{"batch_size": 4, **limits, **given})
    data.setup()
    return data


def collated(data: AlignData):
    return data.collate(data.encoded["train"])


def rows(mask: torch.Tensor) -> list[list[int]]:
    return mask.int().tolist()


def test_the_prompt_is_masked_and_eos_is_learned(bos_tokenizer):
    batch = collated(
        demonstrations(bos_tokenizer, [{"prompt": "a b", "response": "c"}, {"prompt": "d", "response": "e f g"}])
    )
    assert batch.ids.tolist() == [[2, 8, 9, 10, 1, 0], [2, 11, 12, 13, 14, 1]]
    assert batch.lengths.tolist() == [5, 6]
    assert rows(batch.mask) == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]]


def test_loss_on_prompt_learns_all_but_the_first_token(bos_tokenizer):
    data = demonstrations(bos_tokenizer, [{"prompt": "a b", "response": "c"}], loss_on_prompt=True)
    assert rows(collated(data).mask) == [[0, 1, 1, 1, 1]]


def test_without_bos_nothing_predicts_the_answer_to_an_empty_prompt(tokenizer):
    batch = collated(demonstrations(tokenizer, [{"prompt": "", "response": "c d"}]))
    assert (batch.ids.tolist(), rows(batch.mask)) == ([[10, 11, 1]], [[0, 1, 1]])


def test_a_conversation_is_learned_at_both_assistant_turns(tokenizer):
    talk = [("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")]
    batch = collated(
        demonstrations(tokenizer, [{"messages": [{"role": role, "content": text} for role, text in talk]}])
    )
    assert batch.ids.tolist() == [[4, 6, 8, 5, 4, 7, 9, 10, 5, 4, 6, 11, 5, 4, 7, 12, 5]]
    assert rows(batch.mask) == [[0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]]


def test_pad_may_equal_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    batch = collated(demonstrations(tokenizer, [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": ""}]))
    assert batch.ids.tolist() == [[8, 9, 1], [10, 1, 1]]
    assert (batch.lengths.tolist(), rows(batch.mask)) == ([3, 2], [[0, 1, 1], [0, 1, 0]])


def test_every_drop_and_cut_is_counted(tokenizer, tmp_path):
    source = [
        {"prompt": "a b c", "response": "d e f"},  # 3 and 4 tokens: just fits
        {"prompt": "a b c d", "response": "e"},  # prompt of 4
        {"prompt": "a", "response": "b c d e"},  # response of 5
        {"messages": [{"role": "user", "content": "a"}]},  # no assistant turn
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in source))
    data = demonstrations(tokenizer, str(path), valid=source[:2], max_prompt_tokens=3, max_response_tokens=4)
    assert data.report == {
        "train": {READ: 4, USED: 2, LONG_PROMPT: 1, CUT_RESPONSE: 1, NOTHING_LEARNED: 1},
        "valid": {READ: 2, USED: 1, LONG_PROMPT: 1},
    }
    batch = collated(data)
    assert batch.ids.tolist() == [[8, 9, 10, 11, 12, 13, 1], [8, 9, 10, 11, 12, 0, 0]]  # the cut answer has no EOS
    assert rows(batch.mask) == [[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]]


def test_no_usable_example_is_an_error_that_says_why(tokenizer):
    with pytest.raises(ValueError, match=rf"no usable example\. train: 1 examples read; 0 used; 1 {LONG_PROMPT}"):
        demonstrations(tokenizer, [{"prompt": "a b", "response": "c"}], max_prompt_tokens=1)


def test_an_error_on_an_example_names_its_line(tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"question": "a", "response": "b"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: cannot read a demonstration .*\['question', 'response'\]"):
        demonstrations(tokenizer, str(path))


def test_examples_can_come_from_anywhere(tokenizer):
    class Own(DemonstrationData):
        def examples(self, split):
            return ({"prompt": split, "response": word} for word in ("a", "b"))

    data = Own(tokenizer=tokenizer, train=[], batch_size=1, max_prompt_tokens=5, max_response_tokens=5)
    data.setup()
    assert collated(data).ids.tolist() == [[3, 8, 1], [3, 9, 1]]


def test_mixed_in_texts_are_their_share_and_change_with_the_epoch(tokenizer):
    shown = [{"prompt": "a", "response": "b"}] * 18
    texts = [{"text": f"{first} {second}"} for first in "cdef" for second in "gh"]
    data = demonstrations(tokenizer, shown, mix=texts, mix_fraction=0.1, batch_size=20)
    assert data.train_size == 20  # 18 demonstrations and 2 texts: a tenth
    loader = data.train_dataloader()
    drawn = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        (batch,) = loader
        text = batch.ids[:, 0] > 8
        assert int(text.sum()) == 2
        assert rows(batch.mask[text]) == [[0, 1, 1]] * 2
        drawn += batch.ids[text].tolist()
    assert sorted(drawn) == sorted(
        [first, second, 1] for first in (10, 11, 12, 13) for second in (14, 15)
    )  # 4 epochs use each of the 8 texts once


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mix_fraction": 0.1}, "mix: missing, but mix_fraction is 0.1"),
        ({"mix_fraction": 1.0, "mix": []}, "mix_fraction: got 1.0, expected at least 0 and less than 1"),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"max_prompt_tokens": -1}, "max_prompt_tokens: got -1, expected at least 1"),
    ],
)
def test_arguments_that_make_no_sense(tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        demonstrations(tokenizer, [{"prompt": "a", "response": "b"}], **given)


def test_a_long_text_is_cut_so_that_each_token_is_learned_once(bos_tokenizer):
    data = TextData(tokenizer=bos_tokenizer, train=[{"text": "a b c d e"}, {"text": "f"}], batch_size=4, max_tokens=4)
    data.setup()
    assert data.report["train"] == {READ: 2, USED: 3, CUT_TEXT: 1}
    batch = collated(data)
    assert batch.ids.tolist() == [[2, 8, 9, 10], [10, 11, 12, 1], [2, 13, 1, 0]]
    assert rows(batch.mask) == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize("length", range(1, 12))
def test_whatever_its_length_a_text_loses_no_token(tokenizer, length):
    data = TextData(tokenizer=tokenizer, train=[{"text": " ".join("abcdefgh"[:8][i % 8] for i in range(length))}],
                    batch_size=9, max_tokens=4)  # fmt: skip
    data.setup()
    batch = collated(data)
    expected = [8 + i % 8 for i in range(length)] + [1]
    assert batch.ids[batch.mask].tolist() == expected[1:]


def test_a_text_without_a_token_to_learn_is_dropped_and_counted(tokenizer):
    data = TextData(tokenizer=tokenizer, train=[{"text": ""}, {"text": "a"}], batch_size=4, max_tokens=4)
    data.setup()
    assert data.report["train"] == {READ: 2, USED: 1, NOTHING_LEARNED: 1}


def test_one_token_is_too_few_for_text(tokenizer):
    with pytest.raises(ValueError, match="max_tokens: got 1, expected at least 2"):
        TextData(tokenizer=tokenizer, train=[{"text": "a"}], batch_size=4, max_tokens=1)
