"""One torch thread, a fixed seed, and jaxtyping's shape checks on for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ALIGN_PRODUCTS"] = "torch"  # on every CPU; tests/unit/models/test_products.py has the other library

from jaxtyping import install_import_hook

install_import_hook("align", "beartype.beartype")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
