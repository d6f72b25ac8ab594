"""Forms that stay packed on a GPU: each against its expression, by the ops' reference, and moved with its module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import compress
from compress import Calibration, Dense, Grid, Masked, Product, Quantized, Sum, Weight, pattern
from compress.runtime import lower as lowering
from compress.runtime.explain import explain
from compress.runtime.linear import CompressedLinear
from compress.runtime.lower import lower
from compress.runtime.maps import Packed, Transformed, path
from compress.runtime.packed import packed, way
from compress.weights import NM, Codebook, Diagonal, Hadamard, Permutation, Scaled, Signs, rounded_for
from compress.weights.leaves import BOOKS

Close = Callable[[str, Tensor, Tensor, float], None]
OUT, IN = 120, 512
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def int4_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with symmetric int4 weights."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    passes = [compress.RTN(bits=4, group=64, symmetric=True)]
    return compress.run("builtin", passes, folder, calibration=Calibration(samples=4, length=32)).out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a GPU; ops then compute by their reference, since tensors are on the CPU."""
    monkeypatch.setattr(lowering, "on_gpu", lambda weight: True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(bits: int, group: int = 0, symmetric: bool = True) -> Weight:
    return Grid(bits=bits, group=group or IN, symmetric=symmetric).quantize(normal(OUT, IN))


def masked(values: Weight, sparsity: str) -> Weight:
    kept = pattern(sparsity if ":" in sparsity else float(sparsity)).keep(values.dense().abs())
    return Masked(values, kept, sparsity)


def e4m3(scale: Tensor, rows: int) -> Weight:
    return Scaled(normal(OUT, IN).to(torch.float8_e4m3fn), scale, rows, IN)


def nf4() -> Weight:
    codes = torch.randint(16, (OUT, IN), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    return Codebook(codes, BOOKS["nf4"], Dense(normal(OUT, IN // 64).abs()), "nf4")


def thin(rank: int) -> Weight:
    return Product(Dense(normal(OUT, rank, seed=7) / 8), Dense(normal(rank, IN, seed=8) / 8))


DENSE = Dense(normal(OUT, IN))
FORMS: dict[str, Weight] = {
    **{f"int{bits}": quantized(bits) for bits in (2, 3, 4, 8)},
    "int4g64": quantized(4, 64),
    "int3g128": quantized(3, 128),
    "int4g64 with zeros": quantized(4, 64, symmetric=False),
    "e4m3": e4m3(normal(OUT, 1).abs() + 0.1, 1),
    "e4m3 tensor": e4m3(torch.full((1, 1), 0.3), OUT),
    "nf4": nf4(),
    "2:4": masked(DENSE, "2:4"),
    "1:4": masked(DENSE, "1:4"),
    "2:8 random": Masked(DENSE, NM(n=2, m=8).keep(normal(OUT, IN, seed=9)), "2:8@seed"),
    "2:4 int4g64": masked(quantized(4, 64), "2:4"),
    "2:4 int3g64": masked(quantized(3, 64), "2:4"),
    "2:4 int4g64 with zeros": masked(quantized(4, 64, symmetric=False), "2:4"),
    "int4g64 + r20": quantized(4, 64) + thin(20),
    "2:4 + r20 + r3": Sum((masked(DENSE, "2:4"), thin(20), thin(3))),
}
TRANSFORMS = {
    "diagonal": Diagonal(normal(IN, seed=3).abs() + 0.5),
    "permutation": Permutation(torch.randperm(IN, generator=torch.Generator().manual_seed(4))),
    "rotation": Hadamard(normal(IN, seed=5) > 0),
}


def error(got: Tensor, weight: Weight, x: Tensor) -> float:
    want = x.double() @ weight.dense().double().T
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", FORMS)
def test_a_packed_form_computes_its_expression(gpu: None, form: str, dtype: torch.dtype) -> None:
    x = normal(2, 3, IN, seed=1).to(dtype)

    module = packed(FORMS[form], dtype, lean=True)  # also what is slower than the decoded matrix

    assert isinstance(module, Packed)
    assert error(module(x), FORMS[form], x) < 3 * torch.finfo(dtype).eps  # of the matrix, the factors, the output
    bias = normal(OUT, seed=2).to(dtype)
    torch.testing.assert_close(module(x, bias), module(x) + bias, rtol=0.02, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int4g64", "2:4", "int4g64 + r20"])
def test_a_packed_module_compiles_whole(gpu: None, form: str) -> None:
    module = lower(FORMS[form], torch.float16)
    x = normal(3, IN, seed=1).half()

    got = torch.compile(module, fullgraph=True, backend="aot_eager")(x)

    torch.testing.assert_close(got, module(x))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_the_input_comes_before(gpu: None, transform: str) -> None:
    weight = Product(FORMS["int4g64"], TRANSFORMS[transform])
    x = normal(3, IN, seed=1).half()

    module = lower(weight, torch.float16)

    assert error(module(x), weight, x) < 2e-3
    if transform == "permutation":  # the kernel's preparation of x gathers
        assert isinstance(module, Packed)
    else:
        assert isinstance(module, Transformed) and isinstance(module.then, Packed)
        assert path(module, 1) == f"{TRANSFORMS[transform].describe()}, packed int4g64s"


def test_an_order_before_a_mask_is_a_gather(gpu: None) -> None:
    weight = Product(FORMS["2:4"], TRANSFORMS["permutation"])
    x = normal(3, IN, seed=1).half()

    module = lower(weight, torch.float16)

    assert isinstance(module, Transformed) and isinstance(module.then, Packed)
    assert error(module(x), weight, x) < 2e-3


ROUNDED = {
    ("int8", "int8"): quantized(8),
    ("int4 row", "int8"): quantized(4),
    ("2:4 int8", "int8"): masked(quantized(8), "2:4"),
    ("e4m3", "fp8"): FORMS["e4m3"],
}


@pytest.mark.parametrize(("form", "inputs"), ROUNDED)
@pytest.mark.parametrize("transform", ["", "diagonal", "rotation"])
def test_rounded_inputs_times_eight_bits(gpu: None, form: str, inputs: str, transform: str) -> None:
    weight = ROUNDED[form, inputs]
    weight = Product(weight, TRANSFORMS[transform]) if transform else weight
    x = normal(2, 3, IN, seed=1)

    module = lower(weight, torch.float32, inputs)

    assert isinstance(module, Transformed if transform else Packed)
    want = weight.linear(rounded_for(weight, x, inputs).double()).float()
    assert float((module(x) - want).norm() / want.norm()) < 1e-5
    assert not isinstance(lower(weight, torch.float32, inputs, floats=True), (Packed, Transformed))


def test_tensors_move_with_the_module_and_are_never_cast() -> None:
    module = packed(FORMS["int4g64"], torch.float16)
    assert module is not None

    moved = module.to("meta").to(torch.float64)

    assert moved.form.words.is_meta and moved.form.words.dtype == torch.int16
    assert moved.form.scale.is_meta and moved.form.scale.dtype == torch.float16


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (DENSE, "there is no kernel for dense"),
        (quantized(5), "weights of form int5"),
        (Quantized(torch.zeros(OUT, 400, dtype=torch.uint8), torch.ones(OUT, 10), None, 4), "groups of 40"),
        (Quantized(torch.zeros(OUT, 400, dtype=torch.uint8), torch.ones(OUT, 50), None, 4), "groups of 8"),
        (masked(quantized(4, 64), "0.5"), "there is no kernel for int4g64s pruned anywhere"),
        (masked(DENSE, "0.5"), "times as fast as the decoded matrix; low memory keeps it packed"),
        (quantized(4, 64) + quantized(4, 64), "there is no kernel for int4g64s + int4g64s"),
        (DENSE + thin(20), "there is no kernel for dense"),
        (quantized(4, 64) + thin(110), "times as fast as the decoded matrix"),
        (Signs(normal(OUT, IN) > 0, torch.ones(1, 1)), "there is no kernel for sign"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_kernel_is_decoded_and_says_why(gpu: None, weight: Weight, problem: str) -> None:
    assert problem in way(weight, torch.float16).problem
    assert not isinstance(lower(weight, torch.float16), Packed)


def test_floats_of_32_bits_are_decoded(gpu: None) -> None:
    assert "torch.float32" in way(FORMS["int4"], torch.float32).problem
    assert packed(FORMS["int4"], torch.float32) is None


def test_where_memory_comes_first_a_slower_form_stays_packed() -> None:
    weight = masked(DENSE, "0.5")
    x = normal(3, IN, seed=1).half()

    module = packed(weight, torch.float16, lean=True)

    assert isinstance(module, Packed)
    assert error(module(x), weight, x) < 2e-3


def test_tiles_that_do_not_divide_the_inputs_are_decoded(gpu: None) -> None:
    data = normal(OUT, 448).to(torch.float8_e4m3fn)
    weight = Scaled(data, normal(OUT, 2).abs() + 0.1, 1, 256)
    x = normal(3, 448, seed=1)

    y = lower(weight, torch.float32, "fp8")(x)

    want = weight.linear(rounded_for(weight, x, "fp8").double()).float()
    assert float((y - want).norm() / want.norm()) < 1e-5


@pytest.mark.slow
def test_what_was_kept_lean_on_a_cpu_is_packed_where_it_moves(
    monkeypatch: pytest.MonkeyPatch, int4_artifact: Path
) -> None:
    model = compress.load(int4_artifact, low_memory=True)
    layer = next(part for part in model.modules() if isinstance(part, CompressedLinear))

    monkeypatch.setattr(lowering, "on_gpu", lambda weight: True)
    layer.half()

    assert isinstance(layer.lowered, Packed) and layer.dtype == torch.float16


def test_on_a_cpu_nothing_of_the_gpu_is_chosen() -> None:
    assert "gpu" not in lowering.rule_of(FORMS["int4g64"], torch.bfloat16)


def test_a_loaded_layer_computes_packed_and_keeps_what_was_stored(gpu: None, int4_artifact: Path) -> None:
    model = compress.load(int4_artifact)
    layer = next(part for part in model.modules() if isinstance(part, CompressedLinear))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = normal(3, layer.in_features, seed=1).bfloat16()

    packed_y = layer(x)
    model.to(torch.float16).to(torch.bfloat16)  # lowered again twice

    assert isinstance(layer.lowered, Packed)
    assert explain(layer, 1).startswith("packed int4g64s, read by its kernel: expected to be ")
    assert "read by its kernel" in explain(layer, 256)  # as the op does, whatever would be faster
    assert "decoded to scratch memory" in explain(layer, 257)
    assert torch.equal(layer(x), packed_y)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())
    assert error(packed_y, layer.expression, x) < 2e-2


def test_with_low_memory_what_has_a_kernel_stays_packed(gpu: None, int4_artifact: Path) -> None:
    model = compress.load(int4_artifact, low_memory=True)
    layers = [part for part in model.modules() if isinstance(part, CompressedLinear)]

    assert layers and all(isinstance(layer.lowered, Packed) for layer in layers)


def test_with_low_memory_the_rest_is_decoded_at_each_call(int4_artifact: Path) -> None:
    model = compress.load(int4_artifact, low_memory=True)

    assert all(part.lowered is None for part in model.modules() if isinstance(part, CompressedLinear))


@pytest.mark.slow
def test_rounded_inputs_have_a_gradient_through_the_stored_bits(gpu: None, tmp_path: Path) -> None:
    passes = [compress.RTN(bits=8, group=0, symmetric=True, inputs="int8")]
    out = compress.run("builtin", passes, tmp_path / "out", calibration=Calibration(samples=4, length=32)).out
    layer = next(part for part in compress.load(out).modules() if isinstance(part, CompressedLinear))
    x = normal(2, layer.in_features).bfloat16().requires_grad_()

    layer(x).float().square().sum().backward()

    assert isinstance(layer.lowered, Packed)
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
