"""The properties that every weight node and every pass must have, and the example rows on which they are checked.

A node class without a row fails `test_every_node_has_a_row`; a pass gets its rows by being registered. This file is
loaded by path (`test_conformance.py`), because tests is not a package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.passes import PASSES, RPCA, LoRA, Pass, Quantizer
from compress.runtime.lower import lower
from compress.runtime.packed import LINEAR, way
from compress.weights import (
    BOOKS,
    Codebook,
    Dense,
    Diagonal,
    External,
    Grid,
    Hadamard,
    Masked,
    Nested,
    Permutation,
    Product,
    Quantized,
    Scaled,
    Signs,
    Sum,
    Weight,
    check_claims,
    pack,
    pattern,
    specify,
    unpack,
)  # fmt: skip
from compress.weights.chance import regenerated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Close = Callable[[str, Tensor, Tensor, float], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A named weight expression, which is created anew for each test."""

    name: str
    make: Callable[[], Weight]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int) -> Tensor:
    """Uniform integers below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def quantized(bits: int, group: int, symmetric: bool, rows: int = 7, columns: int = 24) -> Quantized:
    """A quantized matrix of standard normal numbers."""
    return Grid(bits=bits, group=group, symmetric=symmetric).quantize(normal(rows, columns))


def mask(sparsity: float | str, rows: int = 7, columns: int = 24) -> Tensor:
    """A mask from random scores, which are independent of the values that it is applied to."""
    return pattern(sparsity).keep(normal(rows, columns, seed=9))


def by_name(values: Weight) -> Masked:
    """Values under a random mask that is regenerated from its name."""
    mask_OI = regenerated("rand0.3@5", values.shape, torch.device("cpu"))
    assert mask_OI is not None
    return Masked(values, mask_OI, "rand0.3@5")


def codebook(entries: int, width: int, scales: int = 1) -> Codebook:
    """A codebook with random entries and codes, for a matrix [5, 3 * width]."""
    return Codebook(integers(entries, 5, 3), normal(entries, width), Dense(normal(scales, 1).abs() + 0.5))


def table(name: str, scale: Weight, columns: int = 24) -> Codebook:
    """Random codes of a 4-bit format's table."""
    return Codebook(integers(16, 7, columns), BOOKS[name], scale, name)


def lattice(name: str, bits: int) -> Codebook:
    """Random codes of a lattice's points, with one scale per row."""
    return Codebook(integers(2**bits, 7, 3), BOOKS[name], Dense(normal(7, 1).half()), name)


