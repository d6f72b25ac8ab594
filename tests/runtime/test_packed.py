"""What stays packed on a GPU: every form against its expression, by the ops' reference; what moves with a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import compress
from compress import Calibration, Dense, Grid, Product, Quantized, Weight
from compress.runtime import lower as lowering
from compress.runtime.explain import explain
from compress.runtime.linear import CompressedLinear
from compress.runtime.lower import Transformed, lower, path
from compress.runtime.packed import Packed, packed, way
from compress.weights import Diagonal, Hadamard, Permutation

Close = Callable[[str, Tensor, Tensor, float], None]
OUT, IN = 70, 512
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


def quantized(bits: int, group: int = 0) -> Weight:
    return Grid(bits=bits, group=group or IN, symmetric=True).quantize(normal(OUT, IN))


FORMS: dict[str, Weight] = {
    **{f"int{bits}": quantized(bits) for bits in (2, 3, 4, 8)},
    "int4g64": quantized(4, 64),
    "int3g128": quantized(3, 128),
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

    module = lower(FORMS[form], dtype)

    assert isinstance(module, Packed)
    assert error(module(x), FORMS[form], x) < 2 * torch.finfo(dtype).eps
    bias = normal(OUT, seed=2).to(dtype)
    torch.testing.assert_close(module(x, bias), module(x) + bias, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_the_input_comes_before(gpu: None, transform: str) -> None:
    weight = Product(FORMS["int4g64"], TRANSFORMS[transform])
    x = normal(3, IN, seed=1).half()

    module = lower(weight, torch.float16)

    assert isinstance(module, Transformed) and isinstance(module.then, Packed)
    assert error(module(x), weight, x) < 2e-3
    assert path(module, 1) == f"{TRANSFORMS[transform].describe()}, packed int4g64s"


def test_tensors_move_with_the_module_and_are_never_cast() -> None:
    module = packed(FORMS["int4g64"], torch.float16)
    assert module is not None

    moved = module.to("meta").to(torch.float64)

    assert moved.form.words.is_meta and moved.form.words.dtype == torch.int16
    assert moved.form.scale.is_meta and moved.form.scale.dtype == torch.float16


def test_what_has_no_kernel_is_decoded_and_says_why(gpu: None) -> None:
    dense = Dense(normal(OUT, IN))

    assert way(dense).problem == "there is no kernel for dense"
    assert packed(FORMS["int4g64"], torch.float32) is None  # tensor cores take halves
    assert path(lower(dense, torch.float16), 1) == "decoded"


def test_groups_that_no_word_divides_are_named() -> None:
    codes = torch.zeros(OUT, 480, dtype=torch.uint8)

    assert "groups of 48" in way(Quantized(codes, torch.ones(OUT, 10), None, 4)).problem


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
    assert "packed int4g64s" in explain(layer, 1)
    assert torch.equal(layer(x), packed_y)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())
    assert error(packed_y, layer.expression, x) < 2e-2
