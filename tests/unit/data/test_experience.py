"""Experience: order as a function of the step, on-policy rollouts in a real fit, and resuming inside a rollout."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from word_tokenizer import QUIET

from align import seeds
from align.data.experience import ExperienceData, ExperienceLoader
from align.types import Completions, Minibatch, Prompts, Rollout

SIZES = {"episodes": 24, "rollout_batch": 8, "minibatch": 4, "epochs": 2, "max_prompt_tokens": 4}
PROMPTS = [{"prompt": word, "place": place} for place, word in enumerate("abcdefgh" + "abc")]


def answered(prompts: Prompts, mark: float) -> Rollout:
    """A rollout of one-token answers whose every number is `mark`, but for scores: the places of the prompts."""
    count = len(prompts.ids)
    completions = Completions(
        ids=torch.cat([prompts.ids, torch.ones(count, 1, dtype=torch.long)], dim=1),
        prompt_lengths=prompts.lengths,
        response_lengths=torch.ones(count, dtype=torch.long),
        finished=torch.ones(count, dtype=torch.bool),
        rows=prompts.rows,
    )
    numbers = torch.full((count, 1), mark)
    places = torch.tensor([float(row["place"]) for row in prompts.rows])
    names = ("logprobs", "ref_logprobs", "values", "entropies", "rewards", "advantages", "returns")
    mask = torch.ones(count, 1, dtype=torch.bool)
    return Rollout(completions=completions, mask=mask, scores=places, **dict.fromkeys(names, numbers))


def experience(tokenizer, **given) -> ExperienceData:
    data = ExperienceData(tokenizer=tokenizer, train=PROMPTS, **{**SIZES, **given})
    data.setup()
    return data


def loader(tokenizer, ranks=(0, 1), **given) -> ExperienceLoader:
    data = experience(tokenizer, **given)
    data.ranks = lambda: ranks  # type: ignore[method-assign]
    made = data.train_dataloader()
    # What `distributed.whole` would gather: the episodes of all ranks.
    made.collect = lambda prompts, iteration, minibatch: answered(made._prompts_of(iteration), float(iteration))
    return made


def places(batch: Minibatch) -> list[int]:
    """Which prompts a minibatch answers, from a tensor and from the rows alike."""
    found = batch.episodes.scores.int().tolist()
    assert found == [row["place"] for row in batch.episodes.completions.rows]
    return found


def test_the_run_has_one_minibatch_for_each_optimizer_step(tokenizer):
    assert len(loader(tokenizer)) == 3 * 2 * 2  # iterations, epochs, minibatches
    assert len(list(loader(tokenizer))) == 12


def test_each_rollout_takes_the_next_prompts_of_an_endless_shuffle(tokenizer):
    batches = list(loader(tokenizer))
    fresh = [batch.fresh for batch in batches]
    assert [place for place, rollout in enumerate(fresh) if rollout is not None] == [0, 4, 8]
    assert [batch.iteration for batch in batches] == [0] * 4 + [1] * 4 + [2] * 4
    asked = [place for rollout in fresh if rollout is not None for place in rollout.scores.int().tolist()]
    assert sorted(asked[:11]) == sorted(asked[11:22]) == list(range(11))
    assert asked[:11] != asked[11:22]
    assert asked[:11] == torch.randperm(11, generator=seeds.generator(0, "prompts", 0)).tolist()


def test_the_first_epoch_keeps_the_order_of_collection_and_later_ones_permute(tokenizer):
    batches = list(loader(tokenizer))
    for first, second, third, fourth in (batches[0:4], batches[4:8], batches[8:12]):
        assert first.fresh is not None
        collected = first.fresh.scores.int().tolist()
        assert places(first) + places(second) == collected
        assert sorted(places(third) + places(fourth)) == sorted(collected)
        assert places(third) + places(fourth) != collected


def test_everything_is_a_function_of_the_step(tokenizer):
    texts = [{"text": f"{a} {b}"} for a in "abcd" for b in "efgh"]
    given = {"pretraining": texts, "pretraining_batch": 3, "max_pretraining_tokens": 5}
    whole = list(loader(tokenizer, **given))
    assert all(
        batch.pretraining is not None and batch.pretraining.mask.tolist()[0] == [False, True, True] for batch in whole
    )
    late = loader(tokenizer, **given)
    late.load_state_dict({"step": 8, "rollout": {}})
    for one, other in zip(whole[8:], late, strict=True):
        assert places(one) == places(other)
        assert one.pretraining is not None and other.pretraining is not None
        assert one.pretraining.ids.equal(other.pretraining.ids)
    drawn = [row for batch in whole for row in batch.pretraining.ids.tolist()]  # type: ignore[union-attr]
    assert len({tuple(row) for row in drawn[:16]}) == 16  # 36 texts are drawn; the first 16 are all there are
    assert drawn[16:32] != drawn[:16]


def test_ranks_share_every_rollout_and_minibatch(tokenizer):
    alone = list(loader(tokenizer))
    first, second = (list(loader(tokenizer, ranks=(rank, 2))) for rank in range(2))
    for whole, *parts in zip(alone, first, second, strict=True):
        assert [places(part) for part in parts] == [places(whole)[0::2], places(whole)[1::2]]


def test_ranks_answer_every_other_prompt_with_the_draws_of_its_place(tokenizer):
    alone, *ranks = (loader(tokenizer, ranks=ranks) for ranks in ((0, 1), (0, 2), (1, 2)))
    whole = alone._prompts_of(1)
    assert whole.seeds is not None
    assert whole.seeds.tolist() == [seeds.derive(0, "sample", place) for place in range(8, 16)]
    for rank, one in enumerate(ranks):
        own = one._prompts_of(1, rank, 2)
        assert own.seeds is not None
        assert own.seeds.tolist() == whole.seeds[rank::2].tolist() and own.rows == whole.rows[rank::2]


def test_minibatches_must_be_shared_equally(tokenizer):
    with pytest.raises(ValueError, match="minibatch=4 cannot be shared equally by 3 ranks"):
        loader(tokenizer, ranks=(0, 3))


def test_without_a_pretraining_batch_texts_are_not_even_read(tokenizer):
    data = experience(tokenizer, pretraining="nowhere.jsonl", max_pretraining_tokens=4)
    assert set(data.encoded) == {"train"}


def test_a_finished_run_says_how_to_train_longer(tokenizer):
    done = loader(tokenizer)
    list(done)
    with pytest.raises(ValueError, match=r"the run's 12 optimizer steps are done .* set trainer\.max_epochs to 1"):
        next(iter(done))


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({}, []),
        (
            {"episodes": 30, "minibatch": 3},
            [
                "episodes: got 30, expected a multiple of rollout_batch=8, such as 24 or 32",
                "rollout_batch: got 8, expected a multiple of minibatch=3, such as 6 or 9",
            ],
        ),
        ({"rollout_batch": 32}, ["episodes: got 24, expected a multiple of rollout_batch=32, such as 32"]),
        ({"minibatch": 0}, ["minibatch: got 0, expected at least 1"]),
        ({"pretraining_batch": -1}, ["pretraining_batch: got -1, expected 0 (no pretraining term) or more"]),
        (
            {"pretraining_batch": 2, "max_pretraining_tokens": 1},
            [
                "pretraining: missing, but pretraining_batch is 2; set it, or pretraining_batch to 0",
                "max_pretraining_tokens: got 1, expected at least 2, since a text's first token is not learned",
            ],
        ),
    ],
)
def test_sizes_that_do_not_fit_are_found_without_building_anything(tokenizer, given, messages):
    assert ExperienceData.config_errors({**SIZES, **given}) == messages
    if messages:
        with pytest.raises(ValueError) as error:
            experience(tokenizer, **given)
        assert all(message in str(error.value) for message in messages)


class Toy(pl.LightningModule):
    """Counts its updates in a weight; a rollout remembers the weight it was collected with."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.collected: dict[int, float] = {}
        self.seen: dict[int, tuple[list[int], float]] = {}

    def collect(self, prompts: Prompts, iteration: int, minibatch: int) -> Rollout:
        assert minibatch == 4
        self.collected[iteration] = self.weight.item()
        return answered(prompts, self.weight.item())

    def training_step(self, batch: Minibatch, batch_idx: int):
        self.seen[self.global_step] = places(batch), batch.episodes.logprobs.mean().item()
        optimizer = self.optimizers()
        self.weight.grad = -torch.ones(1)
        optimizer.step()

    def configure_optimizers(self):
        # Makes Lightning build the loader before it restores loader states, and then drop them.
        assert self.trainer.estimated_stepping_batches == 12
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fitted(tokenizer, folder, resume=None) -> Toy:
    module = Toy()
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(max_epochs=1, callbacks=[keep], **QUIET)
    data = ExperienceData(tokenizer=tokenizer, train=PROMPTS, **SIZES)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module


