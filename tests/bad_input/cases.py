"""Malformed configurations: edits of a sound one, its text mangled, and mangled overrides, as hypothesis strategies."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

Place = tuple[str | int, ...]


class Gone:
    """Stands for a key that is taken away."""

    def __repr__(self) -> str:
        return "GONE"


GONE = Gone()


@dataclass(frozen=True)
class Case:
    """A configuration that may be wrong, in the form hypothesis prints.

    Attributes:
        name: Of the sound configuration.
        edits: (place, value) in turn; `GONE` takes the key away.
        mangle: What happens to the YAML's text; a key of `MANGLES`.
        at: Where it happens, as a share of the text.
        overrides: On the command line.
    """

    name: str
    edits: tuple[tuple[Place, Any], ...] = ()
    mangle: str = "as it is"
    at: float = 0.5
    overrides: tuple[str, ...] = ()

    def text(self, sound: Mapping[str, Any]) -> bytes:
        """The YAML file."""
        config = edited(sound, self.edits)
        return MANGLES[self.mangle](yaml.dump(config, sort_keys=False).encode(), self.at)


def edited(value: Any, edits: tuple[tuple[Place, Any], ...]) -> Any:
    """A copy of nested mappings and lists with edits made; those whose place an earlier one took away are left out."""
    for place, new in edits:
        value = _with(value, place, new)
    return value


def _with(value: Any, place: Place, new: Any) -> Any:
    first, *rest = place
    if isinstance(value, list) and isinstance(first, int) and first < len(value):
        item = [_with(value[first], tuple(rest), new)] if rest else [] if new is GONE else [new]
        return value[:first] + item + value[first + 1 :]
    if not isinstance(value, dict):
        return value
    found = dict(value)
    if rest:
        if first in found:
            found[first] = _with(found[first], tuple(rest), new)
    elif new is GONE:
        found.pop(first, None)
    else:
        found[first] = new
    return found


def places(value: Any, before: Place = ()) -> Iterator[Place]:
    """Where something stands in nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from places(item, (*before, key))


NUMBERS = (0, -1, 1, -(2**31), 2**63, 10**30, float("nan"), float("inf"), float("-inf"), 1e308, -1e-9, 0.5, 1.5)
"""None of them makes a count that would keep a machine busy: too small, or beyond 64 bits."""

TEXTS = (
    "", " ", ".", "~nobody_of_this_name", "1", "true", "null", "nan", "?", "a\0b", "\ud800", "é" * 10,
    "x" * 5000, "new/" * 2000, "a/b", "\n", "%s %d {} {0}", "runs", "runs/sft", "runs/data/init", "c.yaml",
    "empty.jsonl",
    "empty.yaml", "absent.jsonl", "absent.jsonl.gz", "runs/data/init/config.json", "runs/data:train", "no/such/folder",
    "runs/new/out.jsonl", "runs/sft/config.yaml/below", "locked.jsonl", "locked",
)  # fmt: skip

REFERENCES = (
    "${nothing}", "${", "}", "${}", "${seed", "${seed}${seed}", "${.}", "${..}", "${.seed}", "${data}", "${module}",
    "${oc.env:NO_SUCH_VARIABLE}", "${oc.env:WANDB_MODE}", "${nothing:1}", "${oc.decode:'['}", "${oc.create:[1]}",
    "???", "${???}",
    "${seed.x}", "${tokenizer.path}", "a${tokenizer}b", "$" * 3, "${oc.select:x}", "${a b}", "\\${seed}",
)  # fmt: skip

TARGETS = (
    "", "x", ".", "a.", ".a", "a..b", "1.2", "align", "align.modules", "align.modules.sft", "no.such.Thing", "os",
    "os.path", "math.pi", "builtins.print", "builtins.len", "builtins.dict", "builtins.object", "builtins.int",
    "builtins.type", "builtins.ValueError", "builtins.NotImplemented", "raising.Thing", "leaving.Thing",
    "ungrammatical.Thing", "align.modules.sft.SFTModul", "align.modules.sft.SFTModule.training_step",
    "align.modules.base.AlignModule", "align.data.base.AlignData", "align.rollout.sampler.Sampler", "typing.Any",
    "collections.Counter", "torch.nn.Linear", "lightning.pytorch.Callback", "lightning.pytorch.LightningModule",
    "align.optim.Optim", "torch.Tensor", "datetime.datetime", "align.models.load.load_tokenizer", "é.è", "a b.c",
)  # fmt: skip

