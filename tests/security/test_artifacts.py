"""Untrusted artifacts: the claims of config.json and compress.json are checked before they are used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import Calibration, Delta, Magnitude, Recipe
from compress.artifact import Artifact, verify
from compress.export.dense import export_dense

SITE, OTHER = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
SHARD = "model-00002-of-00003.safetensors"  # of block 0
Spec = dict[str, Any]
Refuse = Callable[..., str]
INFINITE, NAN = float("inf"), float("nan")


def refused(folder: Path, refuse: Refuse) -> str:
    """The message of loading; verifying and exporting are refused too."""
    out = folder.parent / "out"
    ways = [lambda: compress.load(folder), lambda: verify(folder), lambda: export_dense(folder, out)]
    said = [refuse(way, "bad input", "hostile artifacts and deltas") for way in ways]  # all of them
    return next(iter(said))


@pytest.fixture
def change(own_artifact: Path, sign: Any) -> Callable[..., Path]:
    """`change(edit)`: an artifact whose specification of SITE is edited, all hashes right; `edit(spec, all, made)`."""

    def make(edit: Callable[[Spec, dict[str, Spec], Spec], object]) -> Path:
        config = json.loads((own_artifact / "config.json").read_text())
        made = json.loads((own_artifact / "compress.json").read_text())
        specs = config["quantization_config"]["weights"]
        edit(specs[SITE], specs, made)
        (own_artifact / "config.json").write_text(json.dumps(config))
        (own_artifact / "compress.json").write_text(json.dumps(made))
        sign(own_artifact)
        return own_artifact

    return make


# -- numbers ---------------------------------------------------------------------------------------

NUMBERS = [-1, 0, 9, 2**31, 2**63, 10**30, -(10**30), 1.5, INFINITE, -INFINITE, NAN, "4", None, [], {}, True]


@pytest.mark.slow
@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("key", ["bits", "kept"])
def test_a_number_that_cannot_be(key: str, value: object, change: Any, refuse: Refuse) -> None:
    folder = change(lambda spec, *_: (spec["tree"] if key == "kept" else spec["tree"]["values"]).update({key: value}))
    assert str(folder) in refused(folder, refuse)


SHAPES = [
    [-72, -48],
    [0, 0],
    [72],
    [72, 48, 1],
    [72, INFINITE],
    [NAN, 48],
    [2**62, 2**62],
    [72.5, 48],
    ["72", "x"],
    None,
    7,
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("key", ["shape", "scales", "values"])
def test_a_shape_that_cannot_be(key: str, shape: object, change: Any, refuse: Refuse) -> None:
    def edit(spec: Spec, *_: Any) -> None:
        tree = spec["tree"] if key == "shape" else spec["tree"]["values"]
        tree["scales" if key == "scales" else "shape"] = shape

    refused(change(edit), refuse)


@pytest.mark.parametrize("form", [True, 25, -1, "bits", [], {}, 1.5, 10**20], ids=str)
def test_a_form_of_mask_that_is_none(form: object, change: Any, refuse: Refuse) -> None:
    assert f"{SITE}: " in refused(change(lambda spec, *_: spec["tree"].update(mask=form)), refuse)


# -- trees -----------------------------------------------------------------------------------------


def nested(spec: Spec, depth: int) -> None:
    for _ in range(depth):
        spec["tree"] = {"kind": "sum", "shape": [72, 48], "terms": [spec["tree"]]}


@pytest.mark.parametrize("depth", [64, 300, 450])
def test_a_tree_that_is_too_deep(depth: int, change: Any, refuse: Refuse) -> None:
    refused(change(lambda spec, *_: nested(spec, depth)), refuse)


@pytest.mark.slow
def test_a_tree_that_is_too_wide(change: Any, refuse: Refuse) -> None:
    def edit(spec: Spec, *_: Any) -> None:
        spec["tree"] = {"kind": "sum", "shape": [72, 48], "terms": [spec["tree"]] * 5000}

    assert "more than 64 parts" in refused(change(edit), refuse)


@pytest.mark.parametrize("kind", ["", "Dense", "__class__", "external", "os.system", None, ["sum"], {}, 3], ids=str)
def test_a_kind_that_is_none(kind: object, change: Any, refuse: Refuse) -> None:
    refused(change(lambda spec, *_: spec["tree"]["values"].update(kind=kind)), refuse)


def bomb(folder: Path, sign: Any, tree: Spec, tensors: dict[str, Tensor], shape: list[int]) -> Path:
    """An artifact whose site is `tree`, stored in hardly a byte; every file says so, and every hash is right."""
    held = {k: t for k, t in load_file(folder / SHARD).items() if not k.startswith(f"{SITE}.")}
    names = {
        path: f"{SITE}.weight" if i == 0 else f"{SITE}.weight_{path.replace('.', '_')}"
        for i, path in enumerate(tensors)
    }
    save_file({**held, **{names[path]: t for path, t in tensors.items()}}, folder / SHARD, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: f for k, f in index["weight_map"].items() if not k.startswith(f"{SITE}.")}
    index["weight_map"] |= dict.fromkeys(names.values(), SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    spec = config["quantization_config"]["weights"][SITE]
    spec |= {"tree": tree, "tensors": [[p, str(t.dtype)[6:], list(t.shape)] for p, t in tensors.items()]}
    (folder / "config.json").write_text(json.dumps(config))
    made = json.loads((folder / "compress.json").read_text())
    made["tensors"][f"{SITE}.weight"] = shape
    (folder / "compress.json").write_text(json.dumps(made))
    sign(folder)
    return folder


NOTHING = {"data": torch.zeros(0), "mask": torch.zeros(0, dtype=torch.uint8)}


def empty(shape: list[int]) -> Spec:
    """A mask that keeps nothing: no bytes denote a matrix of any size."""
    values = {"kind": "dense", "shape": shape, "dtype": "float32"}
    return {"kind": "masked", "shape": shape, "pattern": "x", "kept": 0, "mask": 1, "values": values}


def stored(at: str) -> dict[str, Tensor]:
    return {f"{at}values.data": NOTHING["data"], f"{at}mask": NOTHING["mask"]}


@pytest.mark.parametrize("side", [60_000, 3_000_000, 1 << 31])
def test_a_matrix_of_any_size_in_no_bytes(side: int, own_artifact: Path, sign: Any, refuse: Refuse) -> None:
    folder = bomb(own_artifact, sign, empty([side, side]), stored(""), [side, side])
    assert "denote" in refused(folder, refuse)


@pytest.mark.parametrize("side", [400_000, 10**9])
def test_a_square_inside_of_a_row(side: int, own_artifact: Path, sign: Any, refuse: Refuse) -> None:
    tree = {"kind": "product", "shape": [1, side], "left": empty([1, side]), "right": empty([side, side])}
    folder = bomb(own_artifact, sign, tree, stored("left.") | stored("right."), [1, side])
    assert "entries" in refused(folder, refuse)


def test_a_permutation_of_a_row(own_artifact: Path, sign: Any, refuse: Refuse) -> None:
    side = 100_000  # a few hundred kB name a square of 40 GB
    tree = {
        "kind": "product",
        "shape": [1, side],
        "left": empty([1, side]),
        "right": {"kind": "permutation", "shape": [side, side]},
    }
    order = {"right.order": torch.arange(side, dtype=torch.int32)}
    assert "entries" in refused(bomb(own_artifact, sign, tree, stored("left.") | order, [1, side]), refuse)


def test_an_empty_matrix_of_the_right_size_is_no_bomb(own_artifact: Path, sign: Any, bounded: Any) -> None:
    folder = bomb(own_artifact, sign, empty([72, 48]), stored(""), [72, 48])
    with bounded():
        assert verify(folder)
        assert not bool(Artifact(folder).matrix(SITE).any())


@pytest.mark.parametrize(
    "order",
    [torch.zeros(48), torch.arange(1, 49), torch.arange(48) - 1, torch.full((48,), 2**31 - 1), torch.arange(47),
     torch.tensor([0] * 48), torch.arange(48).float() + 0.5, torch.full((48,), -(2**31))],
)  # fmt: skip
def test_an_order_that_is_no_permutation(order: Tensor, own_artifact: Path, sign: Any, refuse: Refuse) -> None:
    right = {"kind": "permutation", "shape": [48, 48]}
    tree = {"kind": "product", "shape": [72, 48], "left": empty([72, 48]), "right": right}
    kind = torch.float32 if order.is_floating_point() else torch.int32
    refused(bomb(own_artifact, sign, tree, stored("left.") | {"right.order": order.to(kind)}, [72, 48]), refuse)


@pytest.mark.parametrize("code", [3, 255])
def test_a_code_behind_its_book(code: int, own_artifact: Path, sign: Any, refuse: Refuse) -> None:
    tree = {"kind": "codebook", "shape": [72, 48], "codes": [72, 24], "book": [3, 2],
            "scale": {"kind": "dense", "shape": [1, 1], "dtype": "float32"}}  # fmt: skip
    tensors = {
        "codes": torch.full((72 * 24 // 4,), code, dtype=torch.uint8),
        "book": torch.ones(6),
        "scale.data": torch.ones(1),
    }
    refused(bomb(own_artifact, sign, tree, tensors, [72, 48]), refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int64, torch.bool])
def test_codes_of_a_wrong_dtype(dtype: torch.dtype, own_artifact: Path, sign: Any, refuse: Refuse) -> None:
    tree = {"kind": "quantized", "shape": [72, 48], "bits": 8, "scales": [72, 1], "symmetric": True}
    tensors = {"codes": torch.ones(72 * 48, dtype=dtype), "scale": torch.ones(72, 1)}
    refused(bomb(own_artifact, sign, tree, tensors, [72, 48]), refuse)


# -- names of sites and tensors --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.layers.9.mlp.up_proj", "model.norm", "model.embed_tokens", "lm_head", "__class__", "../../x", "",
    "x" * 300]
)  # fmt: skip
def test_a_site_the_model_has_not(name: str, change: Any, refuse: Refuse) -> None:
    refused(change(lambda _, specs, __: specs.update({name: specs.pop(SITE)})), refuse)


def shared(spec: Spec, key: str) -> None:
    spec["shared"] = {spec["tensors"][1][0]: key}


def circle(_: Spec, specs: dict[str, Spec], __: Spec) -> None:
    for one, other in ((SITE, OTHER), (OTHER, SITE)):
        shared(specs[one], f"{other}.weight_{specs[one]['tensors'][1][0].replace('.', '_')}")


SHARED: dict[str, Callable[[Spec, dict[str, Spec], Spec], object]] = {
    "in a circle": circle,
    "with itself": lambda spec, *_: shared(spec, f"{SITE}.weight_{spec['tensors'][1][0].replace('.', '_')}"),
    "with a tensor of no site": lambda spec, *_: shared(spec, "lm_head.weight"),
    "with nothing": lambda spec, *_: shared(spec, "nothing"),
    "by an unknown path": lambda spec, *_: spec.update(shared={"x": "lm_head.weight"}),
    "all of it": lambda spec, *_: spec.update(shared={spec["tensors"][0][0]: f"{OTHER}.weight"}),
}


@pytest.mark.parametrize("how", SHARED)
def test_tensors_shared(how: str, change: Any, refuse: Refuse) -> None:
    refused(change(SHARED[how]), refuse)


TENSORS: dict[str, Callable[[Spec, dict[str, Spec], Spec], object]] = {
    "none": lambda spec, *_: spec.update(tensors=[]),
    "twice": lambda spec, *_: spec.update(tensors=spec["tensors"] * 2),
    "another dtype": lambda spec, *_: spec["tensors"][0].__setitem__(1, "float64"),
    "a dtype that is none": lambda spec, *_: spec["tensors"][0].__setitem__(1, "hub"),
    "terabytes": lambda spec, *_: spec["tensors"][0].__setitem__(2, [10**12]),
    "fewer than nothing": lambda spec, *_: spec["tensors"][0].__setitem__(2, [-1]),
    "another path": lambda spec, *_: spec["tensors"][0].__setitem__(0, "../x"),
    "a path of two": lambda spec, *_: spec["tensors"][1].__setitem__(0, spec["tensors"][0][0]),
    "another site's": lambda spec, *_: spec.update(tensor=f"{OTHER}.weight"),
    "the head": lambda spec, *_: spec.update(tensor="lm_head.weight"),
    "an expert's": lambda spec, *_: spec.update(expert=0),
    "expert 2**70": lambda spec, *_: spec.update(expert=2**70),
    "turned": lambda spec, *_: spec.update(transposed=True),
    "of an input that is none": lambda spec, *_: spec.update(inputs="evil"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_there(what: str, change: Any, refuse: Refuse) -> None:
    refused(change(TENSORS[what]), refuse)


@pytest.mark.parametrize(
    "kv", [{"bits": 3}, [1], "evil", {"bits": 4, "group": 0}, {"bits": 4, "residual": 10**30 + 1}, "latent",
    {"x": 1}, 7], ids=str
)  # fmt: skip
def test_a_cache_that_cannot_be(kv: object, own_artifact: Path, sign: Any, refuse: Refuse, edit_json: Any) -> None:
    edit_json(own_artifact / "config.json", lambda config: config["quantization_config"].update(kv=kv))
    sign(own_artifact)
    refuse(lambda: compress.load(own_artifact), "bad input", "hostile artifacts and deltas")


@pytest.mark.parametrize("version", ["1", 2, None, 1.5, [1]])
def test_another_version(version: object, own_artifact: Path, refuse: Refuse, edit_json: Any) -> None:
    edit_json(own_artifact / "config.json", lambda config: config["quantization_config"].update(version=version))
    assert "format version" in refused(own_artifact, refuse)


# -- compress.json ---------------------------------------------------------------------------------

PROVENANCE: dict[str, Callable[[Spec], object]] = {
    "nothing": lambda made: made.clear(),
    "no files": lambda made: made.update(files={}),
    "a file elsewhere": lambda made: made["files"].update({"../x": "0"}),
    "an absolute file": lambda made: made["files"].update({"/etc/passwd": "0"}),
    "files as a list": lambda made: made.update(files=[]),
    "an unknown field": lambda made: made.update(more=1),
    "sites as a list": lambda made: made.update(sites=[]),
    "a missing site": lambda made: made["sites"].pop(SITE),
    "negative sides": lambda made: made["tensors"].update({"lm_head.weight": [-211, -48]}),
    "another source name": lambda made: made["source"].update(name="\x1b[31mred"),
    "two lines": lambda made: made["source"].update(name="a\nb"),
    "half a pair": lambda made: made["calibration"].update(name="\ud800"),
    "infinite bytes": lambda made: made["sizes"].update(bytes=INFINITE),
    "deep": lambda made: made["machine"].update(x=json.loads("[" * 300 + "]" * 300)),
}


@pytest.mark.parametrize("what", PROVENANCE)
def test_a_provenance_that_lies(what: str, own_artifact: Path, refuse: Refuse, edit_json: Any, cli: Any) -> None:
    edit_json(own_artifact / "compress.json", PROVENANCE[what])
    refuse(lambda: verify(own_artifact), "bad input", "hostile artifacts and deltas")
    code, _, said = cli("verify", own_artifact)
    assert code in (2, 4) and said.startswith("error: ") and said.count("\n") == 1


def test_json_of_an_artifact_with_a_key_twice(own_artifact: Path, refuse: Refuse) -> None:
    text = (own_artifact / "compress.json").read_text()
    (own_artifact / "compress.json").write_text('{"recipe": "",' + text[1:])
    assert "stands twice" in refused(own_artifact, refuse)


@pytest.mark.parametrize("command", ["verify", "inspect", "export", "bench"])
def test_the_command_line_refuses_a_bomb(command: str, own_artifact: Path, sign: Any, cli: Any, bounded: Any) -> None:
    bomb(own_artifact, sign, empty([60_000, 60_000]), stored(""), [60_000, 60_000])
    with bounded():
        code, _, said = cli(command, own_artifact)
    assert "Traceback" not in said
    assert (code, said) == (0, "") if command == "inspect" else code in (2, 4) and said.count("error: ") == 1


# -- deltas and tenants ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def delta(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The difference of a model that is its base but for a few entries."""
    place = tmp_path_factory.mktemp("tuned")
    tuned = Path(shutil.copytree(tiny_llama, place / "model"))
    tensors = load_file(tuned / "model.safetensors")
    for name in tensors:
        if "mlp" in name:
            tensors[name] += torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1)) * 0.01
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(
        passes=(Magnitude(sparsity=0.5),),
        calibration=Calibration(samples=4, length=16),
        delta=Delta(base=str(tiny_llama)),
    )
    return Path(compress.run(tuned, recipe, place / "delta").out)


