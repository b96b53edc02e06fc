"""Formats: which text is the prompt, which is learned, and what is said about rows that fit none."""

import pytest
from word_tokenizer import CHAT, make_tokenizer

from align.data.sources import Example
from align.data.templates import Piece, Templates, tokenize, whole_text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


def prompt_of(text: str) -> Piece:
    return Piece(text, special=True)


def answer(text: str) -> Piece:
    return Piece(text, learned=True, close=True)


def test_prompt_and_response(tokenizer):
    row = {"prompt": "a b", "response": "c"}
    assert Templates(tokenizer).demonstration(row) == (prompt_of("a b"), answer("c"))
    assert Templates(tokenizer).prompt(row) == prompt_of("a b")


def test_of_two_ranked_answers_the_chosen_one_is_the_demonstration(tokenizer):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert Templates(tokenizer).demonstration(row) == (prompt_of("a"), answer("b"))


@pytest.mark.parametrize(
    ("given", "scores"),
    [
        ({"responses": ["b", "c", "d"], "scores": [3, 1.5, 3]}, (3.0, 1.5, 3.0)),
        ({"responses": ["b", "c", "d"], "ranking": [1, 2, 1]}, (-1.0, -2.0, -1.0)),
        ({"chosen": "b", "rejected": "c"}, (1.0, 0.0)),
    ],
)
def test_ranked_answers_higher_is_better(tokenizer, given, scores):
    ranked = Templates(tokenizer).ranked({"prompt": "a", **given})
    assert ranked.prompt == prompt_of("a")
    assert ranked.responses == tuple(answer(text) for text in ("b", "c", "d")[: len(scores)])
    assert ranked.scores == scores


def test_a_transcript_is_answered_after_its_last_assistant(tokenizer):
    text = f"{HUMAN} a{ASSISTANT} b{HUMAN} c{ASSISTANT} d e"
    opening = prompt_of(f"{HUMAN} a{ASSISTANT} b{HUMAN} c{ASSISTANT}")
    assert Templates(tokenizer).demonstration({"transcript": text}) == (opening, answer(" d e"))
    assert Templates(tokenizer).prompt({"transcript": text}) == opening


def test_two_transcripts_share_their_prompt_also_where_the_answers_begin_alike(tokenizer):
    shared = f"{HUMAN} a{ASSISTANT}"
    row = {"chosen": f"{shared} b c", "rejected": f"{shared} b d"}
    ranked = Templates(tokenizer).ranked(row)
    assert (ranked.prompt, ranked.responses) == (prompt_of(shared), (answer(" b c"), answer(" b d")))
    assert ranked.scores == (1.0, 0.0)
    assert Templates(tokenizer).demonstration(row) == (prompt_of(shared), answer(" b c"))
    assert Templates(tokenizer).prompt(row) == prompt_of(shared)


def test_a_conversation_is_learned_at_every_assistant_turn_with_its_end(tokenizer):
    pieces = Templates(tokenizer).demonstration({"messages": TALK})
    assert pieces == (
        Piece("<start> user a <end> <start> assistant "),
        Piece("b c <end>", learned=True),
        Piece(" <start> user d <end> <start> assistant "),
        Piece("e <end>", learned=True),
    )
    ids = [token for row in tokenize(tokenizer, pieces) for token in row]
    assert ids == [4, 6, 8, 5, 4, 7, 9, 10, 5, 4, 6, 11, 5, 4, 7, 12, 5]


def test_what_follows_the_last_assistant_turn_is_left_out(tokenizer):
    templates = Templates(tokenizer)
    assert templates.demonstration({"messages": TALK[:3]}) == templates.demonstration({"messages": TALK[:2]})


def test_a_template_without_an_end_token_gets_eos_after_the_last_turn_only():
    plain = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    plain += "{% if add_generation_prompt %}assistant {% endif %}"
    tokenizer = make_tokenizer(chat=plain)
    pieces = Templates(tokenizer).demonstration({"messages": TALK})
    assert [(piece.text, piece.learned, piece.close) for piece in pieces] == [
        ("user a assistant ", False, False),
        ("b c ", True, False),
        ("user d assistant ", False, False),
        ("e ", True, True),
    ]
    assert tokenize(tokenizer, pieces)[-1] == [12, 1]


def test_a_conversation_is_answered_after_or_instead_of_its_last_message(tokenizer):
    templates = Templates(tokenizer)
    opening = Piece("<start> user a <end> <start> assistant b c <end> <start> user d <end> <start> assistant ")
    assert templates.prompt({"messages": TALK}) == opening
    assert templates.prompt({"messages": TALK[:3]}) == opening
    assert templates.prompt({"prompt": TALK[:3]}) == opening


