"""The rules of the package as tests: who may import whom, sizes, docstrings, and documents that name what exists.

Read from the source, not from memory: a rule that is broken names the file and what to do.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from align import config, schema
from align.modules.base import AlignModule

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    ("types", "seeds", "paths", "bootstrap", "errors", "atomic", "allocator", "formulas"),
    ("distributed",),
    ("interrupt", "checkpoints", "metrics_file", "nonfinite"),
    ("paged", "blockwise"),
    ("models", "data", "optim"),
    ("rollout",),
    ("modules",),
    ("callbacks", "strategy", "traced", "memory"),
    ("schema", "inputs", "overrides", "loggers", "config", "build", "cli", "precision", "launch"),
    ("measure", "tables", "resume", "fit", "sample", "evaluate", "export", "plan"),
)
"""Files and packages of align, the lowest first. Each may import what stands in its own layer and below."""

STRANGERS = (("models", "data"), ("data", "models"), ("models", "optim"), ("data", "optim"), ("formulas", "seeds"))
"""Neighbours that know nothing of each other."""

OBJECTIVES = ("sft", "reward", "ppo")
MOST_LINES = 400
MOST_FUNCTION_LINES = 60
ONE_ADDRESS = {
    "from_pretrained": {"align/models/load.py"},
    "save_pretrained": {"align/models/load.py"},
    "apply_chat_template": {"align/data/templates.py"},
    "Trainer": {"align/fit.py"},
    "AdamW": {"align/optim.py"},
    "generate": {"align/rollout/sampler.py"},
}
"""What only one file may call."""

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/details.md",
    "docs/metrics.md",
    "docs/extend.md",
    "docs/reliability.md",
    "docs/scale.md",
    "docs/performance.md",
)

NAMED = re.compile(r"(?<![\w/])((?:align|configs|tools|tests|docs|data)/[\w./-]*\w)(?::([\w.]*\w))?")
"""A path from the root of the repository, and what is named in it: align/optim.py:Optim.fraction."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[str]:
    """Every Python file below these folders, from the root of the repository."""
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


ALIGN, TOOLS = sources("align"), sources("tools")


@functools.cache
def tree(file: str) -> ast.Module:
    """A file, parsed."""
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def called(node: ast.Call) -> str:
    """The last name of what is called: `f` of `f(...)` and of `a.b.f(...)`."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def imported(file: str) -> set[str]:
    """The modules a file imports anywhere in it; `from align import seeds` gives `align.seeds`."""
    found: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: import by full name, not relatively"
            below = {f"{node.module}.{item.name}" for item in node.names}
            found |= {name if f"{name.replace('.', '/')}.py" in ALIGN else str(node.module) for name in below}
    return found


def gets_by_name(node: ast.Call) -> bool:
    """`config.get("name")`, which reads a key as `config.name` does."""
    return ast.unparse(node.func) == "config.get" and isinstance(node.args[0], ast.Constant)


def unit(name: str) -> str:
    """The file or package of align that a module or path belongs to: `data` for align.data.base, align/data/base.py."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if len(parts) > 1 else ""


def rank(name: str) -> int:
    """The layer of a file or package of align."""
    found = [number for number, layer in enumerate(LAYERS) if name in layer]
    assert found, f"align/{name} has no layer; give it one in LAYERS"
    return found[0]


