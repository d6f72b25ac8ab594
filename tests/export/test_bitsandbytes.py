"""bitsandbytes: weights loaded by stock transformers decode to the artifact's matrices."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import RTN, Magnitude, UnsupportedWeight
from compress.artifact import Artifact
from compress.export import FORMATS, export
from compress.export.dense import export_dense
from compress.passes import NF4, Int8

pytest.importorskip("bitsandbytes")
BNB = "bitsandbytes"
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")  # of the library, at each call


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "nested", "by row"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_decodes_bit_for_bit(
    kind: str, dtype: str, leaves: Any, small: Any, artifact_of: Any, stock: Any, tmp_path: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    step = leaves(kind="nf4-row") if kind == "by row" else NF4(double=kind == "nested")
    artifact = artifact_of([step], small(dtype=dtype))
    done = export(artifact, BNB, tmp_path / "out")
    model, meant = stock(done.out), Artifact(artifact)
    assert done.rounding == 0.0
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.quant_state.nested == (kind == "nested")
    for site in meant.specs:
        weight = model.get_submodule(site).weight
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), meant.matrix(site))


def test_nf4_computes_the_same(artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any) -> None:
    """On CPUs that multiply in bfloat16 the library does, whatever the model's dtype; then it loses what that loses."""
    artifact = artifact_of([NF4()])
    out = export(artifact, BNB, tmp_path / "out").out
    exact, coarse = (logits(compress.load(artifact, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    loss = float((coarse - exact).norm() / exact.norm())
    assert loss < 0.05
    assert_close("logits", logits(stock(out)), exact, 2 * loss)


def test_int8_keeps_its_integers_and_rounds_inputs(
    artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    artifact = artifact_of([Int8(inputs="int8")])
    done = export(artifact, BNB, tmp_path / "out")
    model, site = stock(done.out), "model.layers.1.mlp.down_proj"
    codes = Artifact(artifact).expression(site).codes  # type: ignore[attr-defined]
    assert torch.equal(model.get_submodule(site).weight.data.int() + 128, codes.int())
    assert done.rounding < 1e-6
    assert "rounds inputs" in done.note
    assert_close("logits", logits(model), logits(compress.load(artifact)), 0.1)


def test_modules_left_plain_are_named(artifact_of: Any, stock: Any, tmp_path: Path) -> None:
    artifact = artifact_of([NF4(sites="*mlp*"), Magnitude(sites="*attn*")])
    model = stock(export(artifact, BNB, tmp_path / "out").out)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_modules_of_a_vision_language_model_are_named_as_loaders_name_them(
    llava: Path, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    artifact = artifact_of([Int8(sites="*mlp*", inputs="int8"), Magnitude(sites="*attn*")], llava)
    model = stock(export(artifact, BNB, tmp_path / "out").out, auto="AutoModelForImageTextToText")
    first = model.model.language_model.layers[0]
    assert type(first.self_attn.q_proj) is type(model.model.multi_modal_projector.linear_1) is torch.nn.Linear
    assert type(first.mlp.up_proj).__name__ == "Linear8bitLt"
    assert_close("logits", logits(model), logits(compress.load(artifact)), 0.1)


REFUSED: dict[str, tuple[Any, str]] = {
    "int4": ([RTN(bits=4, group=32)], "8-bit integers by row; use --to gptq, gguf or dense"),
    "symmetric int4": ([RTN(bits=4, group=32, symmetric=True)], "use --to compressed-tensors, gptq, gguf or dense"),
    "int8 by group": ([RTN(bits=8, group=32, symmetric=True)], "use group: 0"),
    "int8 with fp8 inputs": ([Int8(inputs="fp8")], "round inputs to int8"),
    "nf4 with rounded inputs": ([NF4(inputs="int8")], "do not round inputs"),
    "two kinds": ([NF4(sites="*mlp*"), Int8(sites="*attn*")], "all layers must have 4 bits, or all 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_say_is_refused_by_name(case: str, artifact_of: Any, tmp_path: Path) -> None:
    passes, match = REFUSED[case]
    artifact = artifact_of(passes)
    with pytest.raises(UnsupportedWeight, match=match):
        export(artifact, BNB, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_blocks_are_refused(leaves: Any, artifact_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedWeight, match="no blocks of 16"):
        export(artifact_of([leaves(kind="nf4-16")]), BNB, tmp_path / "out")


def test_the_library_gives_no_advice_where_our_lines_stand(
    artifact_of: Any, tmp_path: Path, cli: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does when it is imported, where a processor has bfloat16 products and the hub's kernels are not there."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.NOTSET)
    monkeypatch.setitem(FORMATS, BNB, lambda path, out: logger.warning("Failed to load") or export_dense(path, out))
    code, _, err = cli("export", artifact_of([NF4()]), "--to", BNB, "--out", tmp_path / "out")
    assert (code, err, caplog.text) == (0, "", "")
