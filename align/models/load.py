"""The only file that knows how Hugging Face models and tokenizers are loaded and saved.

Every stage reads a Hugging Face folder (or hub name) and writes one that plain `transformers` loads again.
Dropout is switched off on loading, whatever the folder's config says, unless a stage asks for it: with dropout on, the
first PPO ratio is not 1 and the KL to the reference is noise (The N Implementation Details of RLHF with PPO, P-4).
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from align import distributed, seeds
from align.atomic import folder_written_whole
from align.models import adapters, deferred, heads, hydra, quantised, sharding, trunk
from align.models.adapters import LoRA
from align.models.attention import use_attend
from align.models.deferred import SINGLE
from align.models.heads import ScalarModel, initialise_head
from align.models.products import use_products
from align.models.quantised import Bits
from align.paths import ModelPath

DType = Literal["float32", "bfloat16", "float16"]

DROPOUTS = (
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout", "activation_dropout",
    "summary_first_dropout", "classifier_dropout", "classifier_dropout_prob", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "emb_dropout", "resid_dropout", "ffn_dropout",
)  # fmt: skip
"""The names under which transformers' decoder configurations keep a dropout probability."""


FINGERPRINT = "align_fingerprint"
"""Of a model whose weights were converted: the fingerprint they had before."""

HASHED_AT_ONCE = 2**24
"""Weights; more would take too much memory as 64-bit integers."""


def load_tokenizer(path: ModelPath) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; where only shapes matter (`deferred.shapes`), one that stands for any.

    Raises:
        ValueError: It has no EOS token, without which no response can end.
    """
    if deferred.only_shapes():
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"</s>": 0})), eos_token="</s>")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {path!r} has no EOS token, so a response could never end; "
            'set one in its tokenizer_config.json ("eos_token": "...")'
        )
    return tokenizer


def load_causal_lm(
    path: ModelPath,
    *,
    dtype: DType = "float32",
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    lora: LoRA | None = None,
    quantise: Bits | None = None,
    trained_blocks: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model, in training mode; every parameter trainable unless an argument says otherwise.

    Args:
        path: Folder or hub name.
        dtype: Of the weights. Train in float32 and let the trainer's `precision` choose the arithmetic, unless memory
            forces a smaller one.
        dropout: Residual dropout probability, on the output of each attention and MLP block (0.2 in InstructGPT's SFT,
            appendix C.1). All other dropout is off.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        lora: Freezes the weights and trains small updates of them.
        quantise: Keeps the weights of the blocks' linear layers in 8 or 4 bits, and freezes the model.
        trained_blocks: Only so many of the last blocks learn, and what stands behind them; the rest is frozen, which
            in PPO is kept and computed once for all networks that have it in common (`align.models.hydra`). With
            `lora` only so many get updates.
        seed: Of the updates' initialisation.
    """
    config = _config_without_dropout(path)
    model = _from_pretrained(AutoModelForCausalLM, path, quantise, config=config, dtype=getattr(torch, dtype))
    if dropout > 0.0:
        add_residual_dropout(model, dropout)
    _freeze(model, trained_blocks, lora, quantise, seed)
    return _ready(model, gradient_checkpointing)


