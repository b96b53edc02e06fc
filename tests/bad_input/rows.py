"""Malformed data files: damaged rows of every format, and bytes that are no JSON lines, as hypothesis strategies."""

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

ASKED = "\n\nHuman: w5\n\nAssistant:"
MESSAGES = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]

FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "response": ("demonstrations", {"prompt": "w5 w6", "response": "w7"}),
    "messages": ("demonstrations", {"messages": MESSAGES}),
    "transcript": ("demonstrations", {"transcript": f"{ASKED} w6"}),
    "scores": ("comparisons", {"prompt": "w5", "responses": ["w6", "w7", "w8"], "scores": [1.0, 0.0, 0.5]}),
    "ranking": ("comparisons", {"prompt": "w5", "responses": ["w6", "w7"], "ranking": [1, 2], "labeler": "a"}),
    "chosen": ("comparisons", {"prompt": "w5", "chosen": "w6", "rejected": "w7"}),
    "HH": ("comparisons", {"chosen": f"{ASKED} w6", "rejected": f"{ASKED} w7"}),
    "conversations": (
        "comparisons",
        {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "w7"}]},
    ),
    "messages with answers": ("comparisons", {"messages": MESSAGES, "responses": ["w6", "w7"], "scores": [1, 0]}),
    "text": ("texts", {"text": "w5 w6 w7"}),
    "prompt": ("prompts", {"prompt": "w5 w6"}),
    "prompt of messages": ("prompts", {"prompt": MESSAGES[:1]}),
}
"""Format -> the kind of data that reads it, and a sound row."""

ODD = (
    None, True, False, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", " ", "\n", "\0", "\ud800", "w5\ud800",
    "é" * 3, "w5 " * 500,
    "\n\nAssistant:", ASKED, "</s>", "<s>", [], {}, [[]], [None], [""], ["w5"], ["w5", None], ["w5", 3], [{}],
    [MESSAGES], MESSAGES,
    MESSAGES[1:], MESSAGES[:1], [{"role": "user"}], [{"role": None, "content": None}], [{"role": "user", "content": 3}],
    [{"role": "user", "content": None}], [{"role": [], "content": "w5"}], [{"role": "robot", "content": "w5"}],
    [{"role": "user", "content": [{"type": "text", "text": "w5"}]}], [{"role": "user", "content": "a", "x": {}}, None],
    [1], [1, 2], [1, 2, 3], [1, 1], [1, 1, 1], [True, False], [None, 1], ["1", "2"], [float("nan"), 1], [float("inf"),
    1], [10**400, 1],
    [1e308, -1e308], {"a": 1}, "12", "ab", {"0": "w5", "1": "w6"},
)  # fmt: skip
"""Values for a field that are wrong in some format, or at the edge of what is right."""

json_values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(ODD),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=5,
    ),
)


@dataclass(frozen=True)
class File:
    """A data file that may be wrong, in the form hypothesis prints.

    Attributes:
        format: Of its sound rows; a key of `FORMATS`.
        lines: What stands in it, as JSON values; a string that begins with "raw:" stands in it as it is.
        wrapping: What happens to the bytes; a key of `WRAPPINGS`.
    """

    format: str
    lines: tuple[Any, ...]
    wrapping: str = "as it is"

    @property
    def name(self) -> str:
        """Under which the configuration knows it."""
        return "bad.jsonl.gz" if "gzip" in self.wrapping else "bad.jsonl"

    def content(self) -> bytes:
        """What is in it."""
        lines = [
            line[4:] if isinstance(line, str) and line.startswith("raw:") else json.dumps(line) for line in self.lines
        ]
        return WRAPPINGS[self.wrapping]("".join(f"{line}\n" for line in lines).encode(errors="surrogatepass"))


