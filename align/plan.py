"""`python -m align.plan CONFIG [key=value ...]`: how much memory a run of `align.fit` will need, without running it.

Reads the configuration, and of each model its config.json; `align.memory` counts.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig

from align import cli, launch, memory, precision
from align.build import build
from align.config import AUTO, FIT_KEYS, ConfigError, check, read
from align.memory import Plan, Setting, Share, shown
from align.models import deferred
from align.models.heads import inner
from align.models.trunk import TrunkModel
from align.modules.base import AlignModule

PROG = "python -m align.plan"

TOO_LARGE = 3
"""The exit code where a run does not fit."""

DESCRIPTION = """\
Prints how much memory each process of a run of align.fit will need. The run's models need not be there: of each only
the config.json of its folder or hub name is read. Neither must GPUs, data files or a tokenizer. Nothing is written."""

EPILOG = """\
GB are 10^9 bytes. A GPU sold as one of 80 GB has about 85, so some remain for CUDA itself and for fragmentation.

overrides: those of align.fit, as key=value or --key=value

examples:
  python -m align.plan configs/ppo.yaml
  python -m align.plan configs/recipes/llama-3.1-8b/sft.yaml --memory 80
  python -m align.plan configs/recipes/llama-3.1-8b/sft.yaml --memory 80 trainer.devices=4
Where an earlier stage has not run yet, name a model of the same shape instead:
  python -m align.plan configs/recipes/qwen2.5-0.5b/reward.yaml module.model.path=Qwen/Qwen2.5-0.5B

exit codes: 0 planned, and it fits where --memory is given; 3 it does not fit; 2 a mistake in the configuration
(nothing to debug); 1 anything else"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.parser(prog=PROG, description=DESCRIPTION, epilog=EPILOG)
    parser.usage = f"{PROG} CONFIG [--memory GB] [key=value ...]"
    parser.add_argument("--memory", metavar="GB", type=float, help="of one device; says whether the run fits")
    options, overrides = parser.parse_known_args(argv)
    return cli.guarded(lambda: plan(options.config, overrides, options.memory), f"{PROG} {options.config}")


def plan(path: str, overrides: Sequence[str], limit: float | None = None) -> int:
    """Reads, checks, plans and prints.

    Args:
        path: Of the YAML file.
        overrides: `key=value`.
        limit: GB of one device.

    Returns:
        The exit code.

    Raises:
        ConfigError: The configuration is wrong, or its plan cannot be known.
    """
    if limit is not None and not limit > 0.0:
        raise ConfigError([f"--memory: got {limit:g}, expected the GB of one device, such as 80"])
    module, setting = prepared(path, overrides)
    planned = memory.plan(module, setting)
    print("\n".join(explained(planned, module, setting)))
    if limit is None:
        return 0
    size = round(limit * 1e9)
    if planned.peak <= size:
        print(f"fits in {limit:g} GB ({shown(size)}), with {shown(size - planned.peak)} to spare")
        return 0
    print(
        f"does not fit in {limit:g} GB ({shown(size)}): {shown(planned.peak - size)} too much. What would change that:"
    )
    for change, peak in remedies(module, setting, planned):
        print(f"  {change}: at most {shown(peak)}{', fits' if peak <= size else ''}")
    return TOO_LARGE


def prepared(path: str, overrides: Sequence[str]) -> tuple[AlignModule, Setting]:
    """The module of a configuration, without weights, and how it will be computed.

    Args:
        path: Of the YAML file.
        overrides: `key=value`.

    Raises:
        ConfigError: The configuration is wrong, or a model's config.json is not there.
    """
    config = read(path, overrides)
    check(config, inputs_exist=False)
    with deferred.shapes():
        data, module = (build(config[key], key, FIT_KEYS[key]) for key in ("data", "module"))
    if not isinstance(module, AlignModule):
        raise ConfigError([f"module: {type(module).__name__} is no AlignModule, so what it computes is not known"])
    trainer = config.trainer
    accelerator = trainer.get("accelerator", "auto")
    arithmetic = trainer.get("precision") or "32-true"
    setting = memory.setting_of(
        module,
        data,
        ranks=_ranks(config),
        strategy=build(trainer.get("strategy"), "trainer.strategy"),
        precision=precision.fastest(accelerator) if arithmetic == AUTO else str(arithmetic),
        gpu=accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()),
    )
    return module, setting


