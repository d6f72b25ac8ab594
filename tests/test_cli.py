"""The command line as a user sees it: its output, the files it leaves behind, and its error messages.

Every refusal is one line on stderr with the right exit code; nothing is half-written, and inputs are unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.recipe import packaged, parse

Run = Callable[..., tuple[int, str, str]]
RECIPE = "passes:\n  - wanda: {sparsity: 2:4}\n  - gptq: {bits: 4, group: 24}\ncalibration: {samples: 4, length: 32}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_run_writes_a_verified_artifact_and_prints_json(
    cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    code, out, _ = cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["out"] == str(tmp_path / "o")
    assert report["artifact_bytes"] < report["source_bytes"]
    assert cli("verify", tmp_path / "o")[0] == 0


def test_progress_names_every_block_and_goes_to_stderr(
    cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    _, out, err = cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o")
    assert "block 1/2" in err
    assert "block 2/2" in err
    assert "peak" in err
    assert "block" not in out


def test_inspect_shows_each_site_with_its_weight(cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o")
    view = json.loads(cli("inspect", tmp_path / "o", "--json")[1])
    assert len(view["sites"]) == 14
    assert view["sites"]["model.layers.0.mlp.up_proj"]["weight"] == "2:4·int4g24"
    assert "model.layers.1.self_attn.o_proj" in cli("inspect", tmp_path / "o")[1]


def test_events_are_logged_as_json_lines(cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o", "--log", tmp_path / "log.jsonl")
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events[0] == "RunStarted"
    assert events[-1] == "RunFinished"
    assert events.count("WeightRewritten") == 28


@pytest.mark.slow
def test_export_dense_refuses_an_existing_folder(cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o")
    assert cli("export", tmp_path / "o", "--to", "dense", "--out", tmp_path / "d")[0] == 0
    code, _, err = cli("export", tmp_path / "o", "--to", "dense", "--out", tmp_path / "d")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "exists" in err


DEFAULTS = {"run": "out/<recipe>", "export": "<folder>-<format>", "delta extract": "out/<folder>-<method>",
            "delta apply": "<folder>-applied"}  # fmt: skip


@pytest.mark.parametrize("command", DEFAULTS)
def test_help_says_where_a_command_writes_by_default(command: str, cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert f"folder to write; must not exist; default: {DEFAULTS[command]}" in cli(*command.split(), "--help")[1]


@pytest.mark.parametrize("command", ["", "run", "delta", "delta apply"])
def test_help_is_also_asked_for_in_short(command: str, cli: Run) -> None:
    short, long = cli(*command.split(), "-h"), cli(*command.split(), "--help")
    assert short == long and short[0] == 0 and "Usage: " in short[1]


def printed_to(stdout: Any, **more: Any) -> tuple[int, str]:
    """The exit code and stderr of `compress recipes` in a process of its own, printing to that."""
    done = subprocess.run(
        [sys.executable, "-m", "compress", "recipes"], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120,
        check=False, **more,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_difference() -> None:
    read, write = os.pipe()
    os.close(read)
    assert printed_to(write) == (141, "")
    os.close(write)


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        assert printed_to(full) == (2, "error: stdout: cannot be written: No space left on device\n")


@pytest.mark.slow
def test_a_closed_stdout_is_no_bug() -> None:
    assert printed_to(None, preexec_fn=partial(os.close, 1)) == (0, "")


@pytest.mark.slow
def test_a_name_that_stdout_cannot_say_is_escaped(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "\xfc")
    done = subprocess.run(
        [sys.executable, "-m", "compress", "inspect", tmp_path / "\xfc"], capture_output=True, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True,
    )  # fmt: skip
    assert b"\\xfc: sites of llama" in b" ".join(done.stdout.split())  # the folder of a test may fill a line


WRITING = (
    "run rtn-int4 --model builtin", "export x", "merge x y", "plan quickstart", "eval x", "sweep x", "tune",
    "leaderboard x",
)  # fmt: skip


@pytest.mark.parametrize("line", WRITING)
def test_an_empty_out_is_not_taken_for_the_current_folder(line: str, cli: Run) -> None:
    assert cli(*line.split(), "--out", "") == (2, "", "error: --out: is empty; give a path to write to\n")


def test_export_names_the_formats_it_knows(cli: Run, tmp_path: Path) -> None:
    code, _, err = cli("export", tmp_path, "--to", "onnx")
    assert code == 2
    assert "allowed: bitsandbytes, compressed-tensors, dense, gguf, gptq" in err


@pytest.mark.slow
def test_verify_exits_4_on_a_flipped_byte(cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o")
    shard = sorted((tmp_path / "o").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data))
    code, _, err = cli("verify", tmp_path / "o")
    assert code == 4
    assert shard.name in err
    code, out, _ = cli("verify", tmp_path / "o", "--json")
    told = json.loads(out)
    assert (code, told["ok"], told["checks"]) == (4, False, []) and shard.name in told["error"]


@pytest.mark.slow
def test_bench_puts_dense_and_compressed_side_by_side(cli: Run, llama_artifact: Path) -> None:
    code, out, _ = cli("bench", llama_artifact, "--rows", "1,2", "--low-memory")
    assert code == 0
    assert "4 x q_proj, o_proj" in out
    assert "decoded at each call" in out
    assert "threads 1, dtype float32" in out
    assert "greedy generation" not in out


@pytest.mark.slow
def test_bench_generates_with_the_named_base(cli: Run, llama_artifact: Path, tiny_llama: Path) -> None:
    sizes = ["--prompt", 4, "--new", 6, "--runs", 2, "--rows", "1"]
    view = json.loads(cli("bench", llama_artifact, "--generate", "--base", tiny_llama, *sizes, "--json")[1])
    assert [row["name"] for row in view["generation"]["models"]] == ["dense", "compressed"]
    assert len(view["layers"]) == 4
    out = cli("bench", llama_artifact, "--generate", "--base", tiny_llama, *sizes, "--low-memory")[1]
    assert "4 + 6 tokens, medians of 2 runs" in out
    assert "compressed, low memory" in out


BENCH = {
    "no folder": (["nowhere"], "no model folder at 'nowhere'"),
    "not ours": (["{dense}"], "not a Compress artifact"),
    "rows as words": (["{ours}", "--rows", "1,few"], "--rows: '1,few' is not a list of whole numbers"),
    "no rows": (["{ours}", "--rows", "0"], "--rows: '0' is not"),
    "base alone": (["{ours}", "--base", "{dense}"], "--base: is used only with --generate"),
    "no such device for layers": (["{ours}", "--device", "cuda:99"], "cuda:99"),
    "no such device": (["{ours}", "--generate", "--base", "{dense}", "--device", "cuda:99"], "cuda:99"),
    "no base": (["{ours}", "--generate"], "--base: give the dense model"),
    "another base": (["{ours}", "--generate", "--base", "builtin"], "other weights"),
    "not ours, generating": (["{dense}", "--generate", "--base", "{dense}"], "not a Compress artifact"),
    "too long": (["{ours}", "--generate", "--base", "{dense}"], "dense allows at most 128"),
    "no tokens": (["{ours}", "--generate", "--new", "0"], "--new"),
}


@pytest.mark.parametrize("case", BENCH)
def test_bench_refuses_in_one_line(case: str, cli: Run, llama_artifact: Path, tiny_llama: Path) -> None:
    line, expected = BENCH[case]
    code, out, err = cli("bench", *(part.format(ours=llama_artifact, dense=tiny_llama) for part in line))
    assert expected in err
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)


def test_passes_lists_options_defaults_and_source(cli: Run) -> None:
    rows = {row["name"]: row for row in json.loads(cli("passes", "--json")[1])["passes"]}
    assert {"magnitude", "wanda", "rtn", "gptq"} <= rows.keys()
    assert all(row["source"] and row["summary"] for row in rows.values())
    assert {o["name"]: o["default"] for o in rows["gptq"]["options"]}["damping"] == 0.01
    assert "Frantar" in cli("passes")[1]


def test_passes_shows_one_by_name(cli: Run) -> None:
    (row,) = json.loads(cli("passes", "gptq", "--json")[1])["passes"]
    assert row["name"] == "gptq" and row in json.loads(cli("passes", "--json")[1])["passes"]
    shown = cli("passes", "gptq")[1]
    assert "Frantar" in shown and "wanda" not in shown
    assert cli("passes", "gtpq") == (2, "", "error: no pass 'gtpq'; did you mean 'gptq'?\n")


def test_recipes_are_listed_with_their_figures_and_printed_as_they_are(cli: Run) -> None:
    rows = {row["name"]: row for row in json.loads(cli("recipes", "--json")[1])["recipes"]}
    assert {*rows} == {*packaged()}
    assert all(row["what"] and row["source"] and row["result"] and row["kl"] is not None for row in rows.values())
    assert (rows["gptq-int4"]["bits"], rows["gptq-int4"]["kl"], rows["flap-20"]["bits"]) == (4.31, 0.007, None)
    shown = cli("recipes")[1]
    assert all(name in shown for name in rows)
    code, text, _ = cli("recipes", "wanda-2of4")
    assert code == 0 and parse(text) == parse(packaged()["wanda-2of4"].read_text())
    assert json.loads(cli("recipes", "wanda-2of4", "--json")[1])["text"] == packaged()["wanda-2of4"].read_text()


def test_a_name_like_none_points_to_the_list(cli: Run) -> None:
    code, out, err = cli("recipes", "wanda-2of5")
    assert (code, out) == (2, "") and "did you mean 'wanda-2of4'" in err
    code, out, err = cli("run", "zzzz", "--model", "builtin")
    assert (code, out) == (2, "") and err.endswith(
        "no recipe file at 'zzzz'; `compress recipes` lists the packaged recipes\n"
    )


def test_what_is_no_recipe_is_named(cli: Run, tiny_llama: Path, tmp_path: Path) -> None:
    code, _, err = cli("run", tiny_llama / "config.json")
    assert code == 2 and err.startswith(f"error: {tiny_llama / 'config.json'}: unknown key 'architectures'")
    code, _, err = cli("run", tiny_llama)
    said = f"error: no recipe file at '{tiny_llama}', which is a folder"
    assert (code, err) == (2, f"{said}; to name a model, use --model {tiny_llama}\n")
    assert cli("run", tmp_path)[2] == f"error: no recipe file at '{tmp_path}', which is a folder\n"


def test_version_prints_the_version(cli: Run) -> None:
    from compress import __version__

    assert cli("--version")[1].strip() == f"compress {__version__}"


BAD = {
    "unknown pass": (
        [],
        "passes: [{wandaa: {}}]",
        "passes[0]: unknown pass 'wandaa'; did you mean 'wanda'?",
    ),
    "unknown option": (
        [],
        "passes: [{wanda: {sparsty: 0.5}}]",
        "passes[0].wanda: unknown option 'sparsty'; did you mean 'sparsity'?",
    ),
    "wrong type": (
        [],
        "passes: [{rtn: {bits: four}}]",
        "passes[0].rtn.bits: 'four' is not allowed; it must be a valid integer",
    ),
    "bits as a fraction": ([], "passes: [{rtn: {bits: 4.5}}]", "passes[0].rtn.bits: 4.5"),
    "a switch as text": ([], "passes: [{rtn: {symmetric: off}}]", "passes[0].rtn.symmetric: 'off' is not allowed"),
    "out of range": ([], "passes: [{rtn: {bits: 9}}]", "less than or equal to 8"),
    "pattern": ([], "passes: [{wanda: {sparsity: 4:2}}]", "n kept of m"),
    "width": ([], "passes: [{magnitude: {sparsity: 2:5}}]", "2:5 needs a width divisible by 5, got 48"),
    "group": ([], "passes: [{rtn: {group: 64}}]", "group 64 does not divide its width of 48"),
    "selects nothing": ([], "passes: [{rtn: {group: 0, sites: nothing}}]", "selects no site"),
    "no passes": ([], "passes: []", "at least one pass"),
    "yaml": ([], "passes: [", "not valid YAML"),
    "unknown key": ([], "passes: [rtn]\nlimit: {}", "unknown key 'limit'; did you mean 'limits'?"),
    "window": ([], "passes: [wanda]\ncalibration: {length: 4096}", "the model takes 128"),
    "accept": ([], "passes: [rtn]\naccept: {data_dir: nowhere}", "accept.data_dir: nowhere is not a folder"),
    "calibration file": ([], "passes: [wanda]\ncalibration: {data: nowhere.txt}", "calibration.data"),
    "set": (["--set", "passes.3.bits=4"], "passes: [rtn]", "no item '3'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_one_line_exit_2_and_leaves_nothing(
    case: str, cli: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    extra, text, expected = BAD[case]
    (tmp_path / "r.yaml").write_text(text)
    before = contents(tiny_llama)
    code, out, err = cli("run", tmp_path / "r.yaml", "--model", tiny_llama, "--out", tmp_path / "o", *extra)
    assert expected in err
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]
    assert contents(tiny_llama) == before


def test_an_existing_output_is_refused_and_untouched(cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "precious").write_text("keep me")
    code, _, err = cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "exists" in err
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["precious"]


@pytest.mark.slow
def test_force_replaces_the_output(cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o")
    assert cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o", "--force")[0] == 0
    assert cli("verify", tmp_path / "o")[0] == 0


def test_a_missing_model_folder_is_named(cli: Run, recipe: Path, tmp_path: Path) -> None:
    code, _, err = cli("run", recipe, "--model", tmp_path / "nowhere", "--out", tmp_path / "o")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "nowhere" in err
    assert not (tmp_path / "o").exists()


def test_a_pickled_checkpoint_is_refused_unread(cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    torch.save({"x": torch.zeros(1)}, model / "pytorch_model.bin")
    code, _, err = cli("run", recipe, "--model", model, "--out", tmp_path / "o")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "pytorch_model.bin" in err
    assert "safetensors" in err


def test_a_recipe_without_a_model_asks_for_one(cli: Run, recipe: Path, tmp_path: Path) -> None:
    for line in (["run", recipe, "--out", tmp_path / "o"], ["plan", recipe]):
        code, out, err = cli(*line)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "none was given; give a folder, or `builtin` (option: --model FOLDER)" in err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_model_given_twice_is_refused(command: str, cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    code, out, err = cli(command, recipe, "--model", tiny_llama, "--set", "model=builtin", "--out", tmp_path / "o")
    assert (code, out, err) == (
        2,
        "",
        "error: --set model: cannot be combined with --model; give only one of the two\n",
    )
    assert not (tmp_path / "o").exists()


def test_a_device_this_machine_lacks_is_named(cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    code, _, err = cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o", "--device", "warp:9")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "warp:9" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("line", [["run", "--speed", "9"], ["inspect"], ["squeeze"], ["eval", "x", "--limit", "0"]])
def test_a_bad_command_line_is_one_line_and_exit_2(line: list[str], cli: Run) -> None:
    code, out, err = cli(*line)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on_and_exits_130(
    cli: Run, recipe: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.driver.Job.finish_block", interrupted)
    code, _, err = cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o")
    assert code == 130
    assert err.splitlines()[-2:] == [
        "interrupted after block 1 of 2; run the same command to resume",
        "error: interrupted; nothing is left half-written",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.partial", "recipe.yaml"]
    monkeypatch.undo()
    code, _, err = cli("run", recipe, "--model", tiny_llama, "--out", tmp_path / "o")
    assert code == 0
    assert "resuming after block 1 of 2" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "recipe.yaml"]


def test_debug_shows_the_traceback(cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from compress.errors import ArtifactError

    with pytest.raises(ArtifactError, match="nowhere"):
        cli("verify", tmp_path / "nowhere", "--debug")


def test_verifying_something_else_is_refused(cli: Run, tiny_llama: Path) -> None:
    code, _, err = cli("verify", tiny_llama)
    assert code == 2
    assert "not a Compress artifact" in err


def test_an_interrupt_that_compiled_code_made_an_error_of_is_one(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def swallowed(**_: Any) -> int:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr("compress.cli.command", lambda: swallowed)
        assert cli("passes") == (130, "", "error: interrupted; nothing is left half-written\n")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
