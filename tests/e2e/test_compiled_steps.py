"""Compiled blocks in whole steps: how often they are compiled, the real compiler, two processes, and a stopped run."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from compiling import afresh, graphs, model, text
from transformers import PreTrainedModel

from align import checkpoints, fit, interrupt, launch
from align.callbacks.tables import SampleTable
from align.data.experience import ExperienceData
from align.models import compiled, packed, trials
from align.models.attention import use_attend
from align.modules.ppo import PPO, PPOModule
from align.modules.reward import RewardModule
from align.modules.sft import SFTModule
from align.optim import Optim
from align.rollout.sampler import DecodeSampler
from align.types import Comparisons, Completions, Prompts
from tools import crash_runs

ROWS = [{"prompt": f"w{3 + i} w{4 + i}"} for i in range(8)]
SHAPES = (([3, 9, 1, 5], [4, 1, 7, 5]), ([2, 2, 3], [2, 3, 3]), ([11, 17], [9, 30]), ([5, 6, 7, 8, 9], [1, 2, 3, 4, 5]))
"""Lengths of prompts and responses."""


def sft(kind: str) -> SFTModule:
    return SFTModule(model=model(kind), tokenizer=tiny.tokenizer(), optim=Optim(lr=1e-3), micro_batch_tokens=10_000)


def reward(share: bool) -> RewardModule:
    scalar = tiny.scalar_model(initializer_range=0.1)
    use_attend(scalar.hf)
    return RewardModule(model=scalar, tokenizer=tiny.tokenizer(), optim=Optim(lr=1e-3), share_prompts=share)


def comparisons(prompt_index: list[int], prompt: int) -> Comparisons:
    count = len(prompt_index)
    episodes = tiny.completions([prompt] * count, [1 + (2 * row + prompt) % 7 for row in range(count)])
    return Comparisons(
        ids=episodes.ids, lengths=episodes.lengths, response_lengths=episodes.response_lengths,
        prompt_index=torch.tensor(prompt_index), scores=torch.arange(float(count)), labelers=("",) * count,
    )  # fmt: skip


class Watched(DecodeSampler):
    """Tells how many graphs its calls have compiled."""

    def __call__(self, policy: PreTrainedModel, prompts: Prompts) -> Completions:
        before = graphs()
        answers = super().__call__(policy, prompts)
        WRITING.append(graphs() - before)
        return answers


WRITING: list[int] = []


def ppo(folder: Path, compile: bool) -> PPOModule:
    """Two rollouts, two steps each."""
    sampler = Watched(max_new_tokens=5)
    made = PPOModule(
        policy=tiny.llama(initializer_range=0.1), value=tiny.scalar_model(1), reward=tiny.scalar_model(2),
        sampler=sampler, tokenizer=tiny.tokenizer(), ppo=PPO(), optim=Optim(lr=1e-3), compile=compile,
    )  # fmt: skip
    for one in (made.policy, made.reference, made.value.hf, made.reward.hf):
        assert one is not None
        use_attend(one)
    data = ExperienceData(
        tokenizer=tiny.tokenizer(), train=ROWS, episodes=16, rollout_batch=8, minibatch=4, max_prompt_tokens=20
    )
    tiny.fit(made, data, folder, callbacks=[SampleTable(prompts=ROWS, sampler=sampler, count=4, every=2)])
    return made


@pytest.mark.parametrize("kind", ["gpt2", "checkpointing", "frozen", "lora"])
def test_batches_of_any_shape_run_what_was_compiled_for_the_first(kind: str) -> None:
    plain, ours = sft(kind), sft(kind)
    packed.padded.add(plain.model)
    seen = []
    with afresh():
        compiled.compile_blocks([ours.model])
        for lengths in SHAPES:
            batch = text(*lengths)
            tiny.assert_same_gradients(
                tiny.gradients(ours, ours.losses(batch)), tiny.gradients(plain, plain.losses(batch))
            )
            with torch.no_grad():  # as when scoring
                assert torch.equal(next(ours.losses(batch))[0], next(plain.losses(batch))[0])
            seen.append(graphs())
    assert 2 <= seen[0] <= 6 and seen == seen[:1] * len(SHAPES)


def test_a_prompt_that_answers_share_is_compiled_around_once() -> None:
    plain, ours, seen = reward(True), reward(True), []
    with afresh():
        compiled.compile_blocks([ours.model.hf])
        assert trials.shares_prompts(ours.model.hf, torch.device("cpu"))
        assert graphs() == 0, "trying a model out compiles it"
        for prompt, index in enumerate(([0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]), start=2):
            batch = comparisons(index, prompt)
            tiny.assert_same_gradients(
                tiny.gradients(ours, ours.losses(batch)), tiny.gradients(plain, plain.losses(batch))
            )
            seen.append(graphs())
    assert seen[0] >= 2 and seen == seen[:1] * 3


@pytest.mark.parametrize("switch", [True, False])
def test_ppo_compiles_what_scores_and_learns_and_not_what_writes(switch: bool, tmp_path: Path) -> None:
    WRITING.clear()
    with afresh():
        ppo(tmp_path, switch)
        assert (graphs() > 0) is switch
    assert WRITING == [0] * 5  # two rollouts; tables at the beginning and after steps 2 and 4


@pytest.fixture
def real_compiler() -> Iterator[None]:
    with afresh(None):
        yield


def test_compiled_steps_are_those_without(real_compiler: None, tmp_path: Path) -> None:
    """In one test, as all Llamas share what is compiled. The first ratio was exactly 1 wherever it was measured."""
    batch = text(*SHAPES[0])
    for kind in ("llama", "gpt2"):
        plain, ours = sft(kind), sft(kind)
        compiled.compile_blocks([ours.model])
        assert_close(tiny.gradients(ours, ours.losses(batch)), tiny.gradients(plain, plain.losses(batch)))
    one, other = reward(False), reward(False)
    compiled.compile_blocks([one.model.hf])
    ranked = comparisons([0, 0, 0, 1, 1], 3)
    assert_close(tiny.gradients(one, one.losses(ranked)), tiny.gradients(other, other.losses(ranked)))
    runs = [ppo(tmp_path / str(switch), switch) for switch in (True, False)]
    weights = [dict(run.named_parameters()) for run in runs]
    for name, weight in weights[0].items():  # steps of 1e-3, by Adam
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-5, atol=2e-5, msg=lambda said, n=name: n + said)
    assert tiny.logged(tmp_path / "True", "policy/ratio_max")[0] == pytest.approx(1.0, abs=1e-5)
    assert tiny.logged(tmp_path / "False", "policy/ratio_max")[0] == 1.0


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest of each gradient."""
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert float((ours[name] - grad).abs().max()) <= 1e-5 * float(grad.abs().max()), name


