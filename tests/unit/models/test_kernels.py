"""The kernel for tokens that are being written, by Triton's interpreter; tests marked `gpu` have it compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(4, 4, 32), (8, 2, 24), (6, 2, 16), (32, 8, 64), (16, 16, 128)]
"""Heads of queries and of keys, and numbers of each."""

TRITON = Path(__file__).resolve().parents[3] / ".triton"

HELD, GROWING = [0, 3, 64, 199, 130], [1, 1, 1, 1, 0]
ROOM, SCALING = [5, 40, 65, 200, 131], 0.3


def check(heads: int, shared: int, size: int, dtype: torch.dtype, device: str) -> None:
    """The kernel against torch's attention, row by row."""
    from align.models import kernels

    def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    generator, rows = torch.Generator().manual_seed(heads), len(HELD)
    query, key = drawn(heads, rows, size, dtype=torch.float32).transpose(0, 1), drawn(rows, size, shared).mT
    value, keys, values = drawn(rows, shared, size), drawn(sum(ROOM), shared, size), drawn(sum(ROOM), shared, size)
    held, growing = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (HELD, GROWING))
    starts = torch.tensor(ROOM, device=device).cumsum(0) - torch.tensor(ROOM, device=device)
    wanted_keys, wanted_values = (part.index_put((starts + held,), new) for part, new in ((keys, key), (values, value)))
    wanted = []
    for row, (start, count) in enumerate(zip(starts.tolist(), HELD, strict=True)):
        seen = (part[start : start + count + 1].float().transpose(0, 1) for part in (wanted_keys, wanted_values))
        asked = query[row].to(dtype).float()[:, None]
        wanted.append(attention(asked, *seen, enable_gqa=True, scale=SCALING)[:, 0])
    found = kernels.attend_to_kept(query, key, value, keys, values, starts, held, growing, SCALING)
    assert found.dtype == dtype and torch.equal(keys, wanted_keys) and torch.equal(values, wanted_values)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[:4].float(), torch.stack(wanted[:4]), rtol=rounding, atol=rounding)


def test_the_kernel_interpreted() -> None:
    """In a process of its own, as Triton asks once whether to interpret. In float16: it cannot interpret bfloat16."""
    if not (TRITON / "triton").exists():
        pytest.skip("needs Triton in .triton, which `make test` installs")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(TRITON)])}
    subprocess.run([sys.executable, Path(__file__)], check=True, env=environment)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize(("heads", "shared", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_compiled(heads: int, shared: int, size: int, dtype: torch.dtype) -> None:
    check(heads, shared, size, dtype, "cuda")


if __name__ == "__main__":
    from align.models import kernels

    for shape in SHAPES[:3]:
        check(*shape, torch.float16, "cpu")
    assert kernels.works(2, 24, torch.float16, torch.device("cpu"))
    kernels.ROUNDING = 1e-6
    assert not kernels.works(2, 24, torch.float16, torch.device("cpu"))
