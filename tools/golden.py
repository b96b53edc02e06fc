"""`python -m tools.golden`: computes tests/golden/trl112_k1.safetensors again with TRL and prints what differs.

Runs TRL's own PPO trainer on the recorded weights. The recorded tokens and the recorded order of the rows take the
place of its sampling and shuffling, so that every other number must come out again up to rounding. Needs
`pip install trl==1.12.0 accelerate`, best in an environment of its own: TRL is no dependency of the project.
"""

import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"
NAME = "trl112_k1"
TOLERANCE = 1e-4
"""Of the largest entry of a tensor. Rounding alone stays below it; another formula or convention does not."""

ROLLOUT = (
    *("logprobs", "ref_logprobs", "values", "scores", "kl", "non_score_reward", "rewards", "advantages", "returns"),
    *("sequence_lengths", "sequence_lengths_p1", "padding_mask", "padding_mask_p1", "contain_eos_token"),
    "postprocessed_responses",
)
MICRO_BATCH = (
    *("new_logprobs", "vpred", "ratio", "pg_losses", "pg_losses2", "vf_losses1", "vf_losses2"),
    *("pg_loss", "vf_loss", "loss", "vf_clipfrac"),
)
"""The trainer's names of what it computes once a rollout and once a micro-batch."""


def load(cls: type[PreTrainedModel], name: str, run: dict[str, Any]) -> PreTrainedModel:
    """One of the four networks with its recorded weights from before the first update."""
    model = cls(LlamaConfig(**{**run["model"], "id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}))
    weights = load_file(FOLDER / f"{NAME}_weights.safetensors")
    model.load_state_dict({key[len(name) + 1 :]: weights[key] for key in weights if key.startswith(f"{name}.")})
    return model


def trainer_of(run: dict[str, Any], recorded: dict[str, Tensor], folder: str) -> Any:
    """TRL's trainer with the recorded networks, settings and queries."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]

    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "num_sample_generations": 0}
    plain = {"use_cpu": True, "bf16": False}
    return PPOTrainer(
        args=PPOConfig(output_dir=folder, **run["config"], **quiet, **plain),
        processing_class=SimpleNamespace(pad_token_id=run["pad"], eos_token_id=run["eos"]),
        model=load(LlamaForCausalLM, "policy", run),
        ref_model=load(LlamaForCausalLM, "ref", run),
        reward_model=load(LlamaForSequenceClassification, "reward", run),
        value_model=load(LlamaForSequenceClassification, "value", run),
        train_dataset=2 * list(recorded["queries"]),  # accelerate takes a step at once on the last batch of an epoch
        eval_dataset=list(recorded["queries"]),
        data_collator=lambda rows: {"input_ids": recorded["queries"]},
    )


def remade(run: dict[str, Any], recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the recording holds, computed again: read from the trainer's local variables whenever it calls backward."""
    from trl.experimental.ppo import ppo_trainer  # pyright: ignore[reportMissingImports]

    found: dict[str, Tensor] = {}
    temperature = run["config"]["temperature"] + 1e-7

    def generation(model: PreTrainedModel, queries: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        output = ppo_trainer.forward(model, recorded["query_responses"], run["pad"])
        return recorded["query_responses"], output.logits[:, queries.shape[1] - 1 : -1] / temperature

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(run, recorded, folder)
        networks = {"policy": trainer.policy_model, "value_model": trainer.value_model}
        backward, numbers = trainer.accelerator.backward, iter(range(4))

        def recording(loss: Tensor) -> None:
            number, frame = next(numbers), inspect.currentframe()
            assert frame is not None and frame.f_back is not None
            found.update(_read(frame.f_back.f_locals, number))
            backward(loss)
            found.update(_gradients(networks, number))

        orders = (torch.cat([recorded[f"micro{i}.inds"], recorded[f"micro{i + 1}.inds"]]).numpy() for i in (0, 2))
        with (
            mock.patch.object(ppo_trainer, "batch_generation", generation),
            mock.patch.object(np.random, "permutation", lambda size: next(orders)),
            mock.patch.object(trainer.accelerator, "backward", recording),
        ):
            trainer.train()
    for name, network in (("policy", trainer.policy_model), ("value", trainer.value_model)):
        found.update({f"{name}_after.{key}": weight.detach() for key, weight in network.named_parameters()})
    return found


def _read(variables: dict[str, Any], number: int) -> dict[str, Tensor]:
    """The rollout, and the numbers of the micro-batch that is about to go backward."""
    rollout = {name: variables[name].clone() for name in ROLLOUT}
    return rollout | {f"micro{number}.{name}": variables[name].detach().clone() for name in MICRO_BATCH}


def _gradients(networks: dict[str, PreTrainedModel], number: int) -> dict[str, Tensor]:
    """The gradients accumulated so far, of the first update; each half of an update is divided by two."""
    if number > 1:
        return {}
    return {
        f"micro{number}.grad.{name}.{key}": weight.grad.clone()
        for name, network in networks.items()
        for key, weight in network.named_parameters()
        if weight.grad is not None
    }


def differences(found: dict[str, Tensor], recorded: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Each tensor's name and its largest difference from the recording, relative to its largest entry."""
    for name, tensor in found.items():
        expected = recorded[name].double()
        yield name, ((tensor.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def main() -> int:
    """Prints the tensors that differ, or the largest difference. Returns the exit code."""
    torch.set_num_threads(1)
    run, recorded = json.loads((FOLDER / f"{NAME}.json").read_text()), load_file(FOLDER / f"{NAME}.safetensors")
    errors = dict(differences(remade(run, recorded), recorded))
    far = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    for name, error in far.items():
        print(f"differs: {name} by {error:.1e} of its largest entry")
    print(f"{len(errors) - len(far)} of {len(errors)} tensors agree; largest difference {max(errors.values()):.1e}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