def explained(planned: Plan, module: AlignModule, setting: Setting) -> list[str]:
    """The plan, and the arithmetic that leads to it, in lines of text."""
    dtype = "the weights' own" if setting.dtype is None else str(setting.dtype).removeprefix("torch.")
    several = f"{setting.ranks} processes" if setting.ranks > 1 else "1 process"
    sharing = "that share all weights" if setting.sharded else "with all weights each"
    on = "GPUs" if setting.gpu else "CPUs"
    lines = [f"{several} {sharing if setting.ranks > 1 else ''}".strip() + f" on {on}; arithmetic: {dtype}"]
    lines.append(f"at once: {setting.tokens:,} tokens of a micro-batch")
    if setting.decoding is not None:
        sequences, prompt, response = setting.decoding
        lines[-1] += f"; {sequences:,} responses of {response:,} tokens to prompts of {prompt:,}"
    lines += [_arithmetic(share, module, setting) for share in planned.shares]
    lines += planned.lines()
    gradients = sum(share.gradients for share in planned.shares)
    weights = sum(share.weights for share in planned.shares)
    lines.append(
        f"always: weights {shown(weights)} + optimizer {shown(planned.kept - weights - planned.states)}"
        + (f" + states of frozen blocks {shown(planned.states)}" if planned.states else "")
        + f" = {shown(planned.kept)}"
    )
    parts = {"gradients": gradients, "casts": planned.casts, "activations": planned.activations}
    parts |= {"passing": planned.passing, "gathered": planned.gathered}
    added = "".join(f" + {name} {shown(size)}" for name, size in parts.items() if size)
    lines.append(f"while it learns: {shown(planned.kept)}{added} = {shown(planned.update)}")
    if planned.rollout:
        parts = {"casts": planned.casts, "rollout": planned.rollout}
        added = "".join(f" + {name} {shown(size)}" for name, size in parts.items() if size)
        total = planned.kept + planned.casts + planned.rollout
        lines.append(f"while it answers: {shown(planned.kept)}{added} = {shown(total)}")
    return lines


def remedies(module: AlignModule, setting: Setting, planned: Plan) -> list[tuple[str, int]]:
    """What would make a plan smaller, and the most it would then need; the best first."""
    found = []
    if setting.tokens > 1024:
        found.append((f"module.micro_batch_tokens={setting.tokens // 2}", replace(setting, tokens=setting.tokens // 2)))
    if setting.optimizer in ("adamw", "lion"):
        name = f"{setting.optimizer}8bit"
        found.append((f"module.optim.name={name}", replace(setting, optimizer=name)))
    if setting.decoding is not None and setting.decoding[0] > 1:
        fewer = setting.decoding[0] // 2
        changed = replace(setting, decoding=(fewer, *setting.decoding[1:]))
        found.append((f"module.sampler.batch_size={fewer}", changed))
    if setting.ranks > 1 and not setting.sharded:
        changed = replace(setting, sharded=True)
        found.append(("'trainer.strategy={_target_: align.strategy.FSDP}'", changed))
    if setting.sharded:
        changed = replace(setting, ranks=2 * setting.ranks)
        found.append((f"{changed.ranks} devices instead of {setting.ranks}", changed))
    peaks = [(change, memory.plan(module, changed).peak) for change, changed in found]
    networks = {name: one for name, one in memory.networks(module).items() if name in module.networks()}
    models = {name: inner(one) for name, one in networks.items() if not isinstance(one, TrunkModel)}
    plain = [name for name, model in models.items() if not model.is_gradient_checkpointing]
    if plain:
        with _checkpointing(module, plain):
            words = " ".join(f"module.{name}.gradient_checkpointing=true" for name in plain)
            peaks.append((words, memory.plan(module, setting).peak))
    return sorted(((change, peak) for change, peak in peaks if peak < planned.peak), key=lambda item: item[1])


def _arithmetic(share: Share, module: AlignModule, setting: Setting) -> str:
    """What one parameter of a network costs."""
    name, count = share.name, share.parameters
    network = memory.networks(module)[name]
    learns = setting.optimizer if name in module.networks() else "frozen"
    if isinstance(network, TrunkModel):
        own = sum(parameter.numel() for parameter in network.parameters())
        what = "a head" if network.adapter is None else "an adapter and a head"
        return f"{name}: {what} on the policy's weights, {own:,} parameters ({learns})"
    each = {part: getattr(share, part) * (setting.ranks if setting.sharded else 1) / count
            for part in ("weights", "gradients", "optimizer")}  # fmt: skip
    bytes_of = [f"{size:.3g} {part}" for part, size in each.items() if size]
    divided = f", shared by {setting.ranks}" if setting.sharded else ""
    kind = type(inner(network)).__name__
    return f"{name}: {kind}, {count:,} parameters ({learns}); bytes for each: {' + '.join(bytes_of)}{divided}"


@contextlib.contextmanager
def _checkpointing(module: AlignModule, names: Sequence[str]) -> Iterator[None]:
    models = [inner(memory.networks(module)[name]) for name in names]
    for model in models:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        for model in models:
            model.gradient_checkpointing_disable()


def _ranks(config: DictConfig) -> int:
    devices, machines = config.trainer.get("devices", 1), config.trainer.get("num_nodes", 1)
    each = launch.devices_of(devices)
    if each < 1:
        raise ConfigError(
            [f"trainer.devices: got {devices}, which means no device on this machine; give the number of the run's"]
        )
    return each * machines


if __name__ == "__main__":
    sys.exit(main())
