"""From an example of any supported format to the pieces of text a model reads: prompt, responses, turns.

Knows formats and chat templates. Does not know limits, masks or batches; those are the data modules'.

The prompt and each response are separate pieces and are tokenised apart, so that a prompt has the same tokens in
training, in scoring and when a model is asked to answer it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from align.data.sources import origin

ASSISTANT = "\n\nAssistant:"
"""How Anthropic's HH transcripts announce an answer; the prompt ends with it."""

FORMATS = """
  {prompt, response}                    demonstrations
  {prompt, responses, scores}           K answers with scores, higher is better, equal is a tie
  {prompt, responses, ranking}          K answers with ranks, 1 is best, equal is a tie
  {prompt, chosen, rejected}            two answers
  {messages: [{role, content}, ...]}    a conversation, through the tokenizer's chat template
  {chosen, rejected}                    two conversations (lists of messages) or two Anthropic HH transcripts
  {transcript}                          one Anthropic HH transcript
A prompt may also be a list of messages."""

LARGEST = 2.0**127
"""No score is larger, so that each is finite as a float32."""

Message = dict[str, Any]
Text = str | list[Message]


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is tokenised on its own."""

    text: str
    special: bool = False
    """True: the tokenizer adds the special tokens it starts a text with (BOS, where it has one)."""
    learned: bool = False
    """True: the model is trained to write it."""
    close: bool = False
    """True: an EOS token follows."""


@dataclass(frozen=True)
class Ranked:
    """A prompt, its K responses, and a score for each; higher is better."""

    prompt: Piece
    responses: tuple[Piece, ...]
    scores: tuple[float, ...]


class Templates:
    """Reads examples for one tokenizer, whose chat template renders the `messages` formats."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, so a model could not learn to stop; set one, for example "
                "tokenizer.eos_token = '<|endoftext|>' (a token of its vocabulary), and save the tokenizer again"
            )
        self.tokenizer = tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._ends = tuple({*tokenizer.all_special_tokens, *added})

    def prompt(self, row: dict[str, Any]) -> Piece:
        """What a model is asked to answer.

        A conversation is answered after its last message, or instead of it where that is the assistant's; a
        transcript likewise.
        """
        if "prompt" in row or "messages" in row:
            return self._opening(row, self._asked(row))
        if "transcript" in row:
            return Piece(_split_transcript(row, row["transcript"])[0], special=True)
        if "chosen" in row and "rejected" in row:
            return self._opening(row, self._shared_prompt(row)[0])
        raise ValueError(_not_understood(row, "a prompt"))

    def demonstration(self, row: dict[str, Any]) -> tuple[Piece, ...]:
        """The pieces of an example to imitate, in order; `learned` where the model is to write the text itself.

        Of a conversation every assistant turn is learned, with the token that ends it. Of a transcript the last answer
        is, of two ranked answers the chosen one.
        """
        if "messages" in row:
            return self._conversation(row, self._messages(row, row["messages"]))
        if "prompt" in row and ("response" in row or "chosen" in row):
            prompt, response = row["prompt"], row["response"] if "response" in row else row["chosen"]
        elif "transcript" in row:
            prompt, response = _split_transcript(row, row["transcript"])
        elif "chosen" in row and "rejected" in row:
            prompt, response, _ = self._shared_prompt(row)
        else:
            raise ValueError(_not_understood(row, "a demonstration"))
        return self._opening(row, prompt), self._answer(row, prompt, response)

    def ranked(self, row: dict[str, Any]) -> Ranked:
        """The prompt, responses and scores of an example that compares answers."""
        if ("prompt" in row or "messages" in row) and "responses" in row and ("scores" in row or "ranking" in row):
            prompt, responses, scores = self._asked(row), row["responses"], _scores(row)
        elif "prompt" in row and "chosen" in row and "rejected" in row:
            prompt, responses, scores = row["prompt"], [row["chosen"], row["rejected"]], (1.0, 0.0)
        elif "chosen" in row and "rejected" in row:
            prompt, chosen, rejected = self._shared_prompt(row)
            responses, scores = [chosen, rejected], (1.0, 0.0)
        else:
            raise ValueError(_not_understood(row, "a comparison"))
        answers = tuple(self._answer(row, prompt, response) for response in responses)
        return Ranked(self._opening(row, prompt), answers, scores)

    def _asked(self, row: dict[str, Any]) -> Any:
        if "prompt" in row:
            return row["prompt"]
        messages = self._messages(row, row["messages"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages

    def _opening(self, row: dict[str, Any], prompt: Any) -> Piece:
        if isinstance(prompt, str):
            return Piece(prompt, special=True)
        return Piece(self._render(row, self._messages(row, prompt), asking=True))

    def _answer(self, row: dict[str, Any], prompt: Any, response: Any) -> Piece:
        if isinstance(prompt, str):
            if not isinstance(response, str):
                raise ValueError(
                    f"{origin(row)}: the prompt is text, so a response must be too; got {_shown(response)}"
                )
            return Piece(response, learned=True, close=True)
        before = self._messages(row, prompt)
        turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        opening = self._render(row, before, asking=True)
        whole = self._render(row, before + self._messages(row, turns))
        self._require_prefix(row, opening, whole)
        return self._turn(whole[len(opening) :], last=True)

    def _conversation(self, row: dict[str, Any], messages: list[Message]) -> tuple[Piece, ...]:
        """Context and assistant turns in alternation, told apart by rendering the conversation up to each of them."""
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return ()
        if turns[0] == 0:
            raise ValueError(
                f"{origin(row)}: the first message is the assistant's; there must be one before it to answer"
            )
        whole = self._render(row, messages[: turns[-1] + 1])
        pieces: list[Piece] = []
        done = 0
        for place in turns:
            opening = self._render(row, messages[:place], asking=True)
            through = self._render(row, messages[: place + 1])
            self._require_prefix(row, opening, through)
            self._require_prefix(row, through, whole)
            turn = self._turn(through[len(opening) :], last=place == turns[-1])
            pieces += [Piece(whole[done : len(opening)]), turn]
            done = len(opening) + len(turn.text)
        return tuple(pieces)

    def _turn(self, text: str, last: bool) -> Piece:
        """An assistant turn up to the token that ends it; the EOS token ends the last where the template has none."""
        bare = text.rstrip()
        if bare.endswith(self._ends):
            return Piece(bare, learned=True)
        return Piece(text, learned=True, close=last)

    def _render(self, row: dict[str, Any], messages: list[Message], asking: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{origin(row)}: the example holds messages, but the tokenizer has no chat template; use a tokenizer "
                "with one (tokenizer.chat_template) or write the example as prompt and response"
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))
        except TemplateError as error:
            raise ValueError(f"{origin(row)}: the tokenizer's chat template refuses the messages: {error}") from error

    def _require_prefix(self, row: dict[str, Any], start: str, whole: str) -> None:
        if not whole.startswith(start):
            same = next((place for place, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(whole))
            raise ValueError(
                f"{origin(row)}: the tokenizer's chat template writes earlier turns differently once a later one "
                f"follows ({start[same : same + 40]!r} became {whole[same : same + 40]!r}), so a model would be "
                "trained on text it never sees when it answers. Use a template that only appends, or one row for each "
                "assistant turn with {prompt: [messages], response}"
            )

    def _messages(self, row: dict[str, Any], messages: Any) -> list[Message]:
        good = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
        if not good or not all(_is_message(item) for item in messages):
            raise ValueError(
                f"{origin(row)}: expected a list of messages like {{'role': 'user', 'content': 'Hi'}}, "
                f"got {_shown(messages)}"
            )
        return list(messages)

    def _shared_prompt(self, row: dict[str, Any]) -> tuple[Text, Text, Text]:
        """Prompt, chosen and rejected answer of two conversations or transcripts that begin alike."""
        chosen, rejected = row["chosen"], row["rejected"]
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            chosen, rejected = self._messages(row, chosen), self._messages(row, rejected)
        same = 0
        for a, b in zip(chosen, rejected, strict=False):
            if a != b:
                break
            same += 1
        if isinstance(chosen, str) and isinstance(rejected, str):
            place = chosen[:same].rfind(ASSISTANT)
            if place < 0:
                raise ValueError(
                    f"{origin(row)}: 'chosen' and 'rejected' without 'prompt' must be transcripts that share their "
                    f"beginning up to {ASSISTANT!r}; these share {same} characters: {chosen[:same][:80]!r}"
                )
            cut = place + len(ASSISTANT)
        else:
            cut = min(same, len(chosen) - 1, len(rejected) - 1)
            if cut == 0:
                raise ValueError(
                    f"{origin(row)}: 'chosen' and 'rejected' share no first message, so there is no prompt"
                )
        return chosen[:cut], chosen[cut:], rejected[cut:]


def tokenize(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> list[list[int]]:
    """The token ids of each piece, with special tokens and EOS as it says. Many pieces in one call are much faster."""
    ids: list[list[int]] = [[] for _ in pieces]
    eos: Any = tokenizer.eos_token_id
    for special in (True, False):
        picked = [place for place, piece in enumerate(pieces) if piece.special == special]
        if not picked:
            continue
        texts = list({pieces[place].text: None for place in picked})  # each once: many examples share a prompt
        rows = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
        known = dict(zip(texts, rows, strict=True))
        for place in picked:
            ids[place] = list(known[pieces[place].text])
    for piece, row in zip(pieces, ids, strict=True):
        # Some tokenizers close every text they start with an EOS token of their own; a prompt must stay open.
        ended = bool(row) and row[-1] == eos
        if ended and piece.special and not piece.close and not piece.text.endswith(str(tokenizer.eos_token)):
            row.pop()
        elif piece.close and not ended:
            row.append(eos)
    return ids


def whole_text(row: dict[str, Any]) -> Piece:
    """The text of a pretraining example, `{text}`: all of it is learned, and EOS ends it."""
    if not isinstance(row.get("text"), str):
        raise ValueError(f"{origin(row)}: expected pretraining text as {{'text': ...}}, got {_found(row)}")
    return Piece(row["text"], special=True, learned=True, close=True)


def _is_message(item: Any) -> bool:
    """Whether it has a role and a content, both text: templates write anything else as Python does, `None` as well."""
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))


def _split_transcript(row: dict[str, Any], text: Any) -> tuple[str, str]:
    place = text.rfind(ASSISTANT) if isinstance(text, str) else -1
    if place < 0:
        raise ValueError(f"{origin(row)}: expected a transcript with an answer after {ASSISTANT!r}, got {_shown(text)}")
    cut = place + len(ASSISTANT)
    return text[:cut], text[cut:]


def _scores(row: dict[str, Any]) -> tuple[float, ...]:
    """One number a response, higher is better, from `scores` or from `ranking`."""
    key, sign = ("scores", 1.0) if "scores" in row else ("ranking", -1.0)
    responses, given = row["responses"], row[key]
    if not isinstance(responses, Sequence) or isinstance(responses, str) or len(responses) < 2:
        raise ValueError(f"{origin(row)}: 'responses' must be a list of at least 2 answers, got {_shown(responses)}")
    if not isinstance(given, Sequence) or len(given) != len(responses):
        raise ValueError(f"{origin(row)}: {len(responses)} responses need as many {key}, got {_shown(given)}")
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise ValueError(f"{origin(row)}: {key} must be finite numbers, got {_shown(given)}")
    return tuple(sign * value for value in given)


def _not_understood(row: dict[str, Any], what: str) -> str:
    return f"{origin(row)}: cannot read {what} from {_found(row)}. The formats are:{FORMATS}"


def _found(row: dict[str, Any]) -> str:
    return f"an example with the keys {sorted(row)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
