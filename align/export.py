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
from align.models import adapters, deferred, heads, trunk
from align.models.heads import Network
from align.models.load import plain_twin, write_model
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
    assert isinstance(model, Network)
    inner = heads.inner(model)
    plain = plain_twin(inner)
    count = sum(parameter.numel() for parameter in plain.parameters())
    with (
        warnings.catch_warnings(),
        folder_written_whole(out) as fresh,
        progress(f"{type(inner).__name__} of step {checkpoints.step_of(found)}", count, "weights") as advance,
    ):
        warnings.filterwarnings("ignore", ".*torch.distributed is disabled.*")
        weights = _Weights(inner, found, _name(module, inner))
        write_model(plain, module.tokenizer, weights.merged, fresh, advance=advance)
        if adapters.present(inner):
            adapters.write(inner, weights.value_of, fresh / trunk.FOLDER)
    print(f"{out}: written")


class _Weights:
    """What a model's weights are at a checkpoint: learned ones are in it, frozen ones in the folder they came from.

    Args:
        model: Without weights, where they can be read later.
        checkpoint: Its folder.
        prefix: Of the model's names in the checkpoint.

    Raises:
        ConfigError: The checkpoint lacks a weight that learns.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Path, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        self.entries, self.load = checkpoints.open_weights(checkpoint)
        learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if missing := sorted(name for name in learned if f"{prefix}.{name}" not in self.entries):
            raise ConfigError([f"{checkpoint}: is not of this model: {missing[0]} is not in it"])

    def value_of(self, name: str) -> Tensor:
        """A tensor by its name in the model."""
        place = f"{self.prefix}.{name}"
        return self.load([place])[place] if place in self.entries else deferred.value_of(self.model, name)

    def merged(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors of the plain model that this one amounts to, by their names in that."""
        own = adapters.plain_names(self.model)
        at_once = [own[name] for name in names if f"{self.prefix}.{own[name]}" in self.entries]
        loaded = self.load([f"{self.prefix}.{name}" for name in at_once])

        def value_of(name: str) -> Tensor:
            place = f"{self.prefix}.{name}"
            return loaded[place] if place in loaded else self.value_of(name)

        return {name: adapters.merged_tensor(self.model, own[name], value_of) for name in names}


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
