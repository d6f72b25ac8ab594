"""Folders with weights in another form: float8 is read, other quantized formats are decoded only on request."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import RTN, ArtifactError
from compress.artifact import Artifact
from compress.model.source import Checkpoint, display_name
from compress.sources import Float8, open_source, spread

BLOCK = (24, 24)  # divides every side of the tiny model, which transformers demands
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def is_matrix(name: str) -> bool:
    return name.endswith("proj.weight")


def rewritten(source: Path, folder: Path, change: Change, quantization: dict[str, Any] | None) -> Path:
    """A copy of a folder with other tensors and another `quantization_config`."""
    shutil.copytree(source, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    more = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps({**config, **more, "dtype": "bfloat16"}))
    return folder


# -- float8 ----------------------------------------------------------------------------------------


def blocks_of(w_OI: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Float8 codes and the scale of each block, the last ones cut."""
    rows, columns = -(-w_OI.shape[0] // block[0]), -(-w_OI.shape[1] // block[1])
    scale = torch.empty(rows, columns)
    codes = torch.empty_like(w_OI)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = w_OI[part].abs().max() / 448
            codes[part] = w_OI[part] / scale[i, j]
    return codes.to(torch.float8_e4m3fn), scale


def in_blocks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_matrix(name):
            made[name], made[f"{name}_scale_inv"] = blocks_of(tensor)
        else:
            made[name] = tensor
    return made


def in_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = dict(tensors)
    for name in filter(is_matrix, tensors):
        made[f"{name}_scale"] = tensors[name].abs().amax(1, keepdim=True) / 448
        made[name] = (tensors[name] / made[f"{name}_scale"]).to(torch.float8_e4m3fn)
        made[f"{name.removesuffix('weight')}input_scale"] = torch.ones(())
    return made


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(torch.float8_e5m2) if is_matrix(name) else t for name, t in tensors.items()}


BLOCKED = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
FORMS: dict[str, tuple[Change, dict[str, Any] | None, float]] = {
    "blocks": (in_blocks, BLOCKED, 2.0**-4),
    "rows": (in_rows, {"quant_method": "modelopt", "quant_algo": "FP8"}, 2.0**-4),
    "bare": (bare, None, 2.0**-3),
}


@pytest.mark.parametrize("form", FORMS)
def test_float8_is_read_as_the_numbers_it_denotes(
    form: str, tiny_llama: Path, tmp_path: Path, assert_close: Any
) -> None:
    change, quantization, ratio = FORMS[form]
    source = open_source(rewritten(tiny_llama, tmp_path / "m", change, quantization))
    plain = Checkpoint(tiny_llama)
    assert source.names() == plain.names()
    assert source.shapes() == plain.shapes()
    for name in source.names():
        assert_close(name, source.tensor(name).float(), plain.tensor(name), ratio if is_matrix(name) else 0.0)
        assert str(source.tensor(name).dtype) == ("torch.bfloat16" if is_matrix(name) else "torch.float32")


def test_blocks_are_scaled_one_by_one() -> None:
    w_OI = torch.randn(50, 70) * torch.logspace(-3, 3, 70)
    codes, scale = blocks_of(w_OI, (16, 32))
    whole = spread(scale, (50, 70), [16, 32])
    assert whole is not None
    assert whole.shape == w_OI.shape
    assert torch.equal(whole[::16, ::32], scale)
    assert bool(((codes.float() * whole - w_OI).abs() <= whole * 16.1).all())  # half a step at the top of the range


def test_transformers_decodes_the_same_numbers(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = rewritten(tiny_llama, tmp_path / "m", in_blocks, BLOCKED)
    wanted = FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True)
    with warnings.catch_warnings(action="ignore"):  # transformers tells that the folder has a configuration too
        peer = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.bfloat16)
    ours = open_source(folder)
    for name, tensor in peer.state_dict().items():
        if is_matrix(name):
            assert torch.equal(ours.tensor(name), tensor), name


@pytest.mark.parametrize("form", FORMS)
def test_a_float8_checkpoint_is_compressed(form: str, tiny_llama: Path, tmp_path: Path, ids: Tensor) -> None:
    change, quantization, _ = FORMS[form]
    folder = rewritten(tiny_llama, tmp_path / "m", change, quantization)
    compress.run(folder, [RTN(bits=8, group=8)], tmp_path / "o")
    made = Artifact(tmp_path / "o")
    assert made.provenance["source"]["decoded_from"] == "float8"
    assert "scale_inv" not in " ".join(made.names())
    assert bool(torch.isfinite(compress.load(tmp_path / "o")(input_ids=ids).logits).all())