def load_scalar_model(
    path: ModelPath,
    *,
    dtype: DType = "float32",
    gradient_checkpointing: bool = False,
    lora: LoRA | None = None,
    quantise: Bits | None = None,
    trained_blocks: int | None = None,
    seed: int = 0,
) -> ScalarModel:
    """A reward or value model: the language model with its unembedding replaced by a projection to one number.

    A folder written by the reward stage brings its head and bias. Any causal language model gets a new head, weights
    from N(0, 1/(d+1)) as in OpenAI's lm-human-preferences, drawn from `seed`; its bias is 0.

    Args:
        path: Folder or hub name, of a causal language model or of a sequence classifier with one label.
        dtype: Of the weights.
        gradient_checkpointing: Recompute activations in the backward pass.
        lora: Freezes the weights and trains small updates of them, and the head.
        quantise: Keeps the weights of the blocks' linear layers in 8 or 4 bits, and freezes the model.
        trained_blocks: See `load_causal_lm`.
        seed: Of the head's initialisation, and of the updates'.
    """
    config = _config_without_dropout(path)
    trained = any("SequenceClassification" in name for name in config.architectures or ())
    if trained and config.num_labels != 1:
        raise ValueError(
            f"{path!r} is a classifier with {config.num_labels} labels, a reward model has 1; give a reward model or a "
            "causal language model"
        )
    config.num_labels = 1
    factory, kind = AutoModelForSequenceClassification, getattr(torch, dtype)
    model = _from_pretrained(factory, path, quantise, config=config, dtype=kind)
    if not trained and not deferred.only_shapes():
        drawn = initialise_head(ScalarModel(model).head, seeds.generator(seed, "head"))
        if (source := deferred.source_of(model)) is not None:
            source.made["score.weight"] = drawn
    _freeze(model, trained_blocks, lora, quantise, seed)
    if lora is not None:
        ScalarModel(model).head.float().requires_grad_(True)  # like the updates, whatever the weights are kept in
    return ScalarModel(_ready(model, gradient_checkpointing))


def add_residual_dropout(model: PreTrainedModel, probability: float) -> None:
    """Drops a share of each attention and MLP block's output, before it joins the residual stream.

    Raises:
        ValueError: The model's blocks have none of the names transformers gives them.
    """
    found = 0
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention", "mlp"):
            module.register_forward_hook(_dropout_hook(probability))
            found += 1
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no blocks named self_attn, attn, attention or mlp, so residual dropout cannot "
            "be added; set dropout: 0"
        )


