"""The explanation of a layer matches what it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import RTN, Dense, Diagonal, Grid, Hadamard, Masked, Product, RecipeError, Weight
from compress.runtime.explain import explain
from compress_kernels import cpu, tuning
from compress_kernels.tuning import Key, Profile

VNNI = pytest.mark.skipif(not cpu.multiplies_integers(), reason="this CPU cannot sum products of bytes exactly")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int4() -> Weight:
    return Grid(bits=4, group=64).quantize(normal(256, 256))


def int8() -> Weight:
    return Grid(bits=8).quantize(normal(256, 256))


def test_packed_and_decoded_rows_are_told_apart() -> None:
    assert explain(int4(), 8).startswith("packed int4: faster up to 8 rows, as measured on the CPU of the defaults")
    assert explain(int4(), 8).endswith("with more rows, the decoded bf16 matrix")
    assert explain(int4(), 9).startswith("the decoded bf16 matrix: faster above 8 rows")
    assert explain(int4(), 8, dtype=torch.float32) == (
        "the decoded fp32 matrix: nothing packed is faster for this form and size"
    )


def test_what_this_machine_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entries = {Key(cpu.OP, form, 256, 256, rows): {"path": cpu.PACKED if rows == 2 else cpu.DECODED}
               for form in (cpu.INT4, cpu.INT8_INT8) for rows in (2, 4)}  # fmt: skip
    profile = Profile(tuning.device_name("cpu"), torch.__version__, "2026-01-02", 1, entries)
    tuning.write(profile, tuning.place("cpu"))
    assert explain(int4(), 1).startswith(
        "packed int4: faster up to 2 rows, as `compress tune` measured here on 2026-01-02"
    )
    if cpu.multiplies_integers():
        assert explain(int8(), 2, inputs="int8").startswith("int8 inputs times int8 weights, exact")
        assert "at this many rows integers are slower" in explain(int8(), 3, inputs="int8")
    tuning.place("cpu").write_text("{}")
    with pytest.raises(RecipeError, match="not a tuning profile"):
        explain(int4(), 1)


@pytest.mark.parametrize(
    ("weight", "inputs", "said"),
    [
        (Product(int8(), Hadamard(normal(256) > 0)), "int8", "weights, after a transform of the input, exact"),
        (Product(int8(), Diagonal(normal(256).abs())), "fp8", "inputs rounded to fp8, then the decoded bf16 matrix"),
        (Masked(Dense(normal(1024, 1024)), normal(1024, 1024) > 2.5, "99%"), "", "a sparse product that skips zeros"),
        (Product(Dense(normal(256, 8)), Dense(normal(8, 256))), "", "factor by factor, which costs less than"),
        (Product(Dense(normal(256, 8)), Dense(normal(8, 256))) + int4(), "", "term by term, since none is a whole"),
    ],
)  # fmt: skip
@VNNI
def test_every_kind_of_module_is_explained(weight: Weight, inputs: str, said: str) -> None:
    assert said in explain(weight, 1, inputs=inputs)


def test_a_loaded_layer_is_explained(tiny_llama: Path, tmp_path: Path) -> None:
    out = compress.run(tiny_llama, [RTN(bits=4, group=24)], tmp_path / "out").out
    for low_memory, said in ((False, "the decoded fp32 matrix"), (True, "decoded at each call: low memory keeps")):
        model = compress.load(out, low_memory=low_memory)
        assert explain(model.model.layers[0].mlp.up_proj, 1).startswith(said)


def test_what_cannot_be_explained_is_refused() -> None:
    with pytest.raises(RecipeError, match="0 rows of x"):
        explain(int4(), 0)
    with pytest.raises(RecipeError, match="a Linear is not compressed"):
        explain(nn.Linear(2, 2), 1)
