"""`compress doctor`: what is installed and missing, and bundles with what a bug report needs but nothing private."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import GPTQ, RTN, Recipe, Wanda, __version__, doctor, journal
from compress.identity import flat
from compress.passes import Global
from compress.planning.machine import place
from compress_kernels import tuning

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No profile of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def contents(file: Path) -> dict[str, str]:
    """The texts of a zip by name."""
    with zipfile.ZipFile(file) as packed:
        return {name: packed.read(name).decode() for name in packed.namelist()}


def test_it_says_what_is_here(cli: Command) -> None:
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    for said in (f"compress {__version__}", "threads", "memory free", "disk free", "no tuning profile of cpu"):
        assert said in out


def test_it_gives_json(cli: Command) -> None:
    code, out, _ = cli("doctor", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["versions"]["compress"] == __version__
    assert told["system"]["threads"] >= 1
    assert told["disk"]["free"] > 0
    assert told["caches"] == {"tuning": 0, "machine": 0}


def test_what_is_missing_is_named_with_what_it_would_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "gguf" else "1")
    said = [line for line in doctor.missing(doctor.examine()) if "gguf" in line]
    assert said == ["gguf is missing: export --to gguf; pip install gguf"]


def test_every_optional_package_is_of_an_extra() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    for package, (extra, _) in doctor.OPTIONAL.items():
        line = next(line for line in project.splitlines() if line.startswith(f"{extra} = ["))
        assert f'"{package}' in line


def test_a_damaged_profile_is_reported_and_does_not_stop_it(cli: Command) -> None:
    for path in (place("cpu"), tuning.place("cpu")):
        path.parent.mkdir(parents=True)
        path.write_text("{")
    code, out, _ = cli("doctor")
    assert code == 0
    assert out.count("profile of cpu is damaged") == 2


def test_a_bundle_holds_recipe_ledger_plan_and_log(
    cli: Command, llama_artifact: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "RunStarted"}\n')
    monkeypatch.setattr("compress.planning.profile_of", lambda device: some_machine())
    code, out, _ = cli(
        "doctor", llama_artifact, "--bundle", tmp_path / "b.zip", "--log", tmp_path / "events.jsonl", "--model",
        tiny_llama,
    )  # fmt: skip
    held = contents(tmp_path / "b.zip")
    assert code == 0 and "no weights" in out
    assert {"compress.json", "recipe.yaml", "plan.json", "log.jsonl", "doctor.json", "files.txt"} <= held.keys()
    assert "passes:" in held["recipe.yaml"]
    assert json.loads(held["plan.json"])["bytes"] == json.loads(held["compress.json"])["sizes"]["bytes"]
    assert held["log.jsonl"] == '{"event": "RunStarted"}\n'


def some_machine() -> object:
    """A machine as it is measured; its rates are positive."""
    from compress.planning.machine import Machine

    rates = dict.fromkeys(("float32", "bfloat16", "float16", "eigen", "memory", "disk", "call"), 1e9)
    return Machine(device="x", version="0", threads=1, **rates)


def test_a_bundle_holds_no_weights_tokenizer_or_environment(
    llama_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "swordfish")
    doctor.bundle(tmp_path / "b.zip", llama_artifact)
    held = contents(tmp_path / "b.zip")
    assert not [name for name in held if "token" in name or name.endswith(".safetensors")]
    assert "swordfish" not in "".join(held.values()) and "SECRET_OF_MINE" not in "".join(held.values())
    assert "model-00001-of" in held["files.txt"]  # names and sizes only


def test_the_home_directory_is_a_tilde(own_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/home/some.one")))
    ledger = json.loads((own_artifact / "compress.json").read_text())
    ledger["machine"]["a"] = "/home/some.one/models and /home/some.oneelse"
    (own_artifact / "compress.json").write_text(json.dumps(ledger))
    doctor.bundle(tmp_path / "b.zip", own_artifact)
    assert (
        json.loads(contents(tmp_path / "b.zip")["compress.json"])["machine"]["a"] == "~/models and /home/some.oneelse"
    )


def test_the_partial_folder_of_a_run_is_bundled(tmp_path: Path) -> None:
    partial = tmp_path / "o.partial"
    (partial / "records").mkdir(parents=True)
    (partial / "identity.json").write_text("{}")
    (partial / "records" / "0001.json").write_text('{"block": 1}')
    (partial / "records" / "0001.safetensors").write_bytes(b"\0")
    assert doctor.bundle(tmp_path / "b.zip", partial) == [
        "doctor.json", "files.txt", "identity.json", "records/0001.json",
    ]  # fmt: skip


def left_by(recipe: Recipe, partial: Path) -> Path:
    """The partial folder of a run of this recipe."""
    partial.mkdir()
    journal.write(partial / "identity.json", flat("recipe", json.loads(json.dumps(recipe.to_dict()))))
    return partial


def test_the_plan_of_a_stopped_run_is_bundled(
    cli: Command, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.planning.profile_of", lambda device: some_machine())
    recipe = Recipe(passes=(Global(), Wanda(sparsity="2:4"), GPTQ(bits=3, group=8)))
    partial = left_by(recipe, tmp_path / "o.partial")
    code, out, err = cli("doctor", partial, "--bundle", tmp_path / "b.zip", "--model", tiny_llama)
    assert (code, err) == (0, "") and "plan is left out" not in out
    told = json.loads(contents(tmp_path / "b.zip")["plan.json"])
    assert [step["options"] for step in told["passes"]] == [str(step) for step in recipe.passes]


def test_a_plan_that_cannot_be_made_is_left_out_and_told(cli: Command, tiny_llama: Path, tmp_path: Path) -> None:
    partial = left_by(Recipe(passes=(RTN(bits=4, group=7),)), tmp_path / "o.partial")
    cases = {"7": None, "is damaged": "{}", "passes: expected a list": {"recipe.passes[9].rtn.bits": 4},
             "damaged": {"recipe.a": 1, "recipe.a.b": 1}}  # fmt: skip
    for why, identity in cases.items():
        if isinstance(identity, str):
            (partial / "identity.json").write_text(identity)
        elif identity is not None:
            journal.write(partial / "identity.json", identity)
        target = tmp_path / f"{why[:2]}.zip"
        code, out, err = cli("doctor", partial, "--bundle", target, "--model", tiny_llama)
        assert (code, err) == (0, ""), why
        assert "the plan is left out: " in out and why in out
        assert "identity.json" in contents(target) and "plan.json" not in contents(target)


def test_names_and_text_that_are_no_unicode_are_escaped(cli: Command, own_artifact: Path, tmp_path: Path) -> None:
    (own_artifact / os.fsdecode(b"a\xff\n")).touch()
    ledger = json.loads((own_artifact / "compress.json").read_text())
    (own_artifact / "compress.json").write_text(json.dumps({**ledger, "recipe": "\ud800"}))
    code, _, err = cli("doctor", own_artifact, "--bundle", tmp_path / "b.zip")
    assert (code, err) == (0, "")
    held = contents(tmp_path / "b.zip")
    assert held["recipe.yaml"] == r"\ud800"
    assert r" a\udcff\n" in held["files.txt"].splitlines()[1]  # by name


def test_a_link_out_of_the_folder_is_not_followed(own_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("swordfish")
    (own_artifact / "config.json").unlink()
    (own_artifact / "config.json").symlink_to(tmp_path / "secret")
    doctor.bundle(tmp_path / "b.zip", own_artifact)
    assert "config.json" not in contents(tmp_path / "b.zip")


def test_the_same_folder_gives_the_same_names_and_an_old_bundle_stays(llama_artifact: Path, tmp_path: Path) -> None:
    doctor.bundle(tmp_path / "b.zip", llama_artifact)
    before = (tmp_path / "b.zip").read_bytes()
    with pytest.raises(doctor.RecipeError, match=r"--bundle: .*b\.zip exists; choose another name"):
        doctor.bundle(tmp_path / "b.zip", llama_artifact)
    assert (tmp_path / "b.zip").read_bytes() == before


def test_bad_input_is_one_line_and_exit_code_2(cli: Command, llama_artifact: Path, tmp_path: Path) -> None:
    shutil.copy(llama_artifact / "model-00001-of-00003.safetensors", tmp_path / "binary.log")
    (tmp_path / "empty").mkdir()
    bad = {
        "is used only with --bundle; add --bundle": (llama_artifact,),
        "give the folder of an artifact": ("--bundle", tmp_path / "x.zip"),
        "no such folder": ("/nowhere", "--bundle", tmp_path / "x.zip"),
        "neither an artifact nor the partial folder": (tmp_path / "empty", "--bundle", tmp_path / "x.zip"),
        "is not a regular file": (llama_artifact, "--bundle", tmp_path / "x.zip", "--log", tmp_path / "none"),
        "binary.log: cannot be read": (
            llama_artifact,
            "--bundle",
            tmp_path / "x.zip",
            "--log",
            tmp_path / "binary.log",
        ),
        "lies in the folder that it describes": (llama_artifact, "--bundle", llama_artifact / "x.zip"),
        "cannot be written": (llama_artifact, "--bundle", tmp_path / "no" / "x.zip"),
    }
    for said, line in bad.items():
        code, out, err = cli("doctor", *line)
        assert (code, out, err.count("\n")) == (2, "", 1), said
        assert said in err
    assert not (tmp_path / "x.zip").exists() and not (llama_artifact / "x.zip").exists()
