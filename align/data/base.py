"""The data family's common part: examples -> encoded examples -> batches, with every dropped example counted.

A member says what an example becomes (`encode`) and how several make a batch (`collate`). Sources, limits, order and
loaders are the same for all. Nothing here knows models.
"""

import hashlib
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from align import seeds
from align.data.loader import Loader, ShuffledBatches
from align.data.sources import Source, located, read
from align.data.templates import Piece, Templates, tokenize
from align.types import Record, Sequences

Encoded = dict[str, Any]

CHUNK = 4096
"""Examples tokenised in one call: enough for the tokenizer's threads, few enough for a bar that moves."""

WORTH_A_BAR = 20_000
"""Examples from which on encoding takes long enough (seconds) to show its progress."""

READ = "examples read"
USED = "used"
SIZES = (
    "batch_size",
    "valid_batch_size",
    "max_tokens",
    "max_prompt_tokens",
    "max_response_tokens",
    "max_pretraining_tokens",
    "max_demonstrations",
    "episodes",
    "rollout_batch",
    "minibatch",
    "epochs",
)
"""Constructor arguments of the family's members that must be at least 1."""

LONG_PROMPT = "dropped: prompt longer than max_prompt_tokens"
CUT_RESPONSE = "responses cut to max_response_tokens (a cut response has no EOS)"
NOTHING_LEARNED = "dropped: no token to learn"
ALL_TIED = "dropped: all scores equal"
EMPTY_PROMPT = "dropped: empty prompt"
CUT_TEXT = "texts longer than max_tokens, cut into pieces"


