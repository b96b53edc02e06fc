"""What `trainer.precision: auto` means, by what the processor says it can."""

import pytest
import torch

from align.precision import fastest


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": False}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_bfloat16_only_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert fastest("cpu") == expected


def test_an_unknown_accelerator_gets_float32() -> None:
    assert fastest("mps") == "32-true"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert fastest("auto") == fastest("cpu")
