"""Products with unstructured pruned weights: packing, kernels and ops against float64 on the masked matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_kernels import bitmap, dispatch, low_rank

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # interpreted
Close = Callable[[str, Tensor, Tensor, float], None]
RATIO = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # of outputs rounded once
OUT, IN = 70, 600  # ragged rows, and a block that reaches beyond


def weight(kept: float = 0.5, dtype: torch.dtype = torch.float16) -> tuple[bitmap.Packed, Tensor]:
    """A packed weight and its matrix: one row keeps nothing, one all, some kept values are 0."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(OUT, IN, generator=generator).to(dtype)
    values[:, ::7] = 0
    mask = torch.rand(OUT, IN, generator=generator) < kept
    mask[3], mask[4] = False, True
    return bitmap.pack(values, mask), values.double().masked_fill(~mask, 0)


def inputs_of(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


def moved(packed: bitmap.Packed, device: torch.device) -> bitmap.Packed:
    return replace(packed, **{k: t.to(device) for k, t in vars(packed).items() if isinstance(t, Tensor)})


def multiplied(
    packed: bitmap.Packed, x: Tensor, bias: Tensor | None, device: torch.device, rows: int, splits: int
) -> Tensor:
    from compress_kernels.gpu import bitmap as gpu
    from compress_kernels.gpu import launch

    config = launch.Config(rows=rows, outputs=64, splits=splits)
    return gpu.linear(x.to(device), moved(packed, device), None if bias is None else bias.to(device), config).cpu()


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 1.0])
def test_reference_is_the_masked_matrix(kept: float) -> None:
    packed, want = weight(kept)
    assert torch.equal(bitmap.reference(packed).double(), want)


def test_half_costs_little_more_than_nine_bits_a_weight() -> None:
    mask = torch.arange(512).expand(64, 512) % 2 == 0
    packed = bitmap.pack(torch.ones(64, 512).half(), mask)
    assert packed.nbytes * 8 == (8 + 1 + 32 / 512) * 64 * 512


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"values are torch\.float32"):
        bitmap.pack(torch.zeros(2, 2), torch.zeros(2, 2).bool())
    with pytest.raises(ValueError, match="mask is"):
        bitmap.pack(torch.zeros(2, 2).half(), torch.zeros(2, 3).bool())


@pytest.mark.parametrize(
    ("rows", "tile", "splits", "dtype"),
    [(1, 8, 3, torch.float16), (5, 8, 1, torch.bfloat16), (16, 16, 2, torch.float16), (17, 16, 1, torch.bfloat16),
     (65, 64, 1, torch.float16)],
)  # fmt: skip
def test_kernel(
    rows: int, tile: int, splits: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    packed, want = weight(0.5, dtype)
    x, bias = inputs_of(rows, IN, dtype), inputs_of(1, OUT, dtype)[0]

    got = multiplied(packed, x, bias, device, tile, splits)

    assert_close("bitmap", got, x.double() @ want.T + bias.double(), RATIO[dtype])


def test_split_inputs_give_the_same_bits(device: torch.device) -> None:
    packed, _ = weight()
    x = inputs_of(3, IN, torch.float16)

    runs = [multiplied(packed, x, None, device, 8, 2) for _ in range(2)]

    assert torch.equal(*runs)


@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_dense_kernel(kept: float, device: torch.device) -> None:
    from compress_kernels.gpu import bitmap as gpu

    packed, want = weight(kept)

    assert torch.equal(gpu.dense(moved(packed, device)).cpu().double(), want)


@pytest.mark.parametrize("rows", [2, 5])
def test_few_rows_and_many_rows_agree(
    rows: int, device: torch.device, assert_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_kernels.gpu import bitmap as gpu

    monkeypatch.setattr(dispatch, "BITMAP_DENSE_ABOVE", 4)
    packed, want = weight()
    u, v = inputs_of(OUT, 5, torch.float16), inputs_of(5, IN, torch.float16)
    packed = bitmap.with_low_rank(packed, u, v)
    x = inputs_of(rows, IN, torch.float16)

    got = gpu.product(x[None].to(device), moved(packed, device), None)[0].cpu()

    assert_close("bitmap", got, x.double() @ (want + u.double() @ v.double()).T, 2 * RATIO[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float32, *RATIO])
def test_op_on_the_cpu(dtype: torch.dtype, assert_close: Close) -> None:
    packed, want = weight()
    x = inputs_of(6, IN, dtype).view(2, 3, IN)

    assert_close("op", bitmap.linear(packed, x), x.double() @ want.T, 2 * RATIO.get(dtype, 1e-6))
    assert torch.equal(bitmap.dense(packed).double(), want)


def test_ops_are_registered_correctly() -> None:
    p, _ = weight()
    x = inputs_of(3, IN, torch.float32).requires_grad_()

    torch.library.opcheck(bitmap.bitmap_linear, (x, p.bits, p.offsets, p.values, None, None, torch.zeros(OUT), OUT))
    torch.library.opcheck(bitmap.bitmap_dense, (p.bits, p.offsets, p.values, OUT, IN))


def test_gradients_are_those_of_the_dense_product(assert_close: Close) -> None:
    packed, want = weight()
    u, v = low_rank.pack(inputs_of(OUT, 16, torch.float64), inputs_of(16, IN, torch.float64))
    x, bias = inputs_of(4, IN, torch.float64).view(2, 2, IN), torch.zeros(OUT, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, packed.values, u, v, bias)]
    kept = bitmap.unpack_mask(packed)
    other = [leaf.detach().clone().requires_grad_() for leaf in (x, want, u, v, bias)]

    bitmap.linear(replace(packed, u=u, v=v), x, bias).square().sum().backward()
    (other[0] @ (other[1] + other[2] @ other[3]).T + other[4]).square().sum().backward()

    grads = [leaf.grad for leaf in other if leaf.grad is not None]
    grads[1] = grads[1][kept]
    for name, leaf, grad in zip(("x", "values", "u", "v", "bias"), leaves, grads, strict=True):
        assert leaf.grad is not None
        assert_close(name, leaf.grad, grad, 1e-3 if name == "values" else 1e-6)  # values are float16


def test_op_compiles_whole(assert_close: Close) -> None:
    packed, _ = weight()
    x = inputs_of(3, IN, torch.float32)

    got = torch.compile(lambda x: bitmap.linear(packed, x) + 1, fullgraph=True, backend="aot_eager")(x)

    assert_close("compiled", got, bitmap.linear(packed, x) + 1, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 512)}, "bits is torch.int32 of shape"),
        ({"x": torch.zeros(3, IN, dtype=torch.int32)}, "x is torch.int32"),
        ({"bits": torch.zeros(3, 16, 128)}, "bits is torch.float32"),
        ({"offsets": torch.zeros(3, 64, dtype=torch.int32)}, "offsets is torch.int32 of shape"),
        ({"values": torch.zeros(4)}, "values is torch.float32"),
        ({"u": torch.zeros(OUT, 16)}, "u and v must be given together"),
        ({"bias": torch.zeros(1)}, "bias is torch.float32 of shape"),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    p, _ = weight()
    right = {"x": torch.zeros(3, IN), "bits": p.bits, "offsets": p.offsets, "values": p.values, "u": None, "v": None,
             "bias": None, "out": OUT}  # fmt: skip

    with pytest.raises((ValueError, TypeError), match=message):
        bitmap.bitmap_linear(**(right | change))