def functions(file: str) -> Iterator[tuple[str, Function, bool]]:
    """(dotted name, node, public) of every function that is not inside another one."""

    def inside(body: list[ast.stmt], prefix: str, public: bool) -> Iterator[tuple[str, Function, bool]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from inside(node.body, f"{prefix}{node.name}.", public and not node.name.startswith("_"))
            elif isinstance(node, Function):
                yield f"{prefix}{node.name}", node, public and (dunder(node.name) or not node.name.startswith("_"))

    return inside(tree(file).body, "", True)


def dunder(name: str) -> bool:
    """`__call__` and its like."""
    return name.startswith("__") and name.endswith("__")


# Who knows whom.


@pytest.mark.parametrize("file", [file for file in ALIGN if unit(file) != "__init__"])
def test_a_file_imports_its_own_layer_and_those_below(file: str) -> None:
    own = unit(file)
    for name in imported(file):
        if name.split(".")[0] != "align":
            assert name.split(".")[0] not in ("tools", "tests"), f"{file} imports {name}: the package stands alone"
            continue
        other = unit(name)
        assert rank(other) <= rank(own), f"{file} imports align.{other}, which is in a layer above it"
        assert (own, other) not in STRANGERS, f"{file}: {own} shall not know {other}"


def test_objectives_share_code_through_base_and_not_with_each_other() -> None:
    for one in OBJECTIVES:
        others = {f"align.modules.{other}" for other in OBJECTIVES if other != one}
        assert not others & imported(f"align/modules/{one}.py")


def test_files_do_not_import_in_circles() -> None:
    known = {file.removesuffix(".py").replace("/", "."): file for file in ALIGN if not file.endswith("__init__.py")}
    below = {name: imported(file) & known.keys() for name, file in known.items()}
    while below:
        free = {name for name, needs in below.items() if not needs & below.keys()}
        assert free, f"these import each other in a circle: {', '.join(sorted(below))}"
        below = {name: needs for name, needs in below.items() if name not in free}


@pytest.mark.parametrize("name", ONE_ADDRESS)
def test_what_has_one_address_is_called_there_only(name: str) -> None:
    places = {
        file for file in ALIGN for node in ast.walk(tree(file)) if isinstance(node, ast.Call) and called(node) == name
    }
    assert places == ONE_ADDRESS[name]


# Shape.


@pytest.mark.parametrize("file", [*ALIGN, *TOOLS])
def test_files_and_functions_are_short(file: str) -> None:
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{file} has {lines} lines; look for the missing idea, not for a place to cut"
    for node in ast.walk(tree(file)):
        if isinstance(node, Function):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MOST_FUNCTION_LINES, f"{file}: {node.name} has {length} lines"


@pytest.mark.parametrize("file", [*ALIGN, *TOOLS])
def test_no_habit_that_hides_something(file: str) -> None:
    assert Path(file).stem not in ("utils", "helpers", "common", "misc"), f"{file}: name it after what is in it"
    for node in ast.walk(tree(file)):
        place = f"{file}:{getattr(node, 'lineno', '')}"
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__", f"{place}: jaxtyping cannot check annotations that are strings"
            assert all(item.name != "*" for item in node.names), f"{place}: import names, not *"
        if isinstance(node, ast.ExceptHandler):
            caught = {item.id for item in ast.walk(node.type) if isinstance(item, ast.Name)} if node.type else {""}
            assert not caught & {"", "Exception", "BaseException"}, f"{place}: catch what can be handled, by name"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", ALIGN)
def test_nothing_happens_on_import(file: str) -> None:
    for node in tree(file).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        # What `python -m align.COMMAND` does before it imports anything.
        main |= isinstance(node, ast.If) and file == "align/__init__.py" and "['-m']" in ast.unparse(node.test)
        names = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = isinstance(node, ast.Assign | ast.AnnAssign) and all(isinstance(name, ast.Name) for name in names)
        harmless = isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | Function)
        assert text or main or named or harmless, f"{file}:{node.lineno} runs on import"


@pytest.mark.parametrize("file", ALIGN)
def test_what_takes_a_second_and_few_need_is_imported_by_what_needs_it(file: str) -> None:
    for node in tree(file).body:
        names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & {"wandb", "peft", "bitsandbytes", "matplotlib"}, file


# Words.


@pytest.mark.parametrize("file", [*ALIGN, *TOOLS])
def test_public_names_are_explained_and_typed(file: str) -> None:
    if tree(file).body:
        assert ast.get_docstring(tree(file)), f"{file} does not say what is in it"
    for node in tree(file).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file}: class {node.name} has no docstring"
    for name, node, public in functions(file):
        if not public:
            continue
        setter = any(ast.unparse(item).endswith(".setter") for item in node.decorator_list)
        assert dunder(node.name) or setter or ast.get_docstring(node), f"{file}: {name} has no docstring"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        untyped = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        assert not untyped, f"{file}: {name} does not say what {', '.join(untyped)} must be"
        assert node.returns is not None, f"{file}: {name} does not say what it returns"


def test_every_constructor_argument_is_read() -> None:
    """No knob without effect: arguments of constructors, and fields of the records that a YAML describes."""
    nodes = [node for file in ALIGN for node in ast.walk(tree(file))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {ast.literal_eval(node.args[0]) for node in nodes if isinstance(node, ast.Call) and gets_by_name(node)}
    for file in ALIGN:
        for node in (item for item in tree(file).body if isinstance(item, ast.ClassDef)):
            if any("kw_only=True" in ast.unparse(item) for item in node.decorator_list):
                fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]  # type: ignore
                assert not set(fields) - read, f"{file}: nothing reads {set(fields) - read} of {node.name}"
        for name, node, _ in functions(file):
            if name.endswith(".__init__"):
                used = {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
                given = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"self"}
                assert not given - used, f"{file}: {name} does not read {given - used}"


