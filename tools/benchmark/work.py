"""The common work: model folders and token ids that every contender reads, so that all of them do the same.

Models have random weights, which cost as much as trained ones. Their answers must be as long as real ones, though, and
as different in length. So the policy counts down: every token belongs to a class, the number of tokens that are still
to come, and the model writes only tokens of the next lower class and, at last, EOS. A prompt's last token thus decides
how long its answer is, for every contender and in every turn alike; which tokens of a class are written is drawn.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tools.benchmark.kinds import CPU

Token = TypeVar("Token", int, Tensor)

PAD, BOS, EOS, FIRST = 0, 1, 2, 3
"""Ids of special tokens, and of the first of all others."""

POLICY, REWARD = "policy", "reward"
"""Folders of the models."""

EMBEDDED, WANTED = 8.0, 3.0
"""How strongly a token's class is written into its embedding, and asked for by the rows of the output matrix. Together
more than 30 nats, so that a token of another class is drawn in less than one of a million million steps."""

NOISE = 0.5
"""Standard deviation of the embedding beside it."""

QUIET = 0.32
"""Standard deviation of what a block's matrices make of normalised numbers: what blocks add stays below the class."""


@dataclass(frozen=True)
class Spread:
    """Lengths in tokens: lognormal, cut to a range."""

    median: float
    low: int
    high: int
    sigma: float = 0.7

    def lengths(self, count: int, draw: random.Random) -> list[int]:
        """So many lengths at evenly spaced quantiles, shuffled: even few have the spread of many."""
        normal = NormalDist(math.log(self.median), self.sigma)
        found = [round(math.exp(normal.inv_cdf((place + 0.5) / count))) for place in range(count)]
        draw.shuffle(found)
        return [min(max(length, self.low), self.high) for length in found]


@dataclass(frozen=True)
class Size:
    """How large the work is.

    Attributes:
        hidden, layers, heads, inner, vocab: Shape of all models: a Llama with untied embeddings.
        sharing: Heads of queries that share one of keys.
        positions: The longest sequence it takes.
        prompt, response: Lengths. `response.high` is the limit of new tokens as well.
        batch: Examples of one optimizer step of SFT.
        compared: Answers to a prompt -> prompts of one optimizer step of the reward model.
        steps: Of one turn, of both.
        episodes, epochs: Of one rollout of PPO, which is a turn; every epoch is one optimizer step.
        prompts: Answered in one turn where only the sampler is measured.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    inner: int
    vocab: int
    positions: int
    prompt: Spread
    response: Spread
    batch: int
    steps: int
    compared: dict[int, int]
    episodes: int
    epochs: int
    prompts: int
    sharing: int = 1


SIZES = {
    "15m": Size(
        name="15m", hidden=256, layers=8, heads=8, inner=1024, vocab=8192, positions=1024,
        prompt=Spread(64, 16, 256), response=Spread(40, 4, 128),
        batch=32, steps=2, compared={4: 8, 9: 2}, episodes=24, epochs=4, prompts=64,
    ),
    # As many weights as InstructGPT's smallest policy, and the shape of Llama 3.2 1B.
    "1.4b": Size(
        name="1.4b", hidden=2048, layers=24, heads=16, inner=5504, vocab=50304, positions=2048,
        prompt=Spread(128, 16, 512), response=Spread(256, 16, 512),
        batch=128, steps=2, compared={4: 32, 9: 8}, episodes=256, epochs=2, prompts=1024,
    ),
    "1b": Size(
        name="1b", hidden=2048, layers=16, heads=32, inner=8192, vocab=128256, positions=2048,
        prompt=Spread(128, 16, 512), response=Spread(256, 16, 512), sharing=4,
        batch=128, steps=2, compared={4: 32, 9: 8}, episodes=256, epochs=2, prompts=1024,
    ),
    "tiny": Size(
        name="tiny", hidden=32, layers=2, heads=4, inner=64, vocab=256, positions=64,
        prompt=Spread(12, 4, 32), response=Spread(8, 2, 16),
        batch=8, steps=2, compared={4: 2, 9: 1}, episodes=8, epochs=2, prompts=8,
    ),
}  # fmt: skip

LEARNING_RATE = 1e-6
"""So small that no turn changes what a model does, so small that all turns are alike."""

KL, CLIP, VALUE_COEF, GAMMA, LAMBDA = 0.05, 0.2, 0.1, 1.0, 0.95
"""PPO's numbers, TRL's defaults: they say nothing about speed, but all shall compute the same."""


@dataclass(frozen=True)
class Work:
    """What a contender reads. Token ids only; a response includes its EOS.

    Attributes:
        folder: Holds the model folders as well.
        size: How large it is.
        demonstrations: `prompt` and `response`.
        comparisons: Answers to a prompt -> `prompt`, `responses` and `scores`, no two of them alike.
        episodes: Prompts of a rollout of PPO.
        prompts: Prompts where only the sampler is measured.
        device: Where the work is done.
    """

    folder: Path
    size: Size
    demonstrations: list[dict[str, Any]]
    comparisons: dict[int, list[dict[str, Any]]]
    episodes: list[list[int]]
    prompts: list[list[int]]
    device: str = CPU

    @classmethod
    def read(cls, folder: Path) -> "Work":
        """What `write` has written."""
        found = json.loads((folder / "work.json").read_text(encoding="utf-8"))
        size = found["size"]
        size = Size(
            **{
                **size,
                "prompt": Spread(**size["prompt"]),
                "response": Spread(**size["response"]),
                "compared": {int(count): prompts for count, prompts in size["compared"].items()},
            }
        )
        comparisons = {int(count): rows for count, rows in found["comparisons"].items()}
        texts = (found["demonstrations"], comparisons, found["episodes"], found["prompts"])
        return cls(folder, size, *texts, device=found["device"])

    @property
    def policy(self) -> str:
        """The folder of the language model."""
        return str(self.folder / POLICY)

    @property
    def reward(self) -> str:
        """The folder of the reward model."""
        return str(self.folder / REWARD)


def write(folder: Path, size: Size, seed: int = 0, device: str = CPU) -> Work:
    """Makes the work for a device and writes it: models, tokenizer and `work.json`."""
    if size.response.high > size.hidden:
        raise ValueError(
            f"{size.name}: responses of up to {size.response.high} tokens need a model with at least as many hidden "
            f"units, got {size.hidden}"
        )
    draw = random.Random(seed)
    work = Work(
        folder=folder,
        size=size,
        demonstrations=_demonstrations(size, size.batch * size.steps, draw),
        comparisons={count: _comparisons(size, count, draw) for count in size.compared},
        episodes=_prompts(size, size.episodes, draw),
        prompts=_prompts(size, size.prompts, draw),
        device=device,
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_models(folder, size, seed, device)
    content = {name: value for name, value in vars(work).items() if name not in ("folder", "size")}
    (folder / "work.json").write_text(json.dumps({"size": asdict(size), **content}), encoding="utf-8")
    return work


def response_length(prompt: Sequence[int], size: Size) -> int:
    """How long the policy's answer to a prompt is, EOS included."""
    return token_class(prompt[-1], size)


