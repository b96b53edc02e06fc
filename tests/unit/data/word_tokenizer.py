"""What the data tests share: a tokenizer small enough to tokenise by hand, one token a word."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start>", "<end>", "user", "assistant", *"abcdefgh"]
"""Ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, <start> 4, <end> 5, user 6, assistant 7, a 8, b 9, c 10, ... h 15."""

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
"""Arguments of a Trainer that only trains."""

CHAT = (
    "{% for m in messages %}<start> {{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)


def make_tokenizer(words: list[str] = WORDS, bos: bool = False, chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A word tokenizer; with `bos` it starts a text with <bos>."""
    words = list(words)
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<start>", "<end>"],
    )
    tokenizer.chat_template = chat
    return tokenizer