def test_two_processes_that_share_weights_compile_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'tests'}")
    script, out = str(Path(__file__).with_name("compiled_ranks.py")), tmp_path / "out"
    assert launch.run([sys.executable, script, str(out)], 2) == 0
    found = torch.load(out, weights_only=True)
    assert found["graphs"] == [found["graphs"][0]] * 3 and found["graphs"][0] >= 1
    for name, weight in found["plain"].items():
        torch.testing.assert_close(found["compiled"][name], weight, rtol=1e-5, atol=1e-6)


def test_a_stopped_run_continues_to_the_same_bits(
    real_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiles again, and its first batch after the stop is another one; with dropout."""
    crash_runs.prepare(tmp_path)
    more = ["module.compile=true", "data.batch_size=64", "data.mix=null", "data.mix_fraction=0", "data.valid=null",
            "callbacks.samples=null", "module.micro_batch_tokens=100000"]  # fmt: skip
    command = [*crash_runs.arguments("sft", tmp_path, 0), *more]
    assert fit.main([*command, f"run_dir={tmp_path / 'whole'}"]) == 0
    losses = SFTModule.losses

    def stops(module: SFTModule, batch: Any) -> Iterator[Any]:
        yield from losses(module, batch)
        if module.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(SFTModule, "losses", stops)
        assert fit.main([*command, f"run_dir={tmp_path / 'stopped'}"]) == interrupt.AGAIN
    assert checkpoints.step_of(checkpoints.found(tmp_path / "stopped" / "checkpoints")[0]) == 4
    with afresh(None):
        assert fit.main([*command, f"run_dir={tmp_path / 'stopped'}"]) == 0
        assert graphs() > 0
    assert crash_runs.differences(tmp_path / "stopped", tmp_path / "whole") == []