OTHERS = (None, True, False, [], {}, [[[]]], [None], {"a": {"b": [None]}}, {1: 2}, {None: 1}, {True: 1}, [1, "a", {}])

values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(REFERENCES),
    st.sampled_from(OTHERS),
    st.sampled_from(TARGETS).map(lambda target: {"_target_": target}),
    st.dates(),
    st.binary(max_size=4),
    st.text(max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)


@st.composite
def _edits(draw: st.DrawFn, sound: Mapping[str, Any]) -> tuple[Place, Any]:
    place = draw(st.sampled_from(list(places(sound))))
    kind = draw(st.sampled_from(("replace", "replace", "drop", "rename", "add")))
    if place[-1] == "_target_" and kind == "replace":
        return place, draw(st.sampled_from(TARGETS))
    if kind == "rename":
        return (*place[:-1], f"{place[-1]}x"), draw(values)
    if kind == "add":
        return (*place, draw(st.sampled_from(("_target_", "path", "", "a.b", "é", 3)))), draw(values)
    return place, GONE if kind == "drop" else draw(values)


def edits(name: str, sound: Mapping[str, Any]) -> st.SearchStrategy[Case]:
    """Some places of a configuration hold something else."""
    return st.lists(_edits(sound), min_size=1, max_size=3, unique_by=lambda edit: edit[0]).map(
        lambda found: Case(name, edits=tuple(found))
    )


def _inserted(what: bytes) -> Callable[[bytes, float], bytes]:
    return lambda text, at: text[: int(at * len(text))] + what + text[int(at * len(text)) :]


def _line(what: bytes) -> Callable[[bytes, float], bytes]:
    def changed(text: bytes, at: float) -> bytes:
        lines = text.splitlines(keepends=True)
        place = int(at * len(lines))
        return b"".join([*lines[:place], what, *lines[place:]])

    return changed


MANGLES: Mapping[str, Callable[[bytes, float], bytes]] = {
    "as it is": lambda text, at: text,
    "cut off": lambda text, at: text[: int(at * len(text))],
    "cut line": lambda text, at: b"".join(text.splitlines(keepends=True)[: int(at * text.count(b"\n"))]),
    "missing character": lambda text, at: text[: int(at * len(text))] + text[int(at * len(text)) + 1 :],
    "tab": _inserted(b"\t"),
    "invalid UTF-8": _inserted(b"\xff\xfe"),
    "null byte": _inserted(b"\0"),
    "bracket": _inserted(b"["),
    "brace": _inserted(b"}"),
    "quote": _inserted(b'"'),
    "colon": _inserted(b": "),
    "hash": _inserted(b" #"),
    "dollar": _inserted(b"${"),
    "line with a tab": _line(b"\tx: 1\n"),
    "same key again": _line(b"seed: 1\n"),
    "an anchor nobody set": _line(b"x: *nobody\n"),
    "an anchor of itself": _line(b"x: &a [*a]\n"),
    "many anchors": _line(b"x: &a [1, 2]\ny: [*a, *a]\n"),
    "merge": _line(b"<<: 3\n"),
    "second document": _line(b"---\nseed: 0\n"),
    "directive": _line(b"%YAML 9.9\n"),
    "a tag": _line(b"x: !!python/object/apply:os.getcwd []\n"),
    "an unknown tag": _line(b"x: !thing 3\n"),
    "complex key": _line(b"? [1, 2]\n: 3\n"),
    "set": _line(b"x: !!set {1, 2}\n"),
    "date": _line(b"x: 2020-99-99\n"),
    "UTF-16": lambda text, at: text.decode().encode("utf-16"),
    "UTF-8 with BOM": lambda text, at: b"\xef\xbb\xbf" + text,
    "Latin-1": lambda text, at: "# é\n".encode("latin-1") + text,
    "empty": lambda text, at: b"",
    "only a comment": lambda text, at: b"# nothing\n",
    "a list": lambda text, at: b"- 1\n- 2\n",
    "a number": lambda text, at: b"3\n",
    "a word": lambda text, at: b"word\n",
    "null": lambda text, at: b"null\n",
    "deep": lambda text, at: b"x: " + b"[" * 3000 + b"]" * 3000,
    "JSON": lambda text, at: b'{"seed": }',
    "carriage returns": lambda text, at: text.replace(b"\n", b"\r"),
    "binary": lambda text, at: bytes(range(256)) * 4,
}
"""What can happen to a file's text."""


