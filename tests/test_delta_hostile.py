"""Untrusted deltas: nothing large is allocated, nothing outside the delta is read, and nothing is guessed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import (
    RTN,
    ArtifactError,
    Calibration,
    CompressError,
    Delta,
    Magnitude,
    Recipe,
    RecipeError,
    VerificationError,
)
from compress.artifact import Artifact, seal, verify
from compress.export.dense import export_dense
from compress.weights import check_claims
from compress.weights.chance import plausible

FEW = Calibration(samples=4, length=16)
SITE = "model.layers.0.mlp.up_proj"
HUGE = 3_000_000  # squared, no machine has the memory even for bits
Edit = Callable[[dict[str, Any]], object]


def fine_tune(base: Path, out: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype="auto")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name or name == "model.norm.weight":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(out)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With settings and words that the fine-tune does not have."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("base") / "base"))
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.3}')
    (folder / "chat_template.jinja").write_text("the base's")
    return folder


@pytest.fixture(scope="module")
def finetuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fine_tune(base, tmp_path_factory.mktemp("tuned") / "tuned")
    (folder / "generation_config.json").unlink()
    return folder


def delta_of(model: Path, base: Path, out: Path) -> Path:
    recipe = Recipe(passes=(Magnitude(sparsity=0.9, scope="matrix"),), calibration=FEW, delta=Delta(base=str(base)))
    return Path(compress.run(model, recipe, out).out)


@pytest.fixture(scope="module")
def delta(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return delta_of(finetuned, base, tmp_path_factory.mktemp("delta") / "delta")


@pytest.fixture
def own_delta(delta: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(delta, tmp_path / "hostile"))


def sign(folder: Path) -> None:
    """Write the hashes that the files have now, as one who wants to deceive would."""
    told = json.loads((folder / "compress.json").read_text())
    told["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in told["files"]}
    (folder / "compress.json").write_text(json.dumps({**told, "sha256": seal(told)}))


def edit_spec(folder: Path, change: Edit, site: str = SITE) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["weights"][site])
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


def edit_provenance(folder: Path, change: Edit) -> None:
    told = json.loads((folder / "compress.json").read_text())
    change(told)
    (folder / "compress.json").write_text(json.dumps({**told, "sha256": seal(told)}))


def external(tensor: str = f"{SITE}.weight", source: str = "base") -> dict[str, Any]:
    return {"kind": "external", "shape": [72, 48], "source": source, "tensor": tensor}


def refused_everywhere(folder: Path, base: Path, out: Path, message: str, alone: bool = True) -> None:
    """Every way to read a delta ends in one line that names folder and site."""
    attempts: list[Callable[[], object]] = [
        lambda: verify(folder, base),
        lambda: compress.load(folder, base=base),
        lambda: export_dense(folder, out, base),
        lambda: Artifact(folder, base).matrix(SITE),
    ]
    for attempt in (*attempts, *([lambda: verify(folder)] if alone else [])):
        with pytest.raises(CompressError, match=message) as caught:
            attempt()
        assert str(folder) in str(caught.value) and SITE in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not out.exists()


# -- (a) what is claimed is checked before it is made ----------------------------------------------


def empty_mask(shape: list[int]) -> dict[str, Any]:
    values = {"kind": "dense", "shape": shape, "dtype": "float32"}
    return {"kind": "masked", "shape": shape, "pattern": "x", "kept": 0, "mask": 1, "values": values}


def grow_all(spec: dict[str, Any]) -> None:
    tree, shape = spec["tree"], [HUGE, HUGE]
    tree["shape"] = tree["terms"][0]["shape"] = shape
    tree["terms"][1] = empty_mask(shape)


def grow_inside(spec: dict[str, Any]) -> None:
    spec["tree"]["terms"][1] = empty_mask([HUGE, HUGE])


def grow_rank(spec: dict[str, Any]) -> None:
    left, right = empty_mask([72, HUGE * HUGE]), empty_mask([HUGE * HUGE, 48])
    spec["tree"]["terms"][1] = {"kind": "product", "shape": [72, 48], "left": left, "right": right}


def grow_number(spec: dict[str, Any]) -> None:
    spec["tree"]["terms"][1] = {"kind": "sum", "shape": [72, 48], "terms": [empty_mask([72, 48])] * 999}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow_all, f"{HUGE}"),
        (grow_inside, r"masked of \[3000000, 3000000\] where \[72, 48\]"),
        (grow_rank, "inner size"),
        (grow_number, "more than 64 parts"),
        (lambda spec: spec.update(expert=3), "does not fit model"),
        (lambda spec: spec.update(transposed=True), "does not fit model"),
        (lambda spec: spec.update(tensor="model.norm.weight"), "is not model.norm.weight of the base"),
    ],
    ids=["all", "inside", "rank", "number", "expert", "transposed", "tensor"],
)
def test_a_claim_that_cannot_be_is_refused(
    own_delta: Path, base: Path, tmp_path: Path, change: Edit, message: str
) -> None:
    edit_spec(own_delta, change)
    refused_everywhere(own_delta, base, tmp_path / "out", message)


def test_the_base_decides_even_if_both_files_lie(own_delta: Path, base: Path, tmp_path: Path) -> None:
    edit_spec(own_delta, grow_all)
    edit_provenance(own_delta, lambda told: told["tensors"].update({f"{SITE}.weight": [HUGE, HUGE]}))
    refused_everywhere(own_delta, base, tmp_path / "out", "in the base", alone=False)


def test_a_matrix_with_more_rows_than_the_base_stores_them(own_delta: Path, base: Path, tmp_path: Path) -> None:
    def higher(spec: dict[str, Any]) -> None:
        grow_all(spec)
        spec["tree"]["shape"] = spec["tree"]["terms"][0]["shape"] = [HUGE, 48]
        spec["tree"]["terms"][1] = empty_mask([HUGE, 48])

    edit_spec(own_delta, higher)
    edit_provenance(own_delta, lambda told: told["tensors"].update({f"{SITE}.weight": [HUGE, 48]}))
    refused_everywhere(own_delta, base, tmp_path / "out", "in the base", alone=False)


@pytest.mark.parametrize("change", [grow_all, grow_inside, lambda spec: spec["tree"]["terms"].append(external())])
def test_a_merge_refuses_such_deltas_too(own_delta: Path, base: Path, tmp_path: Path, change: Edit) -> None:
    edit_spec(own_delta, change)
    with pytest.raises(ArtifactError, match=SITE):
        compress.merge(base, [own_delta], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ordinary_artifact_must_claim_what_compress_json_says(own_artifact: Path) -> None:
    def larger(spec: dict[str, Any]) -> None:
        spec["tree"] = empty_mask([HUGE, HUGE])

    edit_spec(own_artifact, larger)
    for attempt in (lambda: verify(own_artifact), lambda: compress.load(own_artifact)):
        with pytest.raises(CompressError, match=r"3000000.* does not fit .*which is \[72, 48\]"):
            attempt()


def test_a_mask_by_name_keeps_about_what_its_name_says() -> None:
    assert plausible("rand0.1@7", 10_000, 1_050)
    assert not plausible("rand0.1@7", 10_000, 0)
    assert not plausible("2:4", 10_000, 5_000)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "diagonal", "shape": [4, 8]},
        {"kind": "quantized", "shape": [4, 8], "bits": 4, "scales": [4, 0], "symmetric": True},
        {"kind": "quantized", "shape": [4, 8], "bits": 0, "scales": [4, 1], "symmetric": True},
        {"kind": "scaled", "shape": [4, 8], "scales": [1, 1], "tile": [0, 8]},
        {"kind": "codebook", "shape": [4, 8], "codes": [4, 9], "book": "nf4", "scale": {"shape": [4, 1]}},
        {"kind": "codebook", "shape": [4, 8], "codes": [4, 8], "book": "x", "scale": {"shape": [4, 1]}},
        {"kind": "sum", "shape": [4, 8], "terms": 3},
        {"kind": "masked", "shape": [4, 8], "values": "x"},
        {"kind": "product", "shape": [4, 8]},
    ],
)
def test_parts_that_do_not_fit_are_one_line(spec: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        check_claims(spec, (4, 8))


# -- (b) the base once, and nowhere else -----------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["tree"]["terms"].__setitem__(1, external()), "where that is not allowed"),
        (lambda spec: spec["tree"]["terms"].append(external()), "plus one difference"),
        (lambda spec: spec["tree"].update(terms=spec["tree"]["terms"][::-1]), "plus one difference"),
        (lambda spec: spec.update(tree=spec["tree"]["terms"][1]), "plus one difference"),
        (lambda spec: spec["tree"]["terms"][0].update(tensor="model.norm.weight"), "plus one difference"),
        (lambda spec: spec["tree"]["terms"][0].update(source="other"), "plus one difference"),
        (lambda spec: spec["tree"]["terms"][1].update(values=external()), "where that is not allowed"),
    ],
    ids=["twice", "thrice", "order", "none", "tensor", "source", "masked"],
)
def test_a_delta_is_its_base_plus_one_difference(
    own_delta: Path, base: Path, tmp_path: Path, change: Edit, message: str
) -> None:
    edit_spec(own_delta, change)
    refused_everywhere(own_delta, base, tmp_path / "out", message)


def test_an_ordinary_artifact_names_no_base(own_artifact: Path) -> None:
    edit_spec(own_artifact, lambda spec: spec["tree"].update(values=external()))
    with pytest.raises(CompressError, match="where that is not allowed"):
        verify(own_artifact)
    with pytest.raises(ArtifactError, match="where that is not allowed"):
        compress.load(own_artifact)


def test_damage_inside_a_site_names_it(own_delta: Path, base: Path, tmp_path: Path) -> None:
    edit_spec(own_delta, lambda spec: spec["tree"]["terms"][1].update(kept=1))
    refused_everywhere(own_delta, base, tmp_path / "out", "gaps")


# -- (c) companion files ---------------------------------------------------------------------------


def test_the_files_left_to_the_base_are_recorded_and_no_others_come_back(
    delta: Path, base: Path, finetuned: Path, tmp_path: Path
) -> None:
    shared = Artifact(delta).provenance["base_files"]
    assert sorted(shared) == sorted(file.name for file in finetuned.glob("tokenizer*"))
    assert all(hashlib.sha256((base / name).read_bytes()).hexdigest() == sha for name, sha in shared.items())
    export_dense(delta, tmp_path / "applied", base)
    kept = {"config.json", "README.md", *(file.name for file in finetuned.glob("tokenizer*"))}
    assert {f.name for f in (tmp_path / "applied").iterdir() if "safetensors" not in f.name} == kept


def test_settings_that_only_the_base_has_are_not_taken(
    delta: Path, base: Path, finetuned: Path, hugging_face: Any
) -> None:
    loaded, wanted = compress.load(delta, base=base), hugging_face(finetuned)
    assert loaded.generation_config.temperature == wanted.generation_config.temperature != 0.3


def test_settings_shared_with_the_base_are_taken(base: Path, finetuned: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(finetuned, tmp_path / "same"))
    shutil.copy(base / "generation_config.json", same)
    folder = delta_of(same, base, tmp_path / "d")
    assert not (folder / "generation_config.json").exists()
    assert compress.load(folder, base=base).generation_config.temperature == 0.3


@pytest.mark.parametrize("change", [lambda f: f.write_text("{}"), lambda f: f.unlink()], ids=["changed", "missing"])
def test_a_base_without_a_file_it_shares_is_refused(
    delta: Path, base: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    change(other / "tokenizer.json")
    with pytest.raises(ArtifactError, match=r"tokenizer.json: .* was changed or is missing"):
        export_dense(delta, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


def test_only_companions_are_taken_from_a_base(own_delta: Path, base: Path, tmp_path: Path) -> None:
    sha = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    edit_provenance(own_delta, lambda told: told["base_files"].update({"model.safetensors": sha}))
    with pytest.raises(ArtifactError, match="cannot be taken from a base"):
        export_dense(own_delta, tmp_path / "out", base)


def test_what_nobody_recorded_is_refused(own_delta: Path, base: Path, tmp_path: Path) -> None:
    (own_delta / "special_tokens_map.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"special_tokens_map\.json is not a recorded file"):
        export_dense(own_delta, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_a_delta_is_refused(own_delta: Path, base: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (own_delta / "notes.txt").symlink_to(secret)
    edit_provenance(own_delta, lambda told: told["files"].update({"notes.txt": ""}))
    sign(own_delta)
    with pytest.raises(ArtifactError, match=r"notes.txt: links out of the folder"):
        export_dense(own_delta, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


# -- (d) loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_tensor_that_nothing_names_is_missing(own_delta: Path, base: Path, name: str) -> None:
    edit_provenance(own_delta, lambda told: told["tensors"].pop(name))
    with pytest.raises(ArtifactError, match=f"missing, first {name}"):
        compress.load(own_delta, base=base)


def test_a_plain_folder_takes_no_base(finetuned: Path, base: Path) -> None:
    with pytest.raises(ArtifactError, match="not a delta"):
        compress.load(finetuned, base=base)


def test_a_delta_has_no_low_memory(delta: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match="low_memory: a delta"):
        compress.load(delta, base=base, low_memory=True)


def test_an_honest_delta_still_loads(delta: Path, base: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(RTN(bits=4, group=0),), calibration=FEW)
    assert verify(compress.run(base, recipe, tmp_path / "o").out)
    assert len(verify(delta, base)) == 3 and len(verify(delta)) == 3
    assert next(compress.load(delta, base=base).parameters()) is not None
