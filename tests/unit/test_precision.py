"""What `trainer.precision: auto` means."""

import pytest
import torch

from align.precision import fastest


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_gets_bfloat16_where_it_multiplies_it(monkeypatch: pytest.MonkeyPatch, able: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert fastest("gpu") == fastest("auto") == expected
    assert fastest("cpu") == "32-true"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_everything_else_gets_float32() -> None:
    assert fastest("auto") == fastest("cpu") == fastest("mps") == "32-true"