def mangled(name: str) -> st.SearchStrategy[Case]:
    """The YAML's text is damaged."""
    where = st.floats(0, 1, allow_nan=False).map(lambda at: round(at, 3))
    return st.builds(Case, st.just(name), mangle=st.sampled_from(list(MANGLES)), at=where)


RAW = (
    "", "[", "{", "}", "[1,", "{a: ", "'", '"', "*a", "&a", "!!python/name:os.getcwd", "!x", "${", "${seed",
    "${nothing}", "---",
    "\t", "%", "@", "`", "?", "- a", "nan", ".nan", ".inf", "1e999", "9" * 5000, "x" * 20000, "\0", "\x1b[0m", "é",
    "🦊", "null", "~",
    "true", "0x", "{_target_: os}", "{_target_: builtins.len}", "[" * 2000, "2020-99-99", "2020-01-01", "a: b: c",
    "{? [1]: 2}",
    "\udcff", "1_0", "<<", "{<<: 3}", "=", "==",
)  # fmt: skip
"""The right side of an override."""

WHOLE = (
    "", "=", "key", "=value", "==", "a..b=1", ".=1", ".a=1", "a.=1", "--", "---", "--=", "--=1", "-x", "-x=1",
    "--help=1", "[0]=1",
    "a[0]=1", "data.train[0]=1", "data[0]=1", "data.train.x=1", "module.optim.betas[7]=1", "module.optim.betas[-1]=1",
    "module.optim.betas[x]=1", "module.optim.betas[0][0]=1", "trainer.[]=1", "seed[=1", "seed]=1", "é=1", "🦊.x=1",
    "a" * 5000 + "=1", "a." * 3000 + "=1", "tokenizer.x=1", "data.tokenizer.path=x", "_target_=x", "data._target_=os",
    "data._target_=3", "data=null", "data=[]", "data=3", "=${x}", "seed=${seed}", "run_dir=${run_dir}/x",
    "data=${data}",
    "module.tokenizer=${module}", "module={_target_: align.modules.sft.SFTModule}", "trainer=null", "callbacks=null",
    "callbacks=[]", "callbacks={x: 1}", "loggers=[]", "loggers={wandb: {prject: x}}", "loggers.wandb={mode: nonsense}",
    "loggers.x={_target_: builtins.dict}", "module.optim.betas=[0.9]", "module.optim.betas=[a, b]", "\0=1",
    "\udcff=1", " =1",
    "seed =1", " seed=1", "seed= 1", "Seed=1", "SEED=1", "seed:1", "seed 1", "trainer.max_steps=-7",
    "trainer.max_epochs=-3",
    "trainer.val_check_interval=1000", "trainer.limit_val_batches=-1", "trainer.strategy=nonsense",
    "trainer.accelerator=abacus",
    "trainer.profiler=nonsense", "trainer.plugins=nonsense", "trainer.max_time=nonsense", "trainer.max_time={days: x}",
    "trainer.precision=1", "trainer.accelerator=tpu", "trainer.accelerator=gpu", "trainer.overfit_batches=2.5",
    "trainer.benchmark=3",
    "trainer.deterministic=maybe", "trainer.min_epochs=x", "trainer.barebones=true", "trainer.sync_batchnorm=true",
    "trainer.reload_dataloaders_every_n_epochs=-1", "trainer.check_val_every_n_epoch=0", "trainer.log_every_n_steps=-1",
    "trainer.limit_train_batches=0", "trainer.limit_train_batches=0.001", "trainer.max_time=00:00:00:00",
    "trainer.num_sanity_val_steps=-2", "trainer.fast_dev_run=-1", "trainer.detect_anomaly=1",
)  # fmt: skip
"""Overrides as a whole."""


def overridden(name: str, sound: Mapping[str, Any]) -> st.SearchStrategy[Case]:
    """The command line is mangled: what stands at the left, at the right, or in the whole of an override."""
    keys = st.sampled_from([".".join(map(str, place)) for place in places(sound)])
    dashes = st.sampled_from(("", "--"))
    word = st.one_of(
        st.sampled_from(WHOLE),
        st.builds(lambda dash, key, raw: f"{dash}{key}={raw}", dashes, keys, st.sampled_from(RAW)),
        st.builds(lambda key, raw: f"{key}.x={raw}", keys, st.sampled_from(RAW)),
        st.builds(lambda key, text: f"{key}={text}", keys, st.text(max_size=5)),
        st.text(max_size=8),
    )
    return st.lists(word, min_size=1, max_size=2).map(lambda words: Case(name, overrides=tuple(words)))
