"""What `trainer.precision: auto` means."""

import pytest
import torch

from align.precision import fastest, multiplies_bfloat16


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_gets_bfloat16_where_it_multiplies_it(monkeypatch: pytest.MonkeyPatch, able: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert fastest("gpu") == fastest("auto") == expected


UNITS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def a_cpu_with(monkeypatch: pytest.MonkeyPatch, *units: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in UNITS:
        monkeypatch.setattr(torch.cpu, name, lambda able=name in units: able, raising=False)


@pytest.mark.parametrize("unit", UNITS)
def test_a_cpu_gets_bfloat16_where_it_has_units_for_it(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    a_cpu_with(monkeypatch, unit)
    assert fastest("auto") == fastest("cpu") == "bf16-mixed" and multiplies_bfloat16() is True
    assert fastest("mps") == "32-true"


def test_a_cpu_without_units_for_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cpu_with(monkeypatch)
    assert fastest("auto") == fastest("cpu") == "32-true" and multiplies_bfloat16() is False


def test_a_torch_that_does_not_tell_has_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UNITS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert multiplies_bfloat16() is False