# Lightning.


class Manual(L.LightningModule):
    """The least that trains under manual optimisation; records how often the weight had moved when a batch was made."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: object, batch_idx: int) -> None:
        """One step of gradient descent."""
        self.weight.grad = torch.ones(())
        self.optimizers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Moves by one a step."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Batches:
    """Three batches; says how far the weight was when each was asked for."""

    def __init__(self, module: Manual) -> None:
        self.module, self.seen = module, []

    def __iter__(self) -> Iterator[int]:
        for number in range(3):
            self.seen.append(-int(self.module.weight))
            yield number


class Sized(Batches):
    """The same with a length."""

    def __len__(self) -> int:
        return 3


def quiet(folder: Path, **arguments: object) -> Trainer:
    """A Trainer that only trains."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {"enable_checkpointing": False, "default_root_dir": folder}
    return Trainer(accelerator="cpu", max_epochs=1, **silent, **checkpoints, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "moved"), [(Sized, [0, 1, 2]), (Batches, [0, 0, 1])])
def test_only_a_loader_with_a_length_makes_rollouts_of_the_newest_policy(
    kind: type[Batches], moved: list[int], tmp_path: Path
) -> None:
    module = Manual()
    batches = kind(module)
    quiet(tmp_path).fit(module, train_dataloaders=batches)
    assert batches.seen == moved


@pytest.mark.parametrize("flag", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_lightnings_own_clipping_and_accumulation_are_no_use_here(flag: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        quiet(tmp_path, **flag).fit(Manual(), train_dataloaders=DataLoader([0, 1]))  # type: ignore[arg-type]
    assert flag.keys() <= config.TRAINER_REMEDIES.keys()


def test_the_trainer_knows_every_argument_that_has_a_remedy() -> None:
    known = schema.parameters(Trainer)[0].keys()
    assert config.TRAINER_REMEDIES.keys() <= known


def test_modules_own_no_attribute_that_lightning_uses_otherwise() -> None:
    """ModelCheckpoint takes `saved_models` and `layer` of a manually optimised module for something else."""
    for file in (file for file in ALIGN if unit(file) == "modules"):
        owned = {
            node.attr
            for node in ast.walk(tree(file))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
        }
        assert not owned & {"saved_models", "layer", *vars(L.LightningModule)} - {
            "automatic_optimization", "strict_loading", *vars(AlignModule)
        }, file  # fmt: skip


# Documents.


def readme_tree() -> dict[str, str]:
    """Path -> description of every line of the README's file tree."""
    block = re.search(r"## Files\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README.md has no file tree: a fenced block under '## Files'"
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        name, _, words = line.strip().partition(" ")
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        found["".join(folders) + name] = words.strip()
        if name.endswith("/"):
            folders.append(name)
    return found


def test_the_readmes_tree_is_true() -> None:
    listed = readme_tree()
    present = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    present |= {file for file in (*ALIGN, *TOOLS) if not file.endswith("__init__.py")}
    missing = present - listed.keys()
    assert not missing, f"README.md does not list {', '.join(sorted(missing))}"
    gone = [path for path in listed if not (ROOT / path).exists()]
    assert not gone, f"README.md lists what is not there: {', '.join(gone)}"
    assert all(listed.values()), f"no words: {[path for path, words in listed.items() if not words]}"


def definitions(file: str) -> set[str]:
    """Dotted names of a file's functions, classes and methods, and of its constants."""
    names = {name for name, _, _ in functions(file)}
    for node in tree(file).body:
        if isinstance(node, ast.ClassDef):
            names |= {node.name} | {
                f"{node.name}.{item.target.id}"  # type: ignore[union-attr]
                for item in node.body
                if isinstance(item, ast.AnnAssign)
            }
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {ast.unparse(item) for item in (node.targets if isinstance(node, ast.Assign) else [node.target])}
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_what_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for file, name in NAMED.findall(text):
        if file == "docs/overview.png":  # made by tools.e2e.report
            continue
        assert (ROOT / file).exists(), f"{document}: {file} does not exist"
        if name:
            assert name in definitions(file), f"{document}: {file} has no {name}"


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 60
