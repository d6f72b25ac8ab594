"""Inputs of merging: what is accepted or refused, the folder's metadata, grown vocabularies, memory, and commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import compress
from compress import ArtifactError, CompressError, RecipeError
from compress.merging import METHODS, merge
from compress.model.source import digest

Odd = Callable[[str], Path]
MB = 1_000_000


# -- options ---------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"method": "tise"}, "'tise' is not a method; did you mean 'ties'"),
    ({"method": "average", "scale": 1.0}, "merge.average: unknown option 'scale'; allowed: none"),
    ({"density": 0.5}, "merge.task-arithmetic: unknown option 'density'; allowed: scale"),
    ({"scale": 0}, "merge.task-arithmetic.scale: 0 is not allowed"),
    ({"scale": NAN}, "merge.task-arithmetic.scale: nan is not allowed"),
    ({"scale": INF}, "merge.task-arithmetic.scale: inf is not allowed"),
    ({"scale": "1"}, "merge.task-arithmetic.scale: '1' is not allowed"),
    ({"method": "ties", "density": 0}, "merge.ties.density: 0 is not allowed"),
    ({"method": "ties", "density": 1.5}, "merge.ties.density: 1.5 is not allowed"),
    ({"method": "ties", "scope": "layer"}, "merge.ties.scope: 'layer' is not allowed; it must be 'model' or 'tensor'"),
    ({"method": "dare-ties", "seed": -1}, "merge.dare-ties.seed: -1 is not allowed"),
    ({"method": "dare-linear", "seed": 1.5}, "merge.dare-linear.seed: 1.5 is not allowed"),
    ({"method": "della", "density": 0.9}, "della.density: 0.9 - epsilon 0.15 must be above 0 and their sum at most 1"),
    ({"method": "della", "density": 0.1}, "merge.della.density: 0.1 - epsilon 0.15 must be above 0"),
    ({"method": "breadcrumbs", "density": 0.9, "gamma": 0.2}, "breadcrumbs.density: 0.9 + gamma 0.2 must be at most 1"),
    ({"method": "regmean", "shrink": 1.1}, "merge.regmean.shrink: 1.1 is not allowed"),
    ({"weights": {"d": 1}}, "weights: no model is called 'd'; allowed: a, b"),
    ({"weights": {"a": NAN}}, "weights.a: nan is not a finite number"),
    ({"weights": {"a": True}}, "weights.a: True is not a finite number"),
    ({"weights": {"a": "1"}}, "weights.a: '1' is not a finite number"),
    ({"weights": {"a": 101}}, "weights.a: 101 is not allowed; with task-arithmetic it must be from -100 to 100"),
    ({"weights": {"a": -1}, "method": "ties"}, "weights.a: -1 is not allowed; with ties it must be from 0 to 100"),
    ({"weights": {"a": {"layer.*": 1}}}, "weights.a: 'layer.*' matches no tensor; tensors have names such as count"),
    ({"weights": {"a": 0, "b": {"norm.*": 0}}, "method": "average"}, "no model has a weight above 0 for norm.weight"),
    ({"weights": 0.5}, "weights: 0.5 is not a mapping"),
    ({"device": "tpu", "method": "regmean"}, "--device: 'tpu' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), UNFIT, ids=[m[:50] for _, m in UNFIT])
def test_unfit_options_are_one_line(options: dict[str, Any], message: str, odd: Odd, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        merge(odd("base"), [odd("a"), odd("b")], tmp_path / "o", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("models", [[], {}, "a", None], ids=str)
def test_models_must_be_given(models: Any, odd: Odd, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a list of folders"):
        merge(odd("base"), models, tmp_path / "o")


def test_two_of_one_name_must_be_named(odd: Odd, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="two are called 'a'; name them"):
        merge(odd("base"), [odd("a"), odd("a")], tmp_path / "o")
    with pytest.raises(RecipeError, match="'x:y' is not a usable name"):
        merge(odd("base"), {"x:y": odd("a")}, tmp_path / "o")


def test_what_is_there_is_not_replaced(odd: Odd, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    with pytest.raises(RecipeError, match=r"exists; choose another folder$"):
        merge(odd("base"), [odd("a")], tmp_path / "o")
    with pytest.raises(RecipeError, match="must not be, contain or lie in the model folder"):
        merge(odd("base"), [odd("a")], odd("a") / "o")


# -- models ----------------------------------------------------------------------------------------


def refused(base: Path, model: Path, out: Path) -> str:
    before = {file: digest(file) for folder in (base, model) for file in folder.iterdir()}
    with pytest.raises(ArtifactError) as caught:
        merge(base, [model], out)
    assert "\n" not in str(caught.value)
    assert not list(out.parent.glob("o*"))
    assert before == {file: digest(file) for folder in (base, model) for file in folder.iterdir()}
    return str(caught.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite_are_refused_by_name(
    value: float, odd: Odd, changed: Callable[..., Path], tmp_path: Path
) -> None:
    bad = changed({"norm.weight": torch.full((33,), value)})
    assert "norm.weight holds NaN or infinite values" in refused(odd("base"), bad, tmp_path / "o")
    assert "norm.weight holds NaN or infinite values" in refused(bad, odd("a"), tmp_path / "o")


DIFFERENT: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
    ({"norm.weight": torch.zeros(32)}, {}, "norm.weight is [32], the base's [33]"),
    ({"norm.weight": torch.zeros(34)}, {}, "norm.weight is [34], the base's [33]"),  # not a table of the vocabulary
    ({"embed.weight": torch.zeros(62, 8)}, {}, "embed.weight is [62, 8], the base's [63, 8]"),
    ({"embed.weight": torch.zeros(64, 9)}, {}, "embed.weight is [64, 9], the base's [63, 8]"),
    ({"more": torch.zeros(3)}, {}, "changed has more, the base does not"),
    ({"norm.weight": torch.zeros(33, dtype=torch.int32)}, {}, "norm.weight holds I32, the base's F32"),
    ({"count": torch.tensor([4])}, {}, "count holds I64 and differs from the base's"),
    ({}, {"model_type": "mistral"}, "config.json says model_type 'mistral', the base's 'llama'"),
    ({}, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
     "config.json says rope_parameters.rope_type 'linear', the base's 'default'"),
    ({}, {"rms_norm_eps": 0.5}, "config.json says rms_norm_eps 0.5, the base's 1e-06"),  # the base leaves it out
    ({}, {"quantization_config": {"quant_method": "gptq"}}, "already quantized by gptq"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "message"), DIFFERENT, ids=[m for _, _, m in DIFFERENT])
def test_another_architecture_is_refused_by_its_first_difference(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, odd: Odd, changed: Any, tmp_path: Path
) -> None:
    assert message in refused(odd("base"), changed(tensors, **config), tmp_path / "o")


def test_a_tensor_that_only_the_base_has_is_named(odd: Odd, changed: Any, tmp_path: Path) -> None:
    base = changed({"more": torch.zeros(3)}, "base")
    assert "a: the base has more, a does not" in refused(base, odd("a"), tmp_path / "o")


def test_another_rotation_is_refused(changed: Any, tmp_path: Path) -> None:
    base = changed({}, "base", name="x", rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, use_cache=True)
    tuned = changed({}, name="y", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, use_cache=False)
    assert "rope_parameters.rope_theta 1000000.0, the base's 10000.0" in refused(base, tuned, tmp_path / "o")


def test_values_too_large_for_the_dtype_are_refused(odd: Odd, changed: Any, tmp_path: Path) -> None:
    big = changed({"layers.1.stack": torch.full((3, 4, 5), 60000.0, dtype=torch.float16)})
    with pytest.raises(ArtifactError, match=r"layers.1.stack: merged values are too large for torch.float16"):
        merge(odd("base"), [big], tmp_path / "o", scale=2.0)


def test_a_wider_file_is_merged_into_the_dtype_of_the_base(odd: Odd, changed: Any, read: Any, tmp_path: Path) -> None:
    wide = torch.randn(17, 33, generator=torch.Generator().manual_seed(1))
    merge(odd("base"), [changed({"layers.0.up.weight": wide})], tmp_path / "o")
    assert torch.equal(read(tmp_path / "o")["layers.0.up.weight"], wide.bfloat16())


# -- vocabularies ----------------------------------------------------------------------------------


def longer(read: Any, folder: Path, rows: int, seed: int = 5) -> dict[str, Tensor]:
    table = read(folder)["embed.weight"]
    more = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return {"embed.weight": torch.cat((table, more))}


def test_new_rows_come_from_the_model_that_has_them(odd: Odd, changed: Any, read: Any, tmp_path: Path) -> None:
    tables = longer(read, odd("a"), 3)
    grown = changed(tables, vocab_size=66, eos_token_id=64)
    (grown / "tokenizer.json").write_text('{"new": 1}')
    merge(odd("base"), {"a": grown, "b": odd("b")}, tmp_path / "o", method="average")
    made = read(tmp_path / "o")["embed.weight"]
    mean = (tables["embed.weight"][:63].double() + read(odd("b"))["embed.weight"].double()) / 2
    assert torch.equal(made[63:], tables["embed.weight"][63:])
    torch.testing.assert_close(made[:63], mean.bfloat16(), rtol=2**-8, atol=0)
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (66, 64)
    assert (tmp_path / "o" / "tokenizer.json").read_text() == '{"new": 1}'


def test_new_rows_of_several_need_one_tokenizer(odd: Odd, changed: Any, read: Any, tmp_path: Path) -> None:
    both = {}
    for seed, name in enumerate("xy"):
        both[name] = changed(longer(read, odd("a"), 3, seed), name=name, vocab_size=66)
        (both[name] / "tokenizer.json").write_text('{"new": 1}')
    merge(odd("base"), both, tmp_path / "o")
    rows = [read(folder)["embed.weight"][63:].double() for folder in both.values()]
    assert torch.equal(read(tmp_path / "o")["embed.weight"][63:], ((rows[0] + rows[1]) / 2).bfloat16())
    (both["y"] / "tokenizer.json").write_text('{"new": 2}')
    with pytest.raises(ArtifactError, match=r"both add to the base's vocabulary, with different tokenizers"):
        merge(odd("base"), both, tmp_path / "p")


# -- what is written -------------------------------------------------------------------------------


def test_the_folder_says_what_was_merged(odd: Odd, tmp_path: Path) -> None:
    weights = {"a": {"*": 0.5, "layers.*": 1}}
    done = merge(odd("base"), [odd("a"), odd("b")], tmp_path / "o", method="ties", weights=weights, density=0.3)
    told = json.loads((tmp_path / "o" / "compress.json").read_text())
    assert told["merge"]["method"] == "ties"
    assert told["merge"]["options"] == {"density": 0.3, "scale": 1.0, "scope": "model"}
    assert list(told["merge"]["models"]) == ["a", "b"]
    assert told["merge"]["models"]["a"]["weights"] == {"*": 0.5, "layers.*": 1}
    for name, model in [("base", told["merge"]["base"]), *told["merge"]["models"].items()]:
        assert model["sha256"] == {"model.safetensors": digest(odd(name) / "model.safetensors")}
    assert told["files"].keys() == {f.name for f in (tmp_path / "o").iterdir()} - {"compress.json"}
    assert all(digest(tmp_path / "o" / name) == sha for name, sha in told["files"].items())
    assert str(odd("a")) not in json.dumps(told)
    card = (tmp_path / "o" / "README.md").read_text()
    assert "method `ties` (density 0.3, scope model, scale 1.0)" in card
    assert f"| a | a | 0.5, 1 in `layers.*` | {done.changed['a']:,} | {done.kept['a']:,} |" in card


def test_the_same_merge_writes_the_same_bytes(odd: Odd, tmp_path: Path) -> None:
    folders = [merge(odd("base"), [odd("a"), odd("b")], tmp_path / n, method="della").out for n in "xy"]
    files = [{file.name: digest(file) for file in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]


def test_a_merged_model_is_an_ordinary_one(
    tiny_llama: Path, tuned_llamas: dict[str, Path], hugging_face: Any, ids: Tensor, tmp_path: Path
) -> None:
    merge(tiny_llama, tuned_llamas, tmp_path / "o", method="average")
    made, base = hugging_face(tmp_path / "o"), hugging_face(tiny_llama)
    sides = [hugging_face(folder) for folder in tuned_llamas.values()]
    with torch.inference_mode():
        for parameter, *both in zip(made.parameters(), *(side.parameters() for side in sides), strict=True):
            parameter.sub_((both[0] + both[1]) / 2)
            assert float(parameter.abs().max()) < 1e-6
        assert not torch.equal(base(ids).logits, sides[0](ids).logits)
    assert {f.name for f in tiny_llama.glob("tokenizer*")} <= {f.name for f in (tmp_path / "o").iterdir()}
    recipe = compress.Recipe(passes=(compress.RTN(group=24),))
    assert compress.run(tmp_path / "o", recipe, tmp_path / "small").fallbacks == 0


# -- memory ----------------------------------------------------------------------------------------

SIDE, COUNT = 1024, 24  # 50 MB a model in bfloat16, 2 MB a tensor


def large(folder: Path, seed: int) -> Path:
    folder.mkdir()
    draws = torch.Generator().manual_seed(seed)
    one = torch.randn(SIDE, SIDE, generator=draws).bfloat16()
    tensors = {f"layers.{i}.weight": one + i / 64 for i in range(COUNT)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    return folder


def peak(code: str, *arguments: object) -> int:
    """Peak resident bytes of a process, pages mapped from files included."""
    with subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        said = child.stderr.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, said
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_memory_is_a_few_tensors(tmp_path: Path) -> None:
    folders = [large(tmp_path / f"m{i}", i) for i in range(4)]
    begin = "import sys\nfrom compress.merging import merge\nfrom compress.model.memory import release_early\n"
    run = "release_early()\nmerge(*sys.argv[1:2], sys.argv[2:5], sys.argv[5], method='ties', shard_size=20_000_000)"
    idle, busy = peak(begin), peak(begin + run, *folders, tmp_path / "o")
    assert busy - idle < COUNT * SIDE * SIDE * 2  # one of the four models; pages mapped from files count too


# -- compressed deltas -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deltas(tiny_llama: Path, tuned_llamas: dict[str, Path], tmp_path_factory: Any) -> dict[str, Path]:
    """The tuned Llamas as differences of four bits from their base."""
    recipe = compress.Recipe(passes=(compress.RTN(group=24),), delta=compress.Delta(base=str(tiny_llama)))
    root = tmp_path_factory.mktemp("deltas")
    return {name: compress.run(folder, recipe, root / name).out for name, folder in tuned_llamas.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_deltas_are_merged_as_what_they_decode_to(
    method: str, tiny_llama: Path, deltas: dict[str, Path], read: Any, same: Any, tmp_path: Path
) -> None:
    from compress.export.dense import export_dense

    applied = {name: export_dense(folder, tmp_path / name, tiny_llama).out for name, folder in deltas.items()}
    merge(tiny_llama, deltas, tmp_path / "o", method=method)
    merge(tiny_llama, applied, tmp_path / "p", method=method)
    assert same(read(tmp_path / "o"), read(tmp_path / "p"))
    told = json.loads((tmp_path / "o" / "compress.json").read_text())["merge"]["models"]["left"]
    assert told["decoded_from"] == "compress"
    assert told["sha256"].keys() == {file.name for file in deltas["left"].glob("*.safetensors")}
    assert "quantization_config" not in json.loads((tmp_path / "o" / "config.json").read_text())


def test_a_delta_alone_is_itself(
    tiny_llama: Path, deltas: dict[str, Path], read: Any, same: Any, tmp_path: Path
) -> None:
    from compress.export.dense import export_dense

    calibration = compress.Calibration(data="text", samples=2, length=16)
    merge(tiny_llama, [deltas["left"]], tmp_path / "o", method="regmean", calibration=calibration)
    assert same(read(tmp_path / "o"), read(export_dense(deltas["left"], tmp_path / "d", tiny_llama).out))


def test_a_delta_with_new_tokens_brings_them(tiny_llama: Path, read: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<one>", "<two>"])
    model.resize_token_embeddings(213, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    recipe = compress.Recipe(passes=(compress.RTN(group=24),), delta=compress.Delta(base=str(tiny_llama)))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "grown")
    delta = compress.run(tmp_path / "grown", recipe, tmp_path / "delta").out
    merge(tiny_llama, [delta], tmp_path / "o")
    made, want = read(tmp_path / "o"), model.state_dict()
    assert torch.equal(made["model.embed_tokens.weight"], want["model.embed_tokens.weight"])
    assert torch.equal(made["lm_head.weight"], want["lm_head.weight"])
    assert json.loads((tmp_path / "o" / "config.json").read_text())["vocab_size"] == 213
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "o" / file).read_bytes() == (tmp_path / "grown" / file).read_bytes()


def test_a_delta_of_another_base_is_refused(
    tiny_llama: Path, tuned_llamas: dict[str, Path], deltas: dict[str, Path], tmp_path: Path
) -> None:
    assert "is not the base of" in refused(tuned_llamas["right"], deltas["left"], tmp_path / "o")
    assert "is a delta of" in refused(deltas["left"], tiny_llama, tmp_path / "o")


# -- the command line ------------------------------------------------------------------------------


def test_the_command_merges(odd: Odd, read: Any, same: Any, cli: Any, tmp_path: Path) -> None:
    code, out, _ = cli(
        "merge", odd("base"), odd("a"), f"other={odd('b')}", "--out", tmp_path / "o", "--method", "ties", "--density",
        "0.5", "--weights", "other=2", "--weights", "a:layers.*=0.5", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["kept"].keys() == {"a", "other"}
    weights = {"other": 2, "a": {"layers.*": 0.5}}
    merge(odd("base"), {"a": odd("a"), "other": odd("b")}, tmp_path / "p", method="ties", density=0.5, weights=weights)
    assert same(read(tmp_path / "o"), read(tmp_path / "p"))


def test_the_command_calibrates_each_model(
    tiny_llama: Path, tuned_llamas: dict[str, Path], read: Any, same: Any, cli: Any, tmp_path: Path
) -> None:
    given = [f"{name}={folder}" for name, folder in tuned_llamas.items()]
    code, out, _ = cli(
        "merge", tiny_llama, *given, "--out", tmp_path / "o", "--method", "regmean", "--data", "text",
        "--data", "left=mixed", "--samples", "4", "--length", "32",
    )  # fmt: skip
    assert code == 0
    assert "entries kept: left" in out
    told = {name: compress.Calibration(data=data, samples=4, length=32) for name, data in
            (("left", "mixed"), ("right", "text"))}  # fmt: skip
    merge(tiny_llama, tuned_llamas, tmp_path / "p", method="regmean", calibration=told)
    assert same(read(tmp_path / "o"), read(tmp_path / "p"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "a"], "--weights: 'a' is not NAME=NUMBER or NAME:GLOB=NUMBER"),
        (["--weights", "a=x"], "--weights: 'a=x' is not"),
        (["--weights", "a:=1"], "--weights: 'a:=1' is not"),
        (["--weights", "c=1"], "error: --weights: no model is called 'c'; allowed: a"),
        (["--weights", "a=101"], "error: --weights.a: 101.0 is not allowed"),
        (["--method", "tise"], "error: --method: 'tise' is not a method; did you mean 'ties'"),
        (["--density", "0.5"], "error: --density: task-arithmetic has no such option; it has --scale"),
        (["--method", "average", "--scale", "2"], "error: --scale: average has no such option; it has none"),
        (["--method", "ties", "--density", "2"], "error: --density: 2.0 is not allowed; it must be less than"),
        (["--method", "della", "--density", "0.1"], "error: --density: 0.1 - epsilon 0.15 must be above 0"),
        (["--samples", "4"], "error: --samples: task-arithmetic uses no calibration data; only regmean does"),
        (["--data", "text", "--length", "4"], "error: --data: task-arithmetic uses no calibration data"),
        (["--method", "regmean", "--data", "c=text"], "error: --data: no model is called 'c'"),
        (["--method", "regmean", "--samples", "0"], "error: --samples: 0 is not allowed"),
        (["--scale", "nan"], "error: --scale: nan is not allowed"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], message: str, odd: Odd, cli: Any, tmp_path: Path
) -> None:
    code, out, err = cli("merge", odd("base"), odd("a"), "--out", tmp_path / "o", *arguments)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_a_shell_left_empty_is_refused(odd: Odd, cli: Any, tmp_path: Path) -> None:
    """`$NAME=FOLDER` without a NAME; --weights and --data could then say nothing of this model."""
    code, _, err = cli("merge", odd("base"), f"={odd('a')}", "--out", tmp_path / "o")
    assert code == 2 and "has no name before the =; give FOLDER, or NAME=FOLDER" in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_knows_every_method_and_option() -> None:
    from dataclasses import fields
    from inspect import getsource, signature

    from compress.commands.merge import merge as command

    options = {field.name for kind in METHODS.values() for field in fields(kind)}
    assert options <= signature(command).parameters.keys()
    assert ", ".join(sorted(METHODS)) in getsource(command)


def test_errors_are_ours(odd: Odd, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no model folder at"):
        merge(odd("base"), [tmp_path / "nowhere"], tmp_path / "o")
