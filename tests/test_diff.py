"""`compress diff` compares two folders tensor by tensor, and exits with 0 if they are equal, else with 1."""

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

from compress import GPTQ, RTN, ArtifactError, Calibration, Magnitude, Wanda, run
from compress.artifact import Artifact
from compress.commands import diff as diffs
from compress.differences import compare, relative_error
from compress.model.source import Checkpoint

Command = Callable[..., tuple[int, str, str]]
FEW = Calibration(samples=4, length=32)
SITE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="session")
def pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two artifacts of one model that differ in how a mask is chosen, and in bits."""
    place = tmp_path_factory.mktemp("pair")
    one = run(tiny_llama, [Magnitude(sparsity="2:4")], place / "magnitude", calibration=FEW).out
    other = run(tiny_llama, [Wanda(sparsity="2:4"), GPTQ(bits=4, group=24)], place / "wanda", calibration=FEW).out
    return one, other


def test_a_folder_equals_itself_and_a_copy(llama_artifact: Path, own_artifact: Path, cli: Command) -> None:
    found = compare(llama_artifact, own_artifact)
    assert found.equal
    assert (found.same, found.tensors) == (len(Artifact(llama_artifact).names()), ())
    code, out, err = cli("diff", llama_artifact, own_artifact)
    assert (code, err) == (0, "")
    assert "equal" in out and "different" not in out


@pytest.mark.slow
def test_errors_masks_and_bits_are_those_of_the_matrices(pair: tuple[Path, Path]) -> None:
    one, other = (Artifact(folder) for folder in pair)
    row = next(row for row in compare(*pair).tensors if row.name == f"{SITE}.weight")
    a, b = (artifact.expression(SITE) for artifact in (one, other))
    assert row.error == pytest.approx(float((a.dense() - b.dense()).norm() / a.dense().norm()), rel=1e-5)
    agree = float((a.mask_OI == b.mask_OI).float().mean())  # type: ignore[attr-defined]
    assert 0.5 < agree < 1 and row.mask == pytest.approx(agree)
    assert row.forms == ("2:4", "2:4·int4g24")
    assert row.bits == (8 * a.nbytes() / 72 / 48, 8 * b.nbytes() / 72 / 48)


def test_recipes_differ_by_key(pair: tuple[Path, Path]) -> None:
    found = compare(*pair)
    first, second = found.recipe["passes.0"], found.recipe["passes.1"]
    assert [list(step) for step in first] == [["magnitude"], ["wanda"]]
    assert second[0] is None and second[1]["gptq"]["bits"] == 4
    assert found.recipe.keys() == {"passes.0", "passes.1", "calibration"}  # magnitude reads no tokens
    assert not found.versions
    assert not found.equal


def test_a_dense_model_is_compared_with_its_artifact(tiny_llama: Path, pair: tuple[Path, Path]) -> None:
    found = compare(tiny_llama, pair[0])
    assert len(found.tensors) == 14 and found.recipe == {}
    assert {row.forms for row in found.tensors} == {("F32", "2:4")}
    assert found.same == len(Checkpoint(tiny_llama).names()) - 14
    assert found.bytes == (Checkpoint(tiny_llama).nbytes(), Artifact(pair[0]).provenance["sizes"]["bytes"])


def changed(folder: Path, place: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a model folder with other tensors."""
    shutil.copytree(folder, place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_tensors_of_one_folder_only_and_of_other_shapes_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["extra"] = torch.zeros(2)
        del tensors["lm_head.weight"]
        tensors["model.norm.weight"] = torch.zeros(5)
        tensors[f"{SITE}.weight"] = 2 * tensors[f"{SITE}.weight"]

    found = compare(tiny_llama, changed(tiny_llama, tmp_path / "m", change))
    assert {row.name: (row.where, row.error) for row in found.tensors} == {
        "extra": ("only in B", None),
        "lm_head.weight": ("only in A", None),
        "model.norm.weight": ("another shape", None),
        f"{SITE}.weight": ("different", 1.0),
    }


def test_another_dtype_of_the_same_values_is_said_to_be_so(tiny_llama: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()

    (row,) = compare(tiny_llama, changed(tiny_llama, tmp_path / "m", change)).tensors
    assert (row.where, row.error, row.bits) == ("same values, stored differently", 0.0, (32.0, 64.0))


def test_what_is_not_a_number_is_not_equal_to_another(tiny_llama: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    broken = changed(tiny_llama, tmp_path / "m", change)
    (row,) = compare(tiny_llama, broken).tensors
    assert row.where == "different"
    assert compare(broken, broken).equal


def edited(folder: Path, place: Path, name: str, **changes: Any) -> Path:
    """A copy of a model folder with other settings in one of its JSON files."""
    shutil.copytree(folder, place)
    held = json.loads((place / name).read_text())
    (place / name).write_text(json.dumps({**held, **changes}))
    return place


def test_what_the_model_computes_and_reads_is_compared(tiny_llama: Path, tmp_path: Path, cli: Command) -> None:
    cases = {
        "config.json": ({"rms_norm_eps": 0.5}, "config: rms_norm_eps: 1e-06 and 0.5"),
        "generation_config.json": ({"top_k": 3}, "files: generation_config.json: "),
        "tokenizer.json": ({"version": "2"}, "files: tokenizer.json: "),
    }
    for name, (changes, said) in cases.items():
        code, out, err = cli("diff", tiny_llama, edited(tiny_llama, tmp_path / name, name, **changes))
        assert (code, err) == (1, ""), name
        assert out.count(said) == 1
        assert out.count("config: ") + out.count("files: ") == 1


def test_what_says_nothing_of_the_model_is_not_compared(llama_artifact: Path, tmp_path: Path) -> None:
    other = edited(llama_artifact, tmp_path / "m", "config.json", transformers_version="9", _name_or_path="x")
    assert compare(llama_artifact, other).equal


def test_config_is_compared_by_key_and_a_cache_with_it(llama_artifact: Path, tmp_path: Path) -> None:
    held = json.loads((llama_artifact / "config.json").read_text())
    changes = {"eos_token_id": [2, 3], "rope_parameters": {**held["rope_parameters"], "rope_theta": 5.0},
               "quantization_config": {**held["quantization_config"], "kv": {"bits": 4}}}  # fmt: skip
    found = compare(llama_artifact, edited(llama_artifact, tmp_path / "m", "config.json", **changes))
    assert found.config == {
        "eos_token_id": (held["eos_token_id"], [2, 3]),
        "rope_parameters.rope_theta": (held["rope_parameters"]["rope_theta"], 5.0),
        "kv": (None, {"bits": 4}),
    }


def test_a_value_that_does_not_show_is_escaped(tiny_llama: Path, tmp_path: Path, cli: Command) -> None:
    other = edited(tiny_llama, tmp_path / "m", "config.json", **{"[red]\x1b": "\x1b]0;title\nequal"})
    code, out, _ = cli("diff", tiny_llama, other)
    assert code == 1
    assert r"config: [red]\x1b: absent and \x1b]0;title\nequal" in out


def test_a_matrix_of_zeros_differs_without_end() -> None:
    assert relative_error(torch.zeros(3), torch.ones(3)) == float("inf")
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(4, 4), torch.zeros(4, 4)) == 1


def test_one_tensor_of_each_is_read_at_a_time(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    plain = Artifact.tensor

    def tensor(self: Artifact, name: str) -> Tensor:
        order.append(name)
        return plain(self, name)

    monkeypatch.setattr(Artifact, "tensor", tensor)
    compare(*pair)
    assert order[::2] == order[1::2] == sorted(order[::2])


def test_the_command_exits_with_1_and_shows_what_differs(pair: tuple[Path, Path], cli: Command) -> None:
    code, out, err = cli("diff", *pair)
    assert (code, err) == (1, "")
    for said in (SITE, "masks agree", "recipe: passes.1: absent and gptq(sites=*, ", "evaluations are not compared"):
        assert said in out


def test_the_command_gives_json_without_infinities(tiny_llama: Path, tmp_path: Path, cli: Command) -> None:
    zero = changed(tiny_llama, tmp_path / "m", lambda tensors: tensors["model.norm.weight"].zero_())
    code, out, _ = cli("diff", zero, tiny_llama, "--json")
    told = json.loads(out, parse_constant=lambda text: pytest.fail(text))
    assert (code, told["equal"]) == (1, False)
    assert [row["error"] for row in told["tensors"]] == ["inf"]


@pytest.mark.parametrize("kept", ["one.eval", "other.eval"])
def test_results_are_found_beside_either_folder(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffs, "compared", lambda a, b: ([], f"{a.parent.name} {b.parent.name}"))
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        (tmp_path / kept / name).mkdir(parents=True)
        (tmp_path / kept / name / "results.json").touch()
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert diffs.compared_beside(one, other) == ([], "one other")
    assert diffs.compared_beside(other, one) == ([], "other one")
    evaluation = tmp_path / kept
    assert [place.parent.name for place in diffs.named((evaluation, evaluation), one, other)] == ["one", "other"]
    assert diffs.named((evaluation / "other", Path("x")), one, other) == (evaluation / "other", Path("x"))


def test_a_result_of_another_folder_of_that_name_is_not_taken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "m").mkdir(parents=True)
        (tmp_path / name / "m" / "config.json").touch()
    (tmp_path / "a" / "m.eval" / "m").mkdir(parents=True)
    (tmp_path / "a" / "m.eval" / "m" / "results.json").touch()
    assert diffs.beside(str(tmp_path / "a" / "m"), str(tmp_path / "b" / "m")) is None
    for name in ("a-m", "b-m"):
        (tmp_path / "a" / "m.eval" / name).mkdir()
        (tmp_path / "a" / "m.eval" / name / "results.json").touch()
    found = diffs.beside(str(tmp_path / "a" / "m"), str(tmp_path / "b" / "m"))
    assert found is not None and [place.parent.name for place in found] == ["a-m", "b-m"]


def test_deltas_need_their_base(tiny_llama: Path, tmp_path: Path, cli: Command) -> None:
    from compress import Delta, Recipe

    tuned = changed(tiny_llama, tmp_path / "t", lambda tensors: tensors[f"{SITE}.weight"].add_(0.01))
    recipe = Recipe(passes=(RTN(bits=4, group=8),), delta=Delta(base=str(tiny_llama)))
    delta = run(tuned, recipe, tmp_path / "d").out
    code, out, err = cli("diff", delta, tuned)
    assert (code, out, err.count("\n")) == (2, "", 1) and "give its base with --base" in err
    assert [row.name for row in compare(delta, tuned, tiny_llama).tensors if row.error] == [f"{SITE}.weight"]


def test_bad_input_is_one_line_and_exit_code_2(pair: tuple[Path, Path], tmp_path: Path, cli: Command) -> None:
    for name in ("small", "builtin"):
        (tmp_path / "e" / name).mkdir(parents=True)
        (tmp_path / "e" / name / "results.json").touch()
    bad: dict[str, tuple[object, ...]] = {
        "no model folder at '/nowhere'": (pair[0], "/nowhere"),
        "no results.json there; write one": (*pair, "--results", tmp_path, tmp_path),
        "no results.json there, only those of builtin, small; write": (*pair, "--results", *[tmp_path / "e"] * 2),
    }
    for said, line in bad.items():
        code, out, err = cli("diff", *line)
        assert (code, out, err.count("\n")) == (2, "", 1), said
        assert said in err
    with pytest.raises(ArtifactError):
        compare(pair[0], "/nowhere")
