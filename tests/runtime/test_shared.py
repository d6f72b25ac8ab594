"""Projections of one input share its rotation and rounding: the same values, and never those of another input."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import RTN, Dense, Diagonal, Grid, Hadamard, Product, Rotate, Weight
from compress.runtime.linear import CompressedLinear
from compress.runtime.lower import lower
from compress.runtime.maps import Rounding, applied, share

Close = Callable[[str, Tensor, Tensor, float], None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(inputs: str) -> RTN:
    return RTN(bits=8, group=0, symmetric=True, inputs=inputs)


@pytest.fixture(scope="module", params=["int8", "turned", "fp8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    passes: dict[str, list[Any]] = {
        "int8": [quantizer("int8")], "turned": [Rotate(), quantizer("int8")], "fp8": [quantizer("fp8")]
    }  # fmt: skip
    out = tmp_path_factory.mktemp("shared") / "o"
    return compress.run(
        tiny_llama, passes[request.param], out, calibration=compress.Calibration(samples=2, length=16)
    ).out


@pytest.fixture
def attention(folder: Path) -> Any:
    return compress.load(folder, dtype=torch.bfloat16).model.layers[0].self_attn


def three(attention: Any, x: Tensor) -> list[Tensor]:
    return [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]


def expect(attention: Any, x: Tensor, got: list[Tensor]) -> None:
    """Each is bit for bit what it gives alone."""
    for module, y in zip((attention.q_proj, attention.k_proj, attention.v_proj), got, strict=True):
        assert torch.equal(y, alone(module, x))


def alone(module: CompressedLinear, x: Tensor) -> Tensor:
    return applied(lower(module.expression, module.dtype, module.spec["inputs"]), x, module.bias)


def kept(attention: Any) -> dict[int, Any]:
    found: dict[int, Any] = attention.q_proj.lowered.shared.kept
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often any input was read, in a list that goes on counting."""
    found = [0]
    for kind in Rounding.__subclasses__():

        def count(self: Any, x: Tensor, read: Any = kind.read) -> Any:
            found[0] += 1
            return read(self, x)

        monkeypatch.setattr(kind, "read", count)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8, 17])
@pytest.mark.parametrize(("mode", "each"), [(torch.no_grad, 1), (torch.inference_mode, 3), (torch.enable_grad, 1)])
def test_three_projections_read_their_input_once(
    attention: Any, rows: int, mode: Any, each: int, reads: list[int]
) -> None:
    for seed in (1, 2):
        with mode():
            x = normal(1, rows, 48, seed=seed).bfloat16()
            before = reads[0]
            got = three(attention, x)
            assert reads[0] - before == each
            expect(attention, x, got)
    assert kept(attention) == {}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_was_written_to_is_read_again(attention: Any, mode: Any) -> None:
    with mode():
        x = normal(1, 3, 48).bfloat16()
        attention.q_proj(x)
        x.mul_(-2)
        assert torch.equal(attention.k_proj(x), alone(attention.k_proj, x))
        x.copy_(normal(1, 3, 48, seed=5))
        expect(attention, x, three(attention, x))


def test_a_write_that_torch_does_not_count_is_seen_by_the_next_call(attention: Any) -> None:
    with torch.no_grad():
        x = normal(1, 3, 48).bfloat16()
        for seed in (1, 2):
            x.data.copy_(normal(1, 3, 48, seed=seed))
            expect(attention, x, three(attention, x))
        attention.q_proj(x)  # and k, v do not ask
        x.data.mul_(-2)
        expect(attention, x, three(attention, x))


def test_another_tensor_of_the_same_memory_is_another_input(attention: Any, reads: list[int]) -> None:
    x = normal(1, 3, 48).bfloat16()
    with torch.no_grad():
        attention.q_proj(x)
        attention.k_proj(x.view(1, 3, 48))
    assert reads == [2]


@pytest.mark.slow
def test_nothing_is_kept_of_an_input_that_is_gone(attention: Any) -> None:
    with torch.no_grad():
        x = normal(1, 3, 48).bfloat16()
        gone = weakref.ref(x)
        attention.q_proj(x)
        assert len(kept(attention)) == 1
        del x
        gc.collect()
    assert (gone(), kept(attention)) == (None, {})


def test_threads_do_not_meet(attention: Any) -> None:
    def work(seed: int) -> None:
        x = normal(1, 2, 48, seed=seed).bfloat16()
        with torch.no_grad():
            for _ in range(5):
                expect(attention, x, three(attention, x))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(16)))
    assert kept(attention) == {}


def test_a_gradient_is_that_of_each_alone(attention: Any) -> None:
    x, y = (normal(1, 3, 48).bfloat16().requires_grad_() for _ in range(2))
    torch.cat(three(attention, x), -1).sum().backward()
    for module in (attention.q_proj, attention.k_proj, attention.v_proj):
        module.reference(y).sum().backward()
    assert float((x.grad - y.grad).norm() / y.grad.norm()) < 0.02  # bf16 sums in another order
    assert kept(attention) == {}


def test_a_copy_shares_with_itself_only(attention: Any) -> None:
    x = normal(1, 3, 48).bfloat16()
    with torch.no_grad():
        attention.q_proj(x)
        twin = copy.deepcopy(attention)
        assert twin.q_proj.lowered.shared is twin.k_proj.lowered.shared
        assert twin.q_proj.lowered.shared is not attention.q_proj.lowered.shared
        expect(twin, x, three(twin, x))


def test_a_cast_model_still_computes(attention: Any) -> None:
    attention.float()
    x = normal(1, 3, 48)
    with torch.no_grad():
        expect(attention, x, three(attention, x))


@pytest.mark.slow
def test_a_compiler_traces_it_whole(attention: Any) -> None:
    with torch.no_grad():
        for seed in (1, 2):
            x = normal(1, 3, 48, seed=seed).bfloat16()
            expect(attention, x, torch.compile(lambda t: three(attention, t), backend="aot_eager", fullgraph=True)(x))
    assert kept(attention) == {}


def test_low_memory_shares_nothing(folder: Path) -> None:
    model = compress.load(folder, low_memory=True)
    assert not [module for module in model.modules() if isinstance(module, Rounding)]


INT8 = Grid(bits=8).quantize(normal(24, 64))
TURN = Hadamard(normal(64) > 0)


@pytest.mark.parametrize(
    ("others", "shared"),
    [
        ([(INT8, "int8"), (Grid(bits=4).quantize(normal(8, 64)), "int8")], True),
        ([(INT8, "int8"), (INT8, "fp8")], False),
        ([(INT8, "fp8"), (Dense(normal(8, 64)), "fp8")], True),
        ([(Product(INT8, TURN), "int8"), (Product(INT8, Hadamard(TURN.positive.clone())), "int8")], True),
        ([(Product(INT8, TURN), "int8"), (Product(INT8, Hadamard(~TURN.positive)), "int8")], False),
        ([(Product(INT8, TURN), "int8"), (INT8, "int8")], False),
        ([(Product(INT8, TURN), "fp8"), (Product(INT8, Diagonal(normal(64).abs())), "fp8")], False),
    ],
)
def test_only_what_begins_alike_is_shared(others: list[tuple[Weight, str]], shared: bool) -> None:
    modules = [lower(weight, torch.float32, inputs) for weight, inputs in others]
    share(modules)
    assert [isinstance(module, Rounding) and module.shared is not None for module in modules] == [shared] * 2