def test_a_scale_that_does_not_fit_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def wrong(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = in_blocks(tensors)
        return {n: t[:1, :1].repeat(7, 7) if n.endswith("up_proj.weight_scale_inv") else t for n, t in made.items()}

    folder = rewritten(tiny_llama, tmp_path / "m", wrong, BLOCKED)
    with pytest.raises(
        ArtifactError, match=r"up_proj\.weight: its scale of \(7, 7\) does not fit a weight of \(72, 48\)"
    ):
        compress.run(folder, [RTN(group=8)], tmp_path / "o")


def test_float8_whose_scales_have_another_name_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def odd(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("_scale_inv", ".descale"): tensor for name, tensor in in_blocks(tensors).items()}

    folder = rewritten(tiny_llama, tmp_path / "m", odd, BLOCKED)
    with pytest.raises(ArtifactError, match=r"quantized by fp8, but .*proj\.weight has no scale"):
        open_source(folder)


def test_float8_with_integers_beside_it_is_not_just_float8(tiny_llama: Path, tmp_path: Path) -> None:
    def mixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return bare(tensors) | {"model.layers.0.qweight": torch.ones(3, dtype=torch.int32)}

    folder = rewritten(tiny_llama, tmp_path / "m", mixed, {"quant_method": "awq"})
    with pytest.raises(ArtifactError, match=r"already quantized by awq; start from the dense model$"):
        open_source(folder)


# -- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "hqq"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_a_method_nobody_decodes_is_refused_by_name(
    method: str, dequantize: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = rewritten(tiny_llama, tmp_path / "m", dict, {"quant_method": method})
    with pytest.raises(ArtifactError, match=rf"already quantized by {method}; start from the dense model$"):
        compress.run(folder, [RTN(group=8)], tmp_path / "o", dequantize=dequantize)
    assert not (tmp_path / "o").exists()


def test_a_snapshot_in_the_hubs_cache_is_called_by_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--some--Llama-3--x" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    assert display_name(folder) == "Llama-3--x"
    plain = tmp_path / "snapshots" / "mine\u00a0too"
    plain.mkdir(parents=True)
    assert display_name(plain) == r"mine\xa0too"


def test_our_own_artifact_is_decoded_only_when_asked(llama_artifact: Path, tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(ArtifactError, match=r"already quantized by compress; .* `compress run` with --dequantize"):
        compress.run(llama_artifact, [RTN(bits=8, group=8)], tmp_path / "o")
    compress.run(llama_artifact, [RTN(bits=8, group=8)], tmp_path / "o", dequantize=True)
    before, after = compress.load(llama_artifact), compress.load(tmp_path / "o")
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (before, after)]
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.05
    assert Artifact(tmp_path / "o").provenance["source"]["decoded_from"] == "compress"


@pytest.fixture(scope="module")
def packed(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama written by compressed-tensors as int4 in groups of eight, its own `scale` and packing."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    scheme = QuantizationScheme(
        targets=["Linear"], format="pack-quantized",
        weights=QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=8),
    )  # fmt: skip
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not is_matrix(name):
                made[name] = tensor
                continue
            scale = tensor.float().unflatten(1, (-1, 8)).abs().amax(-1) / 7
            state = {"weight": tensor, "weight_scale": scale.to(torch.bfloat16)}
            base = name.removesuffix(".weight")
            made |= {f"{base}.{key}": t.contiguous() for key, t in compressor.compress(state, scheme).items()}
        return made

    quantization = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"], quantization_status="compressed"
    )
    described = {**json.loads(quantization.model_dump_json()), "sparsity_config": {}, "transform_config": {}}
    folder = tmp_path_factory.mktemp("packed") / "m"
    return rewritten(model_folder("llama", "bfloat16"), folder, change, described)


def test_compressed_tensors_are_decoded_as_transformers_does(packed: Path, tmp_path: Path, ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    with pytest.raises(ArtifactError, match=r"already quantized by compressed-tensors; .* with --dequantize"):
        open_source(packed)
    source = open_source(packed, dequantize=True)
    with warnings.catch_warnings(action="ignore"):  # transformers tells that the folder has a configuration too
        peer = AutoModelForCausalLM.from_pretrained(
            packed, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
        )
    for name, tensor in peer.state_dict().items():
        assert source.shapes()[name] == tuple(tensor.shape)
        assert torch.equal(source.tensor(name), tensor), name


def test_compressed_tensors_are_compressed_again(packed: Path, tmp_path: Path, ids: Tensor) -> None:
    report = compress.run(packed, [RTN(bits=8, group=8)], tmp_path / "o", dequantize=True)
    assert report.coverage.missed == 0
    assert len(Artifact(tmp_path / "o").specs) == 14
    assert bool(torch.isfinite(compress.load(tmp_path / "o")(input_ids=ids).logits).all())


def test_a_plain_folder_is_opened_as_it_is(tiny_llama: Path) -> None:
    assert not isinstance(open_source(tiny_llama), Float8)
    assert open_source(tiny_llama).decoded_from == ""