def test_every_rollout_sees_all_updates_before_it(tokenizer, tmp_path):
    module = fitted(tokenizer, tmp_path)
    assert module.collected == {0: 0.0, 1: 4.0, 2: 8.0}
    assert [mark for _, mark in module.seen.values()] == [0.0] * 4 + [4.0] * 4 + [8.0] * 4


def test_a_run_stopped_anywhere_goes_on_with_the_same_experience(tokenizer, tmp_path):
    whole = fitted(tokenizer, tmp_path)
    for stop in (1, 4, 6, 11, 12):
        resumed = fitted(tokenizer, tmp_path / "again", resume=tmp_path / f"step={stop}.ckpt")
        assert resumed.seen == {step: seen for step, seen in whole.seen.items() if step >= stop}, stop
        assert all(whole.collected[iteration] == mark for iteration, mark in resumed.collected.items())
        assert list(resumed.collected) == [iteration for iteration in range(3) if 4 * iteration >= stop]


def test_a_rollout_is_saved_only_where_it_is_needed_again(tokenizer):
    one = loader(tokenizer)
    batches = iter(one)
    taken = [next(batches) for _ in range(6)]
    state = one.state_dict()
    saved = state["rollout"]
    rollout = taken[4].fresh
    assert state["step"] == 6
    assert rollout is not None
    assert saved["scores"].equal(rollout.scores)
    assert saved["completions.ids"].equal(rollout.completions.ids)
    assert one.state_dict()["rollout"]["scores"] is saved["scores"]
    taken += [next(batches) for _ in range(2)]
    assert one.state_dict() == {"step": 8, "rollout": {}}


def test_another_number_of_ranks_goes_on_with_the_same_rollout(tokenizer):
    alone = loader(tokenizer)
    whole = list(alone)
    stopped = loader(tokenizer)
    batches = iter(stopped)
    taken = [next(batches) for _ in range(6)]
    parts = []
    for rank in range(2):
        resumed = loader(tokenizer, ranks=(rank, 2))
        resumed.load_state_dict(stopped.state_dict())
        parts.append(list(resumed))
    assert len(taken) + len(parts[0]) == len(whole)
    for one, first, second in zip(whole[6:], *parts, strict=True):
        assert [places(first), places(second)] == [places(one)[0::2], places(one)[1::2]]