def save_model(model: heads.Network, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes model and tokenizer as a Hugging Face folder; an older folder is replaced only when all is written.

    Of several ranks the first one writes; where the model is sharded, all must call it.
    """
    inner = heads.inner(model)
    if adapters.present(inner):
        _save_merged(inner, tokenizer, Path(folder))
        return
    whole = sharding.whole_weights(inner) if sharding.is_sharded(inner) else None
    if not distributed.is_first():
        return
    with folder_written_whole(folder) as fresh, _quiet():
        inner.save_pretrained(fresh, state_dict=whole)
        tokenizer.save_pretrained(fresh)


def _save_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the model that a model with an adapter amounts to, and the adapter into a folder inside that folder."""
    state = model.state_dict()

    def value_of(name: str) -> Tensor:
        return distributed.whole_tensor(state[name]).cpu()

    whole = {name: value for name, value in adapters.merged(model, value_of) if distributed.is_first()}
    with folder_written_whole(folder) if distributed.is_first() else contextlib.nullcontext(folder) as fresh:
        adapters.write(model, value_of, fresh / trunk.FOLDER)
        if distributed.is_first():
            write_model(plain_twin(model), tokenizer, lambda names: {name: whole[name] for name in names}, fresh)


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without weights, adapters and quantised layers: names, shapes and configuration."""
    with torch.device("meta"):
        twin = type(model)(model.config).to(dtype=model.dtype)  # type: ignore[call-arg]
    if model.can_generate():
        twin.generation_config = model.generation_config
    return twin


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Callable[[list[str]], dict[str, Tensor]],
    folder: Path,
    *,
    file_bytes: int = 5 * 10**9,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a Hugging Face folder of a model that has no weights, some tensors at a time.

    Args:
        model: Made inside `deferred.weights()`, for its names and shapes.
        tokenizer: Goes into the folder.
        tensors: Names in the model -> their values.
        folder: Empty.
        file_bytes: The most in one file, and in memory, unless a single tensor is larger.
        advance: Called with the number of weights written.
    """
    own = sharding.tensors_once(model)
    files: list[list[str]] = []
    size = file_bytes + 1
    for name, tensor in own.items():
        if size + tensor.nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    places = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        values = {name: value.contiguous() for name, value in tensors(names).items()}
        save_file(values, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        advance(sum(value.numel() for value in values.values()))
    if len(files) > 1:
        total = sum(own[name].nbytes for name in places)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / deferred.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


AnyModel = TypeVar("AnyModel", bound=nn.Module)


def frozen(model: AnyModel) -> AnyModel:
    """The model, never trained: no gradients, evaluation mode."""
    return model.requires_grad_(False).eval()


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts the weights of a frozen model into another number format; its fingerprint stays that of what was read."""
    setattr(model, FINGERPRINT, fingerprint(model))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def fingerprint(model: nn.Module, names: Collection[str] | None = None) -> str:
    """A digest of a model's weights, the same on however many threads it is computed.

    Args:
        model: Sharded or not.
        names: Of the weights that matter; None: all.
    """
    if (known := getattr(model, FINGERPRINT, None)) is not None:
        return known
    digest = hashlib.blake2b(digest_size=16)
    for name, part in model.state_dict().items():
        if names is not None and name not in names:
            continue
        tensor = distributed.whole_tensor(part)
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        size = tensor.element_size()
        bits = (
            tensor.detach()
            .contiguous()
            .flatten()
            .view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
        )
        for start in range(0, len(bits), HASHED_AT_ONCE):
            part = bits[start : start + HASHED_AT_ONCE].to(torch.int64)
            place = torch.arange(start + 1, start + 1 + len(part), device=part.device)
            digest.update(f"{int(part.sum())},{int((part * place).sum())};".encode())  # both wrap around, exactly
    return digest.hexdigest()


def _config_without_dropout(path: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        if not deferred.only_shapes():
            raise
        raise ValueError(
            f"{path!r} has no config.json that can be read, and only that says what shape the model has; give the "
            "folder or hub name of a model of the same shape"
        ) from error
    for name in DROPOUTS:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    return config


def _from_pretrained(factory: Any, path: str, bits: Bits | None, **arguments: Any) -> PreTrainedModel:
    model = deferred.outline(factory, **arguments) if deferred.only_shapes() else _read(factory, path, bits, arguments)
    use_attend(model)
    if bits is not None:
        quantise_model(model, bits)
    return model


def _read(factory: Any, path: str, bits: Bits | None, arguments: dict[str, Any]) -> PreTrainedModel:
    # What is to be quantised is read tensor by tensor, so that it is never there whole in its own type.
    model = deferred.make(factory, path, **arguments) if deferred.wanted() or bits else None
    if model is None:
        with _quiet():
            return factory.from_pretrained(path, **arguments)
    with contextlib.suppress(OSError):  # many models have none
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers, and no notice of a new head, which here is no news."""
    bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def quantise_model(model: PreTrainedModel, bits: Bits) -> None:
    """Quantises the linear layers of a model's blocks and freezes the model."""
    quantised.quantise(model, sharding.blocks(model), bits)


def _freeze(
    model: PreTrainedModel, trained_blocks: int | None, lora: LoRA | None, bits: Bits | None, seed: int
) -> None:
    """Freezes what shall not learn, and adds what shall learn in its place."""
    if lora is not None:
        blocks = None if trained_blocks is None else hydra.last_blocks(model, trained_blocks)
        adapters.add(model, lora, seed=seed, blocks=blocks)
    elif trained_blocks is not None and bits is not None:
        raise ValueError(
            f"trained_blocks: got {trained_blocks} beside quantise, which freezes all weights already; add lora, of "
            "which the last blocks then get updates, or leave out one of the two"
        )
    elif trained_blocks is not None:
        hydra.freeze(model, trained_blocks)


def _ready(model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    if not deferred.wanted():
        deferred.fill(model, torch.device("cpu"))
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # It makes the embeddings' output need gradients, for reentrant checkpoints; frozen blocks would compute them.
        model.disable_input_require_grads()
    use_products(model)
    return model.train()


def _dropout_hook(probability: float) -> Any:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        first = output[0] if isinstance(output, tuple) else output
        dropped = nn.functional.dropout(first, probability)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    return hook