class AlignData(LightningDataModule):
    """Base of all data modules. To change where examples come from, override `examples`; nothing else is needed.

    Hooks, in the order they are called:
      * `examples(split) -> Iterable[dict]`: called once a split by `setup`, on every rank. Default: reads the source.
      * `encode(examples, counts, split) -> list[dict]`: called by `setup` with some thousand examples at a time.
      * `order(epoch) -> (size,)`: called at the start of every training epoch.
      * `collate(encoded) -> Record`: called for every batch, in a worker process where there are any.

    Attributes:
        encoded: Split -> its encoded examples, after `setup`.
        report: Split -> what happened to its examples, after `setup`: how many were read, used, dropped and why.
        may_change: A run may be continued although its examples are others than when it began.

    Args:
        tokenizer: Must have an EOS token; its padding token and side do not matter.
        train: Examples to train on.
        valid: Examples to validate on.
        batch_size: Examples of one optimizer step, all ranks together.
        valid_batch_size: Examples of one validation batch; default: batch_size.
        seed: Decides the training order.
        num_workers: Processes that collate batches; 0 is enough, since `setup` did the tokenisation.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        train: Source,
        valid: Source | None = None,
        batch_size: int,
        valid_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.require(batch_size=batch_size, valid_batch_size=valid_batch_size)
        self.tokenizer = tokenizer
        self.templates = Templates(tokenizer)
        self.sources: dict[str, Source | None] = {"train": train, "valid": valid}
        self.batch_size = batch_size
        self.valid_batch_size = batch_size if valid_batch_size is None else valid_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.encoded: dict[str, list[Encoded]] = {}
        self._train_loader: Any = None
        self._train_state: dict[str, Any] | None = None
        self.report: dict[str, dict[str, int]] = {}
        self.may_change = False
        self._digests: dict[str, str] = {}

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """What is wrong with these constructor arguments, in words; for the configuration check and for `require`.

        Args:
            arguments: Some or all of the constructor's arguments; those that are missing are not judged.
        """
        sizes = {name: arguments[name] for name in SIZES if isinstance(arguments.get(name), int)}
        return [f"{name}: got {value}, expected at least 1" for name, value in sizes.items() if value < 1]

    def require(self, **arguments: Any) -> None:
        """Raises a ValueError with all that `config_errors` finds wrong with the arguments."""
        if errors := self.config_errors(arguments):
            raise ValueError("; ".join(errors))

    def examples(self, split: str) -> Iterable[dict[str, Any]]:
        """The examples of a split, in a format the member understands.

        Called once a split, by `setup`, on every rank. Override it to take examples from anywhere.

        Args:
            split: "train" or "valid", or a further source that a member names.
        """
        source = self.sources[split]
        return read(source) if source is not None else []

    @abstractmethod
    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Examples -> what `collate` takes. Drops what cannot be used and counts it.

        Many at once, since a tokenizer is several times faster that way.

        Args:
            examples: Some of a split's examples.
            counts: To be increased, a sentence -> how many examples it is true of.
            split: Where they come from, as in `examples`.
        """

    @abstractmethod
    def collate(self, encoded: list[Encoded]) -> Record:
        """Encoded examples -> one batch."""

    def order(self, epoch: int) -> Int[Tensor, " size"]:
        """The indices of an epoch's training examples in order: a pure function of seed and epoch."""
        return torch.randperm(self.train_size, generator=seeds.generator(self.seed, "order", epoch))

    @property
    def train_size(self) -> int:
        """Examples in one training epoch."""
        return len(self.encoded["train"])

    def setup(self, stage: str | None = None) -> None:
        """Reads and encodes all sources, once. Called by Lightning on every rank, before anything else of a run."""
        self._train_loader = self._train_state = None
        for split in self.sources:
            if self.sources[split] is not None and split not in self.encoded:
                self.encoded[split] = self._load(split)

    def _load(self, split: str) -> list[Encoded]:
        """Reads and encodes one split and reports what became of it.

        Raises:
            ValueError: no example of the split is usable.
        """
        rows = [located(row, f"{split} example {number}") for number, row in enumerate(self.examples(split))]
        starts: Iterable[int] = range(0, len(rows), CHUNK)
        if len(rows) >= WORTH_A_BAR and sys.stderr.isatty():
            starts = track(starts, description=f"Tokenising {split}", transient=True)
        counts: Counter[str] = Counter()
        encoded = [item for start in starts for item in self.encode(rows[start : start + CHUNK], counts, split)]
        happened = {what: count for what, count in counts.items() if count}
        self.report[split] = {READ: len(rows), USED: len(encoded), **happened}
        line = f"{split}: " + "; ".join(f"{count:,} {what}" for what, count in self.report[split].items())
        if not encoded:
            raise ValueError(f"no usable example. {line}. Check the source ({self._shown(split)}) and the limits")
        rank_zero_info(line)
        return encoded

    def training_examples(self) -> list[Encoded]:
        """What the indices of `order` refer to."""
        return self.encoded["train"]

    def train_dataloader(self) -> Any:
        """The batches of training; resumable."""
        self._train_loader = self.make_train_loader()
        if self._train_state is not None:
            self._train_loader.load_state_dict(self._train_state)
            self._train_state = None
        return self._train_loader

    def make_train_loader(self) -> Any:
        """A sized loader with `state_dict` and `load_state_dict`; here, of shuffled batches."""
        return self._loader(self.training_examples(), self.order, self.train_size, self.batch_size)

    # Lightning saves and loads a loader's state by itself, but drops it when anything asked for
    # `trainer.estimated_stepping_batches` before (https://github.com/Lightning-AI/pytorch-lightning/issues/20550),
    # as every learning-rate schedule does. A data module's state always arrives, so the loader's travels in it.

    def state_dict(self) -> dict[str, Any]:
        """The training loader's place and what the examples are, for checkpoints.

        A batch that was taken but not learned, as a signal came in between, counts as not taken.
        """
        if self._train_loader is None:
            return {}
        module = self.trainer.lightning_module if self.trainer is not None else None
        back = int(getattr(module, "batch_at_hand", None) is not None)
        return {"train_loader": self._train_loader.state_dict(back), "fingerprints": self._fingerprints()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by Lightning on resuming, before or after the training loader was made.

        Raises:
            ValueError: The examples are not those that the run began with.
        """
        then, now = state_dict["fingerprints"], self._fingerprints()
        changed = [split for split in sorted({*then, *now}) if then.get(split) != now.get(split)]
        if changed and not self.may_change:
            shown = ", ".join(f"{split} ({self._shown(split)})" for split in changed)
            raise ValueError(
                f"the examples are not those that the run began with: {shown}. Give it the same data again; "
                "resume=force continues with what is there now, overwrite=true begins anew"
            )
        if self._train_loader is None:
            self._train_state = state_dict["train_loader"]
        else:
            self._train_loader.load_state_dict(state_dict["train_loader"])

    def _fingerprints(self) -> dict[str, str]:
        """Split -> a digest of its encoded examples in order."""
        for split, encoded in self.encoded.items():
            if split not in self._digests:
                digest = hashlib.blake2b(digest_size=16)
                for example in encoded:
                    _add(digest, {key: value for key, value in example.items() if key != "row"})
                self._digests[split] = digest.hexdigest()
        return self._digests

    def val_dataloader(self) -> Any:
        """Validation batches, in the order of the source; an empty list where there is no `valid`."""
        if "valid" not in self.encoded:
            return []
        encoded = self.encoded["valid"]
        return self._loader(encoded, lambda epoch: torch.arange(len(encoded)), len(encoded), self.valid_batch_size)

    def ranks(self) -> tuple[int, int]:
        """This process's rank and the number of ranks; (0, 1) outside a Trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(self, encoded: list[Encoded], order: Callable[[int], Tensor], size: int, batch_size: int) -> Loader:
        batches = ShuffledBatches(order, size, batch_size, *self.ranks())
        return Loader(encoded, batches, self.collate, self.num_workers)

    def _shown(self, split: str) -> str:
        source = self.sources[split]
        return source if isinstance(source, str) else f"a list of {len(source or [])}"


def filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows behind their lengths. Nothing ever looks at it, so it may equal EOS."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)  # type: ignore[arg-type]


def padded(rows: Sequence[Int[Tensor, " _"]], fill: int) -> tuple[Int[Tensor, "batch time"], Int[Tensor, " batch"]]:
    """Rows of ids -> one right-padded tensor and the lengths."""
    ids = pad_sequence([row.long() for row in rows], batch_first=True, padding_value=fill)
    return ids, torch.tensor([len(row) for row in rows])


def compact(ids: list[int]) -> Int[Tensor, " time"]:
    """Token ids as kept between `setup` and `collate`: four bytes a token."""
    return torch.tensor(ids, dtype=torch.int32)


def sequences(encoded: Sequence[Encoded], fill: int) -> Sequences:
    """Encoded examples with `ids` and `mask` -> one batch."""
    ids, lengths = padded([item["ids"] for item in encoded], fill)
    mask: Bool[Tensor, "batch time"] = pad_sequence([item["mask"] for item in encoded], batch_first=True)
    return Sequences(ids=ids, lengths=lengths, mask=mask)


def tokenize_groups(tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[Piece]]) -> list[list[list[int]]]:
    """Tokenises the pieces of many examples in one call; the ids come back in the same groups."""
    flat = iter(tokenize(tokenizer, [piece for group in groups for piece in group]))
    return [[next(flat) for _ in group] for group in groups]


def _add(digest: "hashlib.blake2b", value: Any) -> None:
    """Takes a value into a digest: tensors by their bytes, containers by their parts, everything else as it prints."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            digest.update(f"{key}:".encode())
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
