"""Order as a pure function of seed and place, shares of ranks, and resuming in the middle of an epoch of a real fit."""

from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from word_tokenizer import QUIET, WORDS, make_tokenizer

from align.data.base import AlignData
from align.data.demonstrations import DemonstrationData
from align.data.loader import Loader, ShuffledBatches, stream


def shuffled(size: int, batch_size: int, **given) -> ShuffledBatches:
    return ShuffledBatches(lambda epoch: stream(size, epoch * size, size, 0, "order"), size, batch_size, **given)


def test_a_stream_is_made_of_whole_shuffles_and_does_not_depend_on_how_it_is_cut():
    whole = stream(5, 0, 15, seed=3, purpose="x")
    for sweep in whole.split(5):
        assert sorted(sweep.tolist()) == [0, 1, 2, 3, 4]
    assert len({tuple(sweep.tolist()) for sweep in whole.split(5)}) == 3
    assert torch.cat([stream(5, start, 3, 3, "x") for start in range(0, 15, 3)]).equal(whole)
    assert stream(5, 7, 1, 3, "x").tolist() == [whole[7]]
    assert not stream(5, 0, 15, seed=3, purpose="y").equal(whole)
    assert stream(5, 4, 0, 3, "x").tolist() == []


def test_an_epoch_holds_every_example_once_and_the_last_batch_may_be_small():
    batches = shuffled(11, 4)
    assert len(batches) == 3
    first, second = batches.epoch(0), batches.epoch(1)
    assert [len(batch) for batch in first] == [4, 4, 3]
    assert sorted(chain(*first)) == list(range(11)) == sorted(chain(*second))
    assert first != second
    assert shuffled(11, 4).epoch(1) == second


def test_ranks_share_every_batch():
    alone = shuffled(9, 4)
    ranks = [shuffled(9, 4, rank=rank, world_size=2) for rank in range(2)]
    assert [len(batches) for batches in (alone, *ranks)] == [3, 3, 3]
    for whole, *parts in zip(alone.epoch(5), *(rank.epoch(5) for rank in ranks), strict=True):
        assert parts == [whole[0::2], whole[1::2]]
    assert ranks[1].epoch(5)[-1] == []
    with pytest.raises(ValueError, match="batch_size=2 is less than the 3 ranks"):
        shuffled(9, 2, world_size=3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_rank_without_examples_gets_one_that_does_not_count(num_workers):
    data = numbered()
    data.num_workers = num_workers
    data.ranks = lambda: (1, 2)  # type: ignore[method-assign]
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(batch.ids) for batch in batches] == [1, 1, 1, 1, 1]  # 13 examples in batches of 3
    assert [bool(batch.mask.any()) for batch in batches] == [True, True, True, True, False]


def test_the_seed_decides_the_order_of_a_data_module(tokenizer):
    def order(seed: int, epoch: int) -> list[int]:
        rows = [{"prompt": "a", "response": "b"}] * 20
        data = DemonstrationData(tokenizer=tokenizer, train=rows, batch_size=3, max_prompt_tokens=2,
                                 max_response_tokens=2, seed=seed)  # fmt: skip
        data.setup()
        return data.order(epoch).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4


def test_a_loader_draws_nothing_from_the_default_generator():
    loader = Loader(list(range(6)), shuffled(6, 2), list)
    before = torch.get_rng_state()
    list(loader)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loaded_state_continues_once_and_then_epochs_are_whole(num_workers):
    def loader() -> Loader:
        return Loader(list(range(10)), shuffled(10, 3), list, num_workers)

    one = loader()
    epochs = []
    for epoch in range(2):
        one.set_epoch(epoch)
        epochs.append(list(one))
    two = loader()
    two.set_epoch(1)
    batches = iter(two)
    assert [next(batches), next(batches)] == epochs[1][:2]
    three = loader()
    three.load_state_dict(two.state_dict())
    assert len(three) == 4
    iter(three)  # Lightning does this before it takes the iterator it uses
    three.set_epoch(1)
    assert list(three) == epochs[1][2:]
    assert list(three) == epochs[1]
    three.load_state_dict(two.state_dict())
    three.set_epoch(0)
    assert list(three) == epochs[0]


class Recorder(pl.LightningModule):
    """Takes one optimizer step a batch and remembers which examples it saw at which step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[int]] = {}
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen[self.global_step] = batch.ids[:, 0].tolist()
        optimizer = self.optimizers()
        self.weight.grad = torch.ones(1)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.ids[:, 0].tolist()

    def configure_optimizers(self):
        # Makes Lightning build the loader before it restores loader states, and then drop them.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=1.0)


def numbered(**given) -> AlignData:
    names = [f"w{number}" for number in range(13)]
    rows = [{"prompt": name, "response": "<pad>"} for name in names]
    limits = {"max_prompt_tokens": 2, "max_response_tokens": 2}
    return DemonstrationData(tokenizer=make_tokenizer(WORDS + names), train=rows, batch_size=3, **limits, **given)


def fitted(folder, resume=None, valid=None, **given) -> Recorder:
    module = Recorder()
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(max_epochs=3, callbacks=[keep], **QUIET, **given)
    trainer.fit(module, datamodule=numbered(valid=valid), ckpt_path=resume)
    return module


@pytest.mark.parametrize("given", [{}, {"limit_train_batches": 4}])
def test_a_fit_that_was_stopped_anywhere_sees_what_it_would_have_seen(tmp_path, given):
    per_epoch = given.get("limit_train_batches", 5)
    whole = fitted(tmp_path, **given).seen
    assert list(whole) == list(range(3 * per_epoch))
    epochs = [list(chain(*list(whole.values())[e * per_epoch :][:per_epoch])) for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    if not given:
        assert sorted(epochs[1]) == sorted(epochs[0]) == [*range(min(epochs[0]), min(epochs[0]) + 13)]
    for stop in (1, per_epoch - 1, per_epoch, per_epoch + 2, 2 * per_epoch):
        resumed = fitted(tmp_path / "again", resume=tmp_path / f"step={stop}.ckpt", **given).seen
        assert resumed == {step: ids for step, ids in whole.items() if step >= stop}, stop


def test_a_data_module_may_be_fitted_again(tmp_path):
    whole, data = fitted(tmp_path).seen, numbered()
    for resume, first in ((None, 0), (tmp_path / "step=7.ckpt", 7), (None, 0)):
        module = Recorder()
        pl.Trainer(max_epochs=3, enable_checkpointing=False, **QUIET).fit(module, datamodule=data, ckpt_path=resume)
        assert module.seen == {step: ids for step, ids in whole.items() if step >= first}


def test_validation_sees_its_examples_in_order_every_time(tmp_path):
    rows = [{"prompt": word, "response": "a"} for word in "hgfe"]
    module = fitted(tmp_path, valid=rows, num_sanity_val_steps=0, val_check_interval=2)
    assert module.validated == [15, 14, 13, 12] * 6