@pytest.mark.parametrize("sha", ["0" * 64, "", "../x", None, [], "\x1b[31m"], ids=str)
def test_a_delta_with_a_lying_base_hash(
    sha: object, delta: Path, tiny_llama: Path, tmp_path: Path, sign: Any, refuse: Refuse, edit_json: Any
) -> None:
    folder = Path(shutil.copytree(delta, tmp_path / "delta"))
    edit_json(folder / "config.json", lambda config: config["quantization_config"]["base"].update(sha256=sha))
    sign(folder)
    ways: list[Callable[[], object]] = [
        lambda: verify(folder, tiny_llama),
        lambda: compress.load(folder, base=tiny_llama),
        lambda: export_dense(folder, tmp_path / "out", tiny_llama),
        lambda: compress.merge(tiny_llama, [folder], tmp_path / "out"),
        lambda: compress.load_tenants(tiny_llama, {"one": folder}).load("one"),
    ]
    for way in ways:
        refuse(way, "bad input", "hostile artifacts and deltas")


def test_a_base_that_was_changed_is_refused(delta: Path, single: Path, refuse: Refuse) -> None:
    content = bytearray((single / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (single / "model.safetensors").write_bytes(content)
    assert "is not the base of" in refuse(
        lambda: compress.load(delta, base=single), "bad input", "hostile artifacts and deltas"
    )


def test_an_untouched_delta_is_not_refused(delta: Path, tiny_llama: Path) -> None:
    assert verify(delta, tiny_llama)
    assert compress.load(delta, base=tiny_llama) is not None


def test_a_pickle_is_not_an_artifact(own_artifact: Path, refuse: Refuse) -> None:
    for file in own_artifact.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    refused(own_artifact, refuse)
