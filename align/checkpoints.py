"""Checkpoints that are whole, or are known not to be.

A checkpoint is a folder: the state, and a manifest with size and checksum of every file. It gets its name when all of
it is on the disk. Whatever damages it later is noticed before it is read. Knows files; what is in the state is
Lightning's and the modules' business.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from align import atomic, distributed
from align.errors import RunError

FOLDER = "checkpoints"
"""In a run's folder."""

STATE = "state.pt"
SHARDS = "shards"
"""Folder of the tensors that were sharded when they were saved, in the format of torch.distributed.checkpoint."""
SHARDED = "__sharded__"
"""Key of the note that stands for such a tensor in the state."""
MANIFEST = "manifest.json"
PATTERN = "step-*"
SHORT = "unexpected pos"
"""What torch says where a write took less than it was given, when the system's error has been lost on the way."""
FORMAT = 1
"""Of the manifest; another number is another layout."""


class CheckpointError(RunError):
    """A checkpoint cannot be written or read; the message says what to do."""


@dataclass(frozen=True)
class Damage:
    """A checkpoint that cannot be used, and why."""

    folder: Path
    reason: str


class VerifiedCheckpointIO(CheckpointIO):
    """Writes and reads Lightning's checkpoint as a folder with a manifest. Plain tensors and containers only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes the whole state, or nothing. With sharded tensors in it, all ranks must call it.

        Raises:
            CheckpointError: The disk is full, or the folder cannot be written to.
        """
        folder = Path(path)
        shards: dict[str, DTensor] = {}
        tree = _taken_out(checkpoint, shards)
        try:
            if shards:
                _save_sharded(tree, shards, folder)
                return
            with atomic.folder_written_whole(folder) as fresh:
                _write(tree, fresh)
        except (OSError, RuntimeError, CheckpointException) as error:  # torch reports a full disk as the latter two
            if shards and isinstance(error, RuntimeError) and _system_error(error) is None:
                raise  # of the process group: another rank has died
            raise CheckpointError(
                f"the checkpoint {folder} could not be written: {_cause(error)}. Earlier checkpoints are as they "
                "were: make room, or make the folder writable, and give the same command again"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a state that `newest_good` or `verify` has found whole. Never runs code that a file contains."""
        return read(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint, at once as far as anybody can see."""
        if Path(path).exists():
            atomic.remove(Path(path))


def read(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The state in a checkpoint, in CPU memory: who takes it over moves it, one tensor after another.

    Never runs code that a file contains.

    Args:
        folder: Of the checkpoint.
        mesh: Tensors that were sharded when saved are sharded over it; None: they come whole.
    """
    tree = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    shards: dict[str, Tensor] = {}
    tree = _put_back(tree, shards, mesh)
    if shards:
        state_dict_loader.load(shards, checkpoint_id=folder / SHARDS, no_dist=mesh is None)
    return tree


def open_weights(folder: Path) -> tuple[dict[str, Any], Callable[[list[str]], dict[str, Tensor]]]:
    """The module's weights in a checkpoint, to be read some at a time.

    Args:
        folder: Of the checkpoint.

    Returns:
        By name, tensors that take no memory before they are read, or notes of sharded ones; and a function that reads
        those of some names.
    """
    entries = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)["state_dict"]

    def load(names: list[str]) -> dict[str, Tensor]:
        shards: dict[str, Tensor] = {}
        found = {name: _put_back(entries[name], shards, None) for name in names}
        if shards:
            state_dict_loader.load(shards, checkpoint_id=folder / SHARDS, no_dist=True)
        return found

    return entries, load


def step_folder(folder: Path, step: int) -> Path:
    """The place of a step's checkpoint; names sort as steps do."""
    return folder / f"step-{step:09d}"


def found(folder: Path) -> list[Path]:
    """The checkpoints of a folder, damaged ones among them, the newest first."""
    return sorted((path for path in folder.glob(PATTERN) if path.is_dir()), reverse=True)


def newest_good(folder: Path) -> tuple[Path | None, list[Damage]]:
    """The newest checkpoint that is whole, and those passed over on the way."""
    damaged: list[Damage] = []
    for path in found(folder):
        reason = verify(path)
        if reason is None:
            return path, damaged
        damaged.append(Damage(path, reason))
    return None, damaged


def verify(folder: Path) -> str | None:
    """Compares a checkpoint with its manifest; returns what is wrong with it, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        layout = manifest["format"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__})"
    if layout != FORMAT:
        return f"its layout is number {layout}, this version of align reads number {FORMAT}"
    for name, (size, digest) in files.items():
        try:
            if (there := (folder / name).stat().st_size) != size:
                return f"{name} has {there:,} bytes, {size:,} were written"
            if _digest(folder / name) != digest:
                return f"{name} has other contents than were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None if STATE in files else f"{MANIFEST} does not name {STATE}"


def step_of(folder: Path) -> int:
    """Optimizer steps done when a checkpoint was saved."""
    return int(folder.name.rpartition("-")[2])


def described(damaged: Sequence[Damage]) -> list[str]:
    """One line for each checkpoint passed over."""
    return [f"{item.folder}: not used, {item.reason}" for item in damaged]


def _save_sharded(tree: Any, shards: dict[str, DTensor], folder: Path) -> None:
    """Every rank writes its parts into a folder that gets its name when the first rank knows that all are there."""
    unfinished = distributed.from_first(lambda: atomic.unfinished(folder))

    def complete() -> None:
        with atomic.folder_written_whole(folder) as fresh:
            (unfinished / SHARDS).rename(fresh / SHARDS)
            _write(tree, fresh)

    try:
        state_dict_saver.save(shards, checkpoint_id=unfinished / SHARDS)  # returns, or raises, on all ranks alike
        distributed.from_first(complete)
    finally:
        if distributed.is_first():
            shutil.rmtree(unfinished, ignore_errors=True)


def _write(tree: Any, folder: Path) -> None:
    with open(folder / STATE, "wb") as file:  # torch's own file handle would not say why it failed
        torch.save(tree, file)
    step = int(tree["global_step"])
    atomic.write_text(folder / MANIFEST, json.dumps(_manifest(folder, step), indent=1) + "\n")


def _taken_out(tree: Any, shards: dict[str, DTensor], path: str = "") -> Any:
    """The tree with a note in place of every sharded tensor, which goes into `shards` under its path."""
    if isinstance(tree, dict):
        return {key: _taken_out(value, shards, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [_taken_out(value, shards, f"{path}/{place}") for place, value in enumerate(tree)]
    if not isinstance(tree, DTensor):
        return tree
    shards[path] = tree
    return {SHARDED: path, "shape": list(tree.shape), "dtype": tree.dtype}


def _put_back(tree: Any, shards: dict[str, Tensor], mesh: DeviceMesh | None) -> Any:
    """The tree with an empty tensor in place of every note; `shards` gets it too."""
    if isinstance(tree, dict) and SHARDED in tree:
        shape, dtype = tree["shape"], tree["dtype"]
        if mesh is None:
            shards[tree[SHARDED]] = torch.empty(shape, dtype=dtype)
        else:
            shards[tree[SHARDED]] = distributed.sharded_zeros(shape, dtype, mesh=mesh, device="cpu")
        return shards[tree[SHARDED]]
    if isinstance(tree, dict):
        return {key: _put_back(value, shards, mesh) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_put_back(value, shards, mesh) for value in tree]
    return tree


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return {"format": FORMAT, "step": step, "torch": torch.__version__, "files": files}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cause(error: BaseException) -> str:
    """The operating system's word for it: torch only says that it failed to write, and the system's error is in it."""
    system = _system_error(error)
    if system is not None and system.strerror:
        return system.strerror
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if SHORT in str(error):
        return "only a part of a file was, so the disk is probably full"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error that led to another, perhaps on another rank."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if isinstance(error, CheckpointException):
            return next(
                (found for one, _ in error.failures.values() if (found := _system_error(one)) is not None), None
            )
        error = error.__context__
    return None
