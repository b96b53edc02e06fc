"""Fixtures of the data tests: two tokenizers of one token a word."""

import pytest
from transformers import PreTrainedTokenizerFast
from word_tokenizer import make_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Without BOS, with a chat template."""
    return make_tokenizer()


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """With BOS, without a chat template."""
    return make_tokenizer(bos=True, chat=None)