WRAPPINGS: Mapping[str, Callable[[bytes], bytes]] = {
    "as it is": lambda data: data,
    "gzip": gzip.compress,
    "gzip, cut off": lambda data: gzip.compress(data)[:-9],
    "gzip, cut off early": lambda data: gzip.compress(data)[:12],
    "gzip, one bit wrong": lambda data: gzip.compress(data)[:-6] + b"\0" + gzip.compress(data)[-5:],
    "gzip in name only": lambda data: data,
    "gzip, empty": lambda data: b"",
    "gzip with something behind": lambda data: gzip.compress(data) + b"more",
    "twice gzip": lambda data: gzip.compress(gzip.compress(data)),
    "zipped under a plain name": gzip.compress,
    "BOM": lambda data: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data: data.decode(errors="replace").encode("utf-16"),
    "Latin-1": lambda data: b'{"prompt": "\xe9"}\n' + data,
    "null bytes": lambda data: b"\0" * 20 + data,
    "cut off": lambda data: data[: max(0, len(data) - 5)],
    "no line ends": lambda data: data.replace(b"\n", b""),
    "carriage returns": lambda data: data.replace(b"\n", b"\r\n"),
    "old Mac line ends": lambda data: data.replace(b"\n", b"\r"),
    "one JSON array": lambda data: b"[" + data.replace(b"\n", b",\n") + b"{}]",
    "indented JSON": lambda data: data.replace(b"{", b"{\n  "),
    "empty": lambda data: b"",
    "blank lines": lambda data: b"\n \n\t\n" + data.replace(b"\n", b"\n\n"),
    "only blank lines": lambda data: b"\n \n\t\n",
    "random bytes": lambda data: bytes(range(256)) + data,
    "one giant line": lambda data: b'{"prompt": "' + b"w5 " * 100_000 + b'", "response": "w6", "text": "w5"}\n',
    "deep": lambda data: b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "many digits": lambda data: b'{"prompt": ' + b"9" * 5000 + b"}\n",
    "single quotes": lambda data: data.replace(b'"', b"'"),
    "a comma at the end": lambda data: data.replace(b"}\n", b",}\n"),
}
"""What can happen to the bytes of a file."""

RAW = ("raw:", "raw:{", "raw:}", "raw:{}", "raw:[]", "raw:null", "raw:3", 'raw:"w5"', "raw:nan", "raw:{'a': 1}",
'raw:{"prompt": "w5"',
       'raw:{"prompt": "w5", "prompt": 3}', "raw:# a comment", "raw:{}{}", "raw:\x00", "raw:\ufeff{}", "raw:\ud800",
       'raw:{"a": 01}',
       'raw:{"prompt": "\\ud800"}', 'raw:{"prompt": "a\nb"}', "raw:[1, 2", 'raw:{"": 1}')  # fmt: skip
"""Lines of a file that are no sound row."""


@st.composite
def _damaged(draw: st.DrawFn, name: str) -> Any:
    row: dict[str, Any] = dict(FORMATS[name][1])
    key = draw(st.sampled_from(list(row)))
    kind = draw(st.sampled_from(("replace", "replace", "replace", "inside", "drop", "rename", "add", "another")))
    if kind == "replace":
        row[key] = draw(json_values)
    elif kind == "inside" and isinstance(row[key], list):
        row[key] = list(row[key])
        row[key][draw(st.integers(0, len(row[key]) - 1))] = draw(json_values)
    elif kind == "drop":
        del row[key]
    elif kind == "rename":
        row[draw(st.sampled_from(("Prompt", "", "prompt ", "response", "text", "messages")))] = row.pop(key)
    elif kind == "add":
        row[
            draw(
                st.sampled_from(("prompt", "response", "responses", "scores", "chosen", "messages", "labeler", "text"))
            )
        ] = draw(json_values)
    else:
        row = dict(FORMATS[draw(st.sampled_from(list(FORMATS)))][1])
    return row


def files(name: str) -> st.SearchStrategy[File]:
    """Files of a format, of which some rows are damaged, or the whole is."""
    sound = st.just(dict(FORMATS[name][1]))
    line = st.one_of(_damaged(name), _damaged(name), _damaged(name), st.sampled_from(RAW), sound)
    lines = st.lists(line, max_size=3).map(tuple)
    damaged = st.builds(File, st.just(name), lines)
    wrapped = st.builds(File, st.just(name), st.just((dict(FORMATS[name][1]),) * 2), st.sampled_from(list(WRAPPINGS)))
    return st.one_of(damaged, damaged, damaged, wrapped)
