"""What becomes of a run folder that holds something: continue, begin, say that it is finished, or refuse.

Knows run folders and configurations. What is in a checkpoint, and reading it, is not known here.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from align import atomic, checkpoints, cli, schema
from align.config import ConfigError, plain
from align.schema import TARGET, join

FINISHED = "finished.json"

HARMLESS = ("run_dir", "overwrite", "resume", "loggers")
"""Keys that change nothing that is computed."""

PROCESSES = ("devices", "num_nodes", "strategy")
"""Arguments of the Trainer that change what is computed by rounding only."""

HARMLESS_TRAINER = (
    *PROCESSES, "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler",
    "detect_anomaly", "max_time", "enable_checkpointing", "num_sanity_val_steps",
)  # fmt: skip
"""Arguments of the Trainer with which a run may go on that began with others."""

HARMLESS_CALLBACKS = ("align.callbacks.checkpoint.", "align.callbacks.tables.", "lightning.pytorch.callbacks.")
"""How the targets of callbacks begin that only watch."""


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    continues: bool = False
    """The folder holds a part of this run already."""
    checkpoint: Path | None = None
    """To continue from; None begins at step 0."""
    step: int = 0
    """Optimizer steps done."""
    notes: tuple[str, ...] = ()
    """What the user should be told."""
    finished: bool = False
    """There is nothing left to do."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """The run folder is this process's alone. The lock, a file beside the folder, goes with the process.

    Raises:
        ConfigError: Another process has it, or there can be none.
    """
    real = run_dir.resolve()
    made = [folder for folder in real.parents if not folder.exists()]
    lock = real.with_name(f".{real.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115  (closed by the block below)
    except OSError as error:
        raise ConfigError([f"run_dir: {str(run_dir)[:80]} cannot be made: {error.strerror}"]) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(lock)  # gone where the run that had it has just ended
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError([f"run_dir: {run_dir} is in use by {holder}; wait, or end that run"]) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def decide(config: DictConfig) -> Start:
    """Looks at the run folder of a checked configuration, and removes from it what a killed process left unfinished.

    Raises:
        ConfigError: The folder holds a run of another configuration, or one of which no checkpoint is whole.
    """
    folder = Path(config.run_dir)
    cli.put_back_earlier(folder)
    if config.get("overwrite") or config.get("resume") == "never" or not _holds_a_run(folder):
        return Start()
    began, now = plain(OmegaConf.load(folder / "config.yaml")), plain(config)
    changed = differences(began, now)
    if changed and config.get("resume") != "force":
        raise ConfigError(
            [
                f"run_dir: {folder} holds a run of another configuration; resume=force continues it all the same, "
                "overwrite=true deletes it, run_dir=... writes elsewhere",
                *changed,
            ]
        )
    if (folder / FINISHED).exists():
        step = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["step"]
        return Start(continues=True, step=step, finished=True)
    checkpoint, damaged = checkpoints.newest_good(folder / checkpoints.FOLDER)
    notes = [*(f"changed: {line}" for line in changed), *_other_processes(began, now), *checkpoints.described(damaged)]
    if checkpoint is None and damaged:
        raise ConfigError([f"run_dir: {folder} has no whole checkpoint; overwrite=true begins anew", *notes])
    _tidy(folder, checkpoint, damaged)
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    notes.append(
        f"continues from step {step}" if checkpoint else "was stopped before its first checkpoint, begins again"
    )
    return Start(continues=True, checkpoint=checkpoint, step=step, notes=tuple(notes))


def finish(folder: Path, step: int) -> None:
    """Marks the run as done."""
    atomic.write_text(folder / FINISHED, json.dumps({"step": step}) + "\n")


def differences(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations and may change what is computed, with both values."""
    old, now = _leaves(_without_harmless(saved)), _leaves(_without_harmless(new))
    paths = _path_keys(saved, "") & _path_keys(new, "")
    return [
        f"{key}: {_shown(old, key)} when the run began, {_shown(now, key)} now"
        for key in sorted({*old, *now})
        if old.get(key, _NOTHING) != now.get(key, _NOTHING) and key not in paths
    ]


def _other_processes(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs in how many processes share the work, and what that means."""
    old, now = ({key: (config.get("trainer") or {}).get(key) for key in PROCESSES} for config in (saved, new))
    return [
        f"trainer.{key}: {schema.described(old[key])} when the run began, {schema.described(now[key])} now; this "
        "changes results by rounding"
        for key in PROCESSES
        if old[key] != now[key]
    ]


_NOTHING = object()


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return schema.described(leaves[key]) if key in leaves else "not there"


def _holds_a_run(folder: Path) -> bool:
    """Whether align wrote what is in the folder, and there is more than a configuration."""
    return cli.is_run(folder) and any(item.name != "config.yaml" for item in folder.iterdir())


def _tidy(folder: Path, checkpoint: Path | None, damaged: list[checkpoints.Damage]) -> None:
    """Removes what a killed process left, and damaged checkpoints: their steps will be saved again."""
    atomic.sweep(folder, "hf", "hf-ema", "metrics.csv", "config.yaml", FINISHED)
    atomic.sweep(folder / checkpoints.FOLDER, "step-*")
    for item in damaged:
        atomic.remove(item.folder)
    if checkpoint is None:  # no state is left to say how much of them to keep
        for file in (*folder.glob("*.jsonl"), folder / "metrics.csv"):
            file.unlink(missing_ok=True)


def _without_harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in HARMLESS}
    kept["trainer"] = {k: v for k, v in (config.get("trainer") or {}).items() if k not in HARMLESS_TRAINER}
    kept["callbacks"] = {
        key: value
        for key, value in (config.get("callbacks") or {}).items()
        if value is not None and not str(value.get(TARGET, "")).startswith(HARMLESS_CALLBACKS)
    }
    return kept


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value; an empty mapping or list counts as one."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, item in items for key, leaf in _leaves(item, join(path, name)).items()}
    return {path: value}


def _path_keys(node: Any, path: str) -> set[str]:
    """The keys whose values name files or models: where they lie does not matter, what is in them is checked."""
    if isinstance(node, list):
        return {key for place, item in enumerate(node) for key in _path_keys(item, join(path, place))}
    if not isinstance(node, dict):
        return set()
    found = {key for name, item in node.items() for key in _path_keys(item, join(path, name))}
    if TARGET in node:
        try:
            parameters, _ = schema.parameters(schema.find_target(node[TARGET]))
        except schema.Mismatch:
            return found
        marked = {name for name, parameter in parameters.items() if schema.metadata(parameter.annotation)}
        found |= {join(path, name) for name in marked if isinstance(node.get(name), str)}
    return found