def test_ranked_conversations_as_messages_and_as_text(tokenizer):
    templates = Templates(tokenizer)
    other = {"role": "assistant", "content": "f"}
    rows = [
        {"chosen": TALK, "rejected": [*TALK[:3], other]},
        {"prompt": TALK[:3], "chosen": TALK[3:], "rejected": [other]},
        {"prompt": TALK[:3], "chosen": "e", "rejected": "f"},
        {"messages": TALK[:3], "responses": ["e", "f"], "ranking": [1, 2]},
    ]
    first = templates.ranked(rows[0])
    assert first.prompt == templates.prompt({"messages": TALK})
    assert first.responses == (Piece("e <end>", learned=True), Piece("f <end>", learned=True))
    for row in rows[1:3]:
        assert templates.ranked(row) == first
    last = templates.ranked(rows[3])
    assert (last.prompt, last.responses, last.scores) == (first.prompt, first.responses, (-1.0, -2.0))


def test_identical_conversations_still_have_a_prompt(tokenizer):
    ranked = Templates(tokenizer).ranked({"chosen": TALK, "rejected": TALK})
    assert ranked.responses == (Piece("e <end>", learned=True),) * 2


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = CHAT.replace("<start> {{ m.role }}", "<start> {{ m.role if loop.last else 'a' }}")
    with pytest.raises(
        ValueError, match=r"x\.jsonl:3: .*writes earlier turns differently .*one row for each assistant turn"
    ):
        Templates(make_tokenizer(chat=forgetful)).demonstration(Example({"messages": TALK}, "x.jsonl:3"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [TALK[1]]}, "the first message is the assistant's"),
        ({"messages": [{"role": "user"}]}, "expected a list of messages"),
        ({"messages": []}, "expected a list of messages"),
        ({"prompt": "a", "response": None}, "the prompt is text, so a response must be too; got None"),
        ({"prompt": "a", "answer": "b"}, r"the keys \['answer', 'prompt'\]\. The formats are:\n +\{prompt, response\}"),
        ({"transcript": "a b"}, "expected a transcript with an answer after"),
        ({"chosen": "a b", "rejected": "a c"}, "share 2 characters: 'a '"),
        ({"chosen": [TALK[0]], "rejected": [TALK[1]]}, "share no first message"),
    ],
)
def test_rows_that_fit_no_format_are_explained(tokenizer, row, message):
    with pytest.raises(ValueError, match=rf"x\.jsonl:3: [\s\S]*{message}"):
        Templates(tokenizer).demonstration(Example(row, "x.jsonl:3"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"responses": ["b", "c"], "scores": [1]}, r"2 responses need as many scores, got \[1\]"),
        ({"responses": ["b"], "scores": [1]}, r"'responses' must be a list of at least 2 answers, got \['b'\]"),
        ({"responses": "bc", "scores": [1, 2]}, "'responses' must be a list of at least 2 answers, got 'bc'"),
        ({"responses": ["b", "c"], "scores": [1, None]}, r"scores must be finite numbers, got \[1, None\]"),
        ({"responses": ["b", "c"], "ranking": [1, float("nan")]}, "ranking must be finite numbers"),
        (
            {"responses": ["b", "c"]},
            r"cannot read a comparison from an example with the keys \['prompt', 'responses'\]",
        ),
    ],
)
def test_comparisons_that_cannot_be_ranked_are_explained(tokenizer, given, message):
    with pytest.raises(ValueError, match=rf"x\.jsonl:3: {message}"):
        Templates(tokenizer).ranked(Example({"prompt": "a", **given}, "x.jsonl:3"))


def test_messages_need_a_chat_template(bos_tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        Templates(bos_tokenizer).demonstration({"messages": TALK})


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token, so a model could not learn to stop"):
        Templates(tokenizer)


def test_bos_opens_prompts_and_texts_and_eos_closes_once(bos_tokenizer):
    pieces = [prompt_of("a b"), answer("c"), answer("c <eos>"), answer(""), whole_text({"text": "d"})]
    assert tokenize(bos_tokenizer, pieces) == [[2, 8, 9], [10, 1], [10, 1], [1], [2, 11, 1]]


def test_a_prompt_stays_open_with_a_tokenizer_that_closes_every_text():
    from tokenizers import processors

    tokenizer = make_tokenizer()
    both = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = both
    assert tokenize(tokenizer, [prompt_of("a"), whole_text({"text": "a"})]) == [[2, 8], [2, 8, 1]]


def test_pretraining_text_is_a_string():
    with pytest.raises(ValueError, match=r"expected pretraining text .* the keys \['prompt'\]"):
        whole_text({"prompt": "a"})
