"""`python -m align.export CHECKPOINT OUT`: the model in a checkpoint as a Hugging Face folder, however it was sharded.

Reads and writes some tensors at a time, on one CPU, so a model of any size needs little memory.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import PreTrainedModel

from align import checkpoints, cli
from align.atomic import folder_written_whole
from align.build import build
from align.config import FIT_KEYS, ConfigError
from align.models import deferred
from align.models.heads import ScalarModel
from align.models.load import write_model
from align.modules.base import AlignModule
from align.sample import progress

PROG = "python -m align.export"

DESCRIPTION = """\
Writes the model in a checkpoint of align.fit as a Hugging Face folder, as the run itself does when it ends. The
checkpoint may have been saved by any number of processes; one CPU and little memory are enough.

The run's config.yaml must be where it was, and the models and files it names as well."""

EPILOG = """\
examples:
  python -m align.export runs/ppo exported
  python -m align.export runs/ppo/checkpoints/step-000000400 exported

A reward model's bias is found when training ends: what is exported before has none, so its rewards are not centred.

exit codes: 0 exported, 2 a mistake (nothing to debug), 1 anything else"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="its folder; of a run, the newest is taken")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write, which must not be there yet")
    options = parser.parse_args(argv)
    return cli.guarded(lambda: export(options.checkpoint, options.out), f"{PROG} {options.checkpoint}")


def export(checkpoint: Path, out: Path) -> None:
    """Finds, checks, reads and writes.

    Args:
        checkpoint: Its folder, or that of a run.
        out: The folder to write.

    Raises:
        ConfigError: There is no whole checkpoint, its configuration is gone, or `out` is there already.
    """
    if out.exists():
        raise ConfigError([f"{out}: is there already; choose another name, or move it away"])
    found = _checkpoint(checkpoint)
    file = found.parent.parent / "config.yaml"
    if not file.is_file():
        raise ConfigError([f"{found}: {file} is missing, which says what model this is"])
    config = OmegaConf.load(file)
    with deferred.weights():
        module = build(config.module, "module", FIT_KEYS["module"])
    if not isinstance(module, AlignModule):
        raise ConfigError([f"{file}: {type(module).__name__} is no AlignModule, so what to export is not known"])
    model = module.exported()
    inner = model.hf if isinstance(model, ScalarModel) else model
    assert isinstance(inner, PreTrainedModel)
    prefix = _name(module, inner)
    entries, load = checkpoints.open_weights(found)
    if missing := [name for name in inner.state_dict() if f"{prefix}.{name}" not in entries]:
        raise ConfigError([f"{found}: is not of this model: {missing[0]} is not in it"])

    def tensors(names: list[str]) -> dict[str, Tensor]:
        values = load([f"{prefix}.{name}" for name in names])
        return {name: values[f"{prefix}.{name}"] for name in names}

    count = sum(parameter.numel() for parameter in inner.parameters())
    with (
        warnings.catch_warnings(),
        folder_written_whole(out) as fresh,
        progress(f"{type(inner).__name__} of step {checkpoints.step_of(found)}", count, "weights") as advance,
    ):
        warnings.filterwarnings("ignore", ".*torch.distributed is disabled.*")
        write_model(inner, module.tokenizer, tensors, fresh, advance=advance)
    print(f"{out}: written")


def _checkpoint(path: Path) -> Path:
    """The checkpoint itself, known to be whole."""
    if (path / checkpoints.FOLDER).is_dir():
        newest, damaged = checkpoints.newest_good(path / checkpoints.FOLDER)
        for line in checkpoints.described(damaged):
            print(line, file=sys.stderr)
        if newest is not None:
            return newest
        raise ConfigError([f"{path}: has no whole checkpoint"])
    if not path.is_dir():
        raise ConfigError([f"{path}: no such folder (looked from {Path.cwd()})"])
    if (reason := checkpoints.verify(path)) is not None:
        raise ConfigError([f"{path}: is no whole checkpoint: {reason}"])
    return path


def _name(module: nn.Module, inner: nn.Module) -> str:
    return next(name for name, child in module.named_modules() if child is inner)


if __name__ == "__main__":
    sys.exit(main())
