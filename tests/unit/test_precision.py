"""What `trainer.precision: auto` means."""

import pytest
import torch

from align.precision import fastest, multiplies_bfloat16


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_gets_bfloat16_where_it_multiplies_it(monkeypatch: pytest.MonkeyPatch, able: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert fastest("gpu") == fastest("auto") == expected


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_gets_bfloat16_where_it_multiplies_it(monkeypatch: pytest.MonkeyPatch, able: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: able, raising=False)
    assert fastest("auto") == fastest("cpu") == expected
    assert fastest("mps") == "32-true"


@pytest.mark.parametrize("able", [True, False])
def test_torch_says_whether_a_cpu_has_matrix_units(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: able, raising=False)
    assert multiplies_bfloat16() is able


def test_a_torch_that_does_not_tell_has_no_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert multiplies_bfloat16() is False