def small(dtype: torch.dtype, *tile: int, rows: int = 7, columns: int = 24) -> Scaled:
    """Random float8 values, with one scale per tile."""
    scale = normal(-(-rows // tile[0]), -(-columns // tile[1])).abs() + 0.5
    return Scaled(normal(rows, columns).to(dtype), scale, *tile)


def nested(rows: int = 7, columns: int = 43) -> Nested:
    """Nested scales with random codes in two blocks, the second of which is not full."""
    return Nested(integers(256, rows, columns).to(torch.uint8), normal(2).abs(), normal(1))


def grid_rows() -> Iterator[Row]:
    """Every bit width with every span, symmetric and asymmetric, unmasked and under both kinds of mask."""
    for bits in range(2, 9):
        for symmetric in (False, True):
            for span, group in (("group", 8), ("row", 0), ("tensor", -1)):
                kind = f"int{bits}-{span}-{'sym' if symmetric else 'asym'}"
                args = (bits, group, symmetric)
                yield Row(name=kind, make=lambda a=args: quantized(*a))
                yield Row(name=f"2:4-{kind}", make=lambda a=args: Masked(quantized(*a), mask("2:4"), "2:4"))
                yield Row(name=f"50%-{kind}", make=lambda a=args: Masked(quantized(*a), mask(0.5), "50%"))


def other_rows() -> Iterator[Row]:
    """The other leaves and the nested expressions that methods use; sizes are odd where the node allows."""
    yield Row(name="dense", make=lambda: Dense(normal(7, 13)))
    yield Row(name="dense-bf16", make=lambda: Dense(normal(7, 13).bfloat16()))
    yield Row(name="dense-one-by-one", make=lambda: Dense(normal(1, 1)))
    yield Row(name="masked-dense-2:4", make=lambda: Masked(Dense(normal(7, 24)), mask("2:4"), "2:4"))
    yield Row(name="masked-dense-50%", make=lambda: Masked(Dense(normal(7, 13)), mask(0.5, 7, 13), "50%"))
    yield Row(name="masked-dense-bf16", make=lambda: Masked(Dense(normal(7, 24).bfloat16()), mask("2:4"), "2:4"))
    yield Row(name="masked-90%", make=lambda: Masked(Dense(normal(7, 96)), mask(0.9, 7, 96), "90%"))
    yield Row(name="masked-by-name", make=lambda: by_name(Dense(normal(7, 24))))
    yield Row(name="masked-by-name-int4", make=lambda: by_name(quantized(4, 8, False)))
    yield Row(name="masked-all", make=lambda: Masked(Dense(normal(3, 5)), torch.zeros(3, 5, dtype=torch.bool), "100%"))
    yield Row(name="signs-row", make=lambda: Signs(normal(7, 13) > 0, normal(7, 1).abs()))
    yield Row(name="signs-matrix", make=lambda: Signs(normal(7, 13) > 0, normal(1, 1).abs()))
    yield Row(name="masked-signs", make=lambda: Masked(Signs(normal(7, 24) > 0, normal(7, 1)), mask("2:4"), "2:4"))
    yield Row(name="codebook-16", make=lambda: codebook(16, 1, scales=5))
    yield Row(name="codebook-256", make=lambda: codebook(256, 8))
    yield Row(name="codebook-4096", make=lambda: codebook(4096, 4, scales=5))
    yield Row(name="codebook-100", make=lambda: codebook(100, 3))
    yield Row(name="e8p", make=lambda: lattice("e8p", 16))
    yield Row(name="e8p-rotated", make=lambda: lattice("e8p", 16) @ Hadamard(normal(24) > 0))
    yield Row(name="e8p-3-bit", make=lambda: lattice("e8p", 16) + lattice("e8", 8))
    yield Row(name="e8p-4-bit", make=lambda: (lattice("e8p", 16) + lattice("e8p", 16)) @ Hadamard(normal(24) > 0))
    yield Row(name="masked-e8", make=lambda: Masked(lattice("e8", 8), mask(0.5), "50%"))
    yield Row(name="real-zero", make=lambda: replace(quantized(4, 8, False), zero=normal(7, 3).half()))
    yield Row(
        name="masked-real-zero",
        make=lambda: Masked(replace(quantized(3, 8, False), zero=normal(7, 3).half()), mask("2:4"), "2:4"),
    )
    yield Row(name="nf4", make=lambda: table("nf4", Dense(normal(7, 3))))
    yield Row(name="masked-nf4", make=lambda: Masked(table("nf4", Dense(normal(7, 3))), mask("2:4"), "2:4"))
    yield Row(name="nested", make=nested)
    yield Row(name="masked-nested", make=lambda: Masked(nested(), mask(0.5, 7, 43), "50%"))
    yield Row(
        name="nf4-double",
        make=lambda: table("nf4", Nested(integers(256, 7, 3).to(torch.uint8), normal(1).abs(), normal(1))),
    )
    yield Row(name="mxfp4", make=lambda: table("mxfp4", Dense(normal(7, 3).exp().to(torch.float8_e8m0fnu))))
    yield Row(name="nvfp4", make=lambda: table("nvfp4", small(torch.float8_e4m3fn, 7, 3, columns=3)))
    yield Row(name="e4m3-row", make=lambda: small(torch.float8_e4m3fn, 1, 24))
    yield Row(name="e5m2-tile", make=lambda: small(torch.float8_e5m2, 4, 16))
    yield Row(name="masked-e4m3", make=lambda: Masked(small(torch.float8_e4m3fn, 1, 24), mask(0.5), "50%"))
    yield Row(name="diagonal", make=lambda: Diagonal(normal(13)))
    yield Row(name="permutation", make=lambda: Permutation(normal(13).argsort()))
    yield Row(name="hadamard-48", make=lambda: Hadamard(normal(48) > 0))
    yield Row(name="hadamard-256", make=lambda: Hadamard(normal(256) > 0))
    yield Row(name="hadamard-odd", make=lambda: Hadamard(normal(13) > 0))
    yield Row(name="low-rank", make=lambda: Dense(normal(33, 3)) @ Dense(normal(3, 24)))
    yield Row(name="awq", make=lambda: quantized(4, 8, False) @ Diagonal(normal(24).exp()))
    yield Row(name="act-order", make=lambda: quantized(4, 8, True) @ Permutation(normal(24).argsort()))
    yield Row(name="rotated", make=lambda: quantized(3, 0, False, 7, 48) @ Hadamard(normal(48) > 0))
    yield Row(name="quantized-factors", make=lambda: quantized(8, 0, True, 33, 8) @ quantized(4, 8, False, 8, 24))
    yield Row(name="oats", make=lambda: Masked(Dense(normal(33, 24)), mask(0.5, 33, 24), "50%") + low_rank(33, 24))
    yield Row(name="slim", make=lambda: Masked(quantized(4, 8, False, 33), mask("2:4", 33), "2:4") + low_rank(33, 24))
    yield Row(name="three-terms", make=lambda: Sum((Dense(normal(7, 24)), quantized(2, 8, False), low_rank(7, 24))))
    yield Row(name="bitdelta", make=lambda: base() + Signs(normal(7, 13, seed=4) > 0, normal(1, 1).abs()))
    yield Row(name="masked-sum", make=lambda: Masked(Dense(normal(7, 24)) + low_rank(7, 24), mask(0.5), "50%"))
    yield Row(name="masked-codebook", make=lambda: Masked(codebook(16, 8), mask(0.5, 5, 24), "50%"))
    yield Row(
        name="masked-twice", make=lambda: Masked(Masked(Dense(normal(7, 24)), mask(0.5), "50%"), mask("2:4"), "2:4")
    )
    yield Row(name="cpu-int4", make=lambda: quantized(4, 64, False, 1024, 1024))
    yield Row(name="cpu-int4-sym", make=lambda: quantized(4, 128, True, 1024, 1024))
    yield Row(name="cpu-int8", make=lambda: quantized(8, 0, True, 1024, 1024))


def mixed_rows() -> Iterator[Row]:
    """Products whose factors have two dtypes, such as a rotation or a permutation of a bf16 weight."""
    yield Row(name="rotated", make=lambda: Dense(normal(7, 48).bfloat16()) @ Hadamard(normal(48) > 0))
    yield Row(name="permuted", make=lambda: Dense(normal(7, 13).bfloat16()) @ Permutation(normal(13).argsort()))
    yield Row(name="factor", make=lambda: Dense(normal(33, 8).bfloat16()) @ quantized(4, 8, False, 8, 24))


def low_rank(rows: int, columns: int) -> Product:
    """Two small dense factors."""
    return Product(Dense(normal(rows, 3)), Dense(normal(3, columns)))


def base() -> External:
    """A tensor of another model."""
    return External(normal(7, 13, seed=21), "some/base", "model.layers.0.proj.weight")


def resolve(source: str, tensor: str) -> Tensor:
    """The base's tensor by name, as a loader would find it."""
    assert (source, tensor) == ("some/base", "model.layers.0.proj.weight")
    return base().data


ROWS = (*grid_rows(), *other_rows())
MIXED = tuple(mixed_rows())


def nodes(weight: Weight) -> Iterator[Weight]:
    """The expression and all its subexpressions."""
    yield weight
    for child in weight.children():
        yield from nodes(child)


# -- promises of every node ------------------------------------------------------------------------


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Relative RMS error of a product in `dtype`.

    Rounding the weight, the input of a second factor and the output costs at most eps / 2 each, and a low-precision
    lowering also rounds its scales: 4 eps in all. Accumulation in float32 adds sqrt(length) times the eps of float32.
    """
    return 4 * torch.finfo(dtype).eps + length**0.5 * torch.finfo(torch.float32).eps


def keeps_its_shape(weight: Weight) -> None:
    """`shape` is that of `dense()`."""
    assert tuple(weight.dense().shape) == weight.shape


def applies_its_matrix(weight: Weight, x_TI: Tensor, close: Close) -> None:
    """`linear(x)` is `x @ dense().T`, in the dtype of x, for any leading shape."""
    want = x_TI.double() @ weight.dense().double().T
    got = weight.linear(x_TI)
    assert got.dtype == x_TI.dtype
    close("linear", got, want, tolerance(x_TI.dtype, weight.shape[1]))
    stacked = weight.linear(x_TI.unflatten(0, (1, -1)))[0]
    close("linear of a batch", stacked, got, tolerance(x_TI.dtype, weight.shape[1]))


def lowers_to_itself(weight: Weight, x_TI: Tensor, close: Close) -> None:
    """The lowered module computes what `linear` computes."""
    got = lower(weight, x_TI.dtype)(x_TI)
    assert got.dtype == x_TI.dtype
    close("lowered", got, weight.linear(x_TI), tolerance(x_TI.dtype, weight.shape[1]))


def stays_packed_or_says_why(weight: Weight, close: Close) -> None:
    """The packed form for a GPU computes what `linear` does, by its op's reference; without one, a reason is given."""
    x_TI = normal(5, weight.shape[1], seed=8).half()
    found = way(weight, x_TI.dtype, lean=True)
    if found.form is None:
        assert found.problem
        return
    got = LINEAR[type(found.form)](found.form, x_TI, None)
    close("packed", got, weight.linear(x_TI), tolerance(x_TI.dtype, weight.shape[1]))


def survives_packing(weight: Weight) -> None:
    """Packing, specifying as JSON and unpacking give an equal matrix, and equal bytes and text when packed again."""
    packed, text = pack(weight), json.dumps(specify(weight))
    check_claims(json.loads(text), weight.shape)
    again = unpack(json.loads(text), packed, resolve=resolve)
    assert again.shape == weight.shape
    assert again.describe() == weight.describe()
    torch.testing.assert_close(again.dense(), weight.dense(), rtol=0, atol=0)
    assert json.dumps(specify(again)) == text
    assert as_bytes(pack(again)) == as_bytes(packed)


def weighs_what_its_file_weighs(weight: Weight, folder: Path) -> None:
    """`nbytes` is the size of the data section of a safetensors file with exactly the packed tensors."""
    path = folder / "packed.safetensors"
    save_file({key: value.contiguous() for key, value in pack(weight).items()}, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert weight.nbytes() == path.stat().st_size - 8 - header


def has_a_name(weight: Weight) -> None:
    """`describe` gives one non-empty line."""
    assert weight.describe()
    assert "\n" not in weight.describe()


def as_bytes(packed: dict[str, Tensor]) -> dict[str, tuple[str, bytes]]:
    """Comparable content of packed tensors."""
    return {
        key: (f"{t.dtype}{list(t.shape)}", t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for key, t in packed.items()
    }


# -- rows of every pass ----------------------------------------------------------------------------

QUANTIZERS = tuple(name for name, kind in PASSES.items() if issubclass(kind, Quantizer))
MASKED = tuple(name for name in QUANTIZERS if "pruned" in PASSES[name]().takes)
EXACT_ZERO = tuple(name for name in MASKED if name not in ("hqq", "bitdelta"))  # real zero points; no zero
WIDTH = 128  # the default group of 64 must divide it


def pass_weight() -> Tensor:
    """A weight with an odd number of outputs."""
    return normal(33, WIDTH)


def split_weight() -> Tensor:
    """A weight of rank 2 plus a few large entries, so that a sparse plus low-rank split can recover it."""
    return normal(33, 2) @ normal(2, WIDTH, seed=5) + 5 * normal(33, WIDTH, seed=6) * (normal(33, WIDTH, seed=7) > 2)


def adapter_weight() -> Tensor:
    """A weight of rank 2, rounded once."""
    return (normal(33, 2).double() @ normal(2, WIDTH, seed=5).double()).float()


def weight_for(step: Pass) -> Tensor:
    """A weight that a pass can rewrite: of low rank where that is all that it rewrites."""
    match step:
        case RPCA():
            return split_weight()
        case LoRA():
            return adapter_weight()
        case _:
            return pass_weight()


def pass_tokens(count: int = 300) -> Tensor:
    """Correlated inputs whose channels have different magnitudes."""
    mixing = torch.eye(WIDTH) + 0.5 * normal(WIDTH, WIDTH, seed=1) / WIDTH**0.5
    return normal(count, WIDTH, seed=2) @ mixing * normal(WIDTH, seed=3).exp()