def token_class(token: Token, size: Size) -> Token:
    """How many tokens follow this one in an answer; or of many tokens."""
    return 1 + (token - FIRST) % size.response.high


def demonstrations(size: Size, count: int, length: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """So many demonstrations, of the size's spread, or all of one length, a third of it the response."""
    draw = random.Random(seed)
    if length is None:
        return _demonstrations(size, count, draw)
    own = length // 3
    return [
        {"prompt": _tokens(size, length - own, draw), "response": [*_tokens(size, own - 1, draw), EOS]}
        for _ in range(count)
    ]  # fmt: skip


def _demonstrations(size: Size, count: int, draw: random.Random) -> list[dict[str, Any]]:
    rows = zip(_prompts(size, count, draw), _responses(size, count, draw), strict=True)
    return [{"prompt": prompt, "response": response} for prompt, response in rows]


def _prompts(size: Size, count: int, draw: random.Random) -> list[list[int]]:
    """Random prompts, whose last tokens ask for answers of the right lengths."""
    lengths, wanted = size.prompt.lengths(count, draw), size.response.lengths(count, draw)
    ends = [FIRST - 1 + length for length in wanted]
    return [[*_tokens(size, length - 1, draw), end] for length, end in zip(lengths, ends, strict=True)]


def _responses(size: Size, count: int, draw: random.Random) -> list[list[int]]:
    return [[*_tokens(size, length - 1, draw), EOS] for length in size.response.lengths(count, draw)]


def _comparisons(size: Size, count: int, draw: random.Random) -> list[dict[str, Any]]:
    prompts = _prompts(size, size.compared[count] * size.steps, draw)
    responses = iter(_responses(size, count * len(prompts), draw))
    return [
        {
            "prompt": prompt,
            "responses": [next(responses) for _ in range(count)],
            "scores": draw.sample(range(count), count),
        }
        for prompt in prompts
    ]


def _tokens(size: Size, count: int, draw: random.Random) -> list[int]:
    return draw.choices(range(FIRST, size.vocab), k=count)


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words w3, w4, ... are their own ids."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(FIRST, vocab))]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def config(size: Size) -> LlamaConfig:
    """The shape of all models."""
    return LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads // size.sharing,
        max_position_embeddings=size.positions,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False, num_labels=1,
        initializer_range=min(0.02, QUIET * size.hidden**-0.5),
    )  # fmt: skip


def _write_models(folder: Path, size: Size, seed: int, device: str) -> None:
    torch.manual_seed(seed)
    with torch.device(device):  # which takes seconds for a thousand million random numbers, and a CPU a minute
        policy, reward = LlamaForCausalLM(config(size)), LlamaForSequenceClassification(config(size))
    with torch.no_grad():
        _count_down(policy.model.embed_tokens.weight, policy.lm_head.weight, size)
    reward.model.load_state_dict(policy.model.state_dict())
    words = tokenizer(size.vocab)
    for name, model in ((POLICY, policy), (REWARD, reward)):
        model.to(torch.float32 if device == CPU else torch.bfloat16).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    del policy, reward, model
    torch.cuda.empty_cache()  # nothing where there is no GPU


def _count_down(embedding: Tensor, output: Tensor, size: Size) -> None:
    """Lets answers count down; see above. One hidden unit stands for each class."""
    embedding.normal_(0.0, NOISE)
    tokens = torch.arange(FIRST, size.vocab, device=embedding.device)
    classes = token_class(tokens, size)
    embedding[tokens, classes - 1] += EMBEDDED
    below = classes < size.response.high
    output[tokens[below], classes[below]] += WANTED  # the class above, which stands in the unit of that number less one
    output[EOS, 0] += WANTED


def resized(size: Size, **changes: Any) -> Size:
    """Another size, to see what grows with what."""
    return replace(size, name="changed", **changes)
