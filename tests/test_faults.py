"""External faults: jumping clocks, two processes at once, read-only folders.

Kills, full disks and damage are tested in `test_resume.py`, lack of memory and values that are not finite in
`security`.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import RTN, Recipe
from compress.artifact import fingerprint, verify
from compress.model.source import Checkpoint

ROOT = Path(__file__).parent.parent
STEPS = (RTN(group=8),)
RECIPE = "passes:\n  - rtn: {group: 8}\n"
YEARS = {"1970": 1, "1979": 300_000_000, "2100": 4_102_444_800}  # a zip file's first is 1980; behind 32 bits
Cli = Callable[..., tuple[int, str, str]]
ReadOnly = Callable[[Path], AbstractContextManager[None]]
Tally = Callable[[str, str], AbstractContextManager[None]]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of a run without faults."""
    return hashes(compress.run(tiny_llama, Recipe(passes=STEPS), tmp_path_factory.mktemp("whole") / "o").out)


@pytest.fixture
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe as a file, beside nothing."""
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(RECIPE)
    return path


# -- clocks ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("year", "jump"), [("1970", -1e9), ("1979", 1e9), ("2100", -1e9)])
def test_a_clock_that_jumps_changes_no_byte(
    year: str, jump: float, cli: Cli, recipe: Path, tiny_llama: Path, whole: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, tally: Tally,
) -> None:  # fmt: skip
    """Every look at the clock finds it thirty years from the last, and the files of the model are of any time."""
    model, looks = Path(shutil.copytree(tiny_llama, tmp_path / tiny_llama.name)), count()
    for path in model.iterdir():
        os.utime(path, (YEARS[year], YEARS[year]))
    with tally("fault", "a clock that jumps, files of another time"):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 2e9 + jump * (next(looks) % 2))
            code, _, said = cli("run", recipe, "--model", model, "--out", tmp_path / "o")
        assert (code, "Traceback" in said) == (0, False)
        assert hashes(tmp_path / "o") == whole
        assert verify(tmp_path / "o")


WALL = ("time.time", "time.time_ns", "time.localtime", "time.gmtime", "os.path.getmtime")
SHOWN = {"compress/serving/answers.py", "compress/serving/app.py"}  # when an answer was made, as the protocol asks


@pytest.mark.slow
def test_nothing_is_decided_or_timed_by_the_clock_on_the_wall() -> None:
    """Seconds are of a clock that only goes forward; no file is new or old by its date."""
    found = set()
    for path in (path for room in ("compress", "evals", "kernels") for path in (ROOT / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "time" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            called = isinstance(node, ast.Call) and ast.unparse(node.func) in WALL
            dated = isinstance(node, ast.Attribute) and node.attr.startswith(("st_mtime", "st_atime"))
            if called or dated:
                found.add(str(path.relative_to(ROOT)))
    assert found == SHOWN


def test_a_model_is_hashed_again_if_other_bytes_have_the_same_date(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    file = model / "model.safetensors"
    before, dated = fingerprint(Checkpoint(model)), file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(dated, dated))  # as a clock that was set back, or `cp -p`, gives it
    assert fingerprint(Checkpoint(model)) != before


# -- at once ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_runs_started_together_into_one_folder_one_wins(
    forks: Any, recipe: Path, tiny_llama: Path, whole: Any, tmp_path: Path, tally: Tally
) -> None:
    line = ["run", recipe, "--model", tiny_llama, "--out", tmp_path / "o"]
    with tally("fault", "runs at once into one folder"):
        told = sorted(forks(lines=[line] * 3), key=lambda one: int(one["code"]))
        assert [one["code"] for one in told] == [0, 2, 2]
        for loser in told[1:]:
            assert (loser["out"], loser["err"].count("\n")) == ("", 1)
            assert loser["err"].startswith("error: --out: ")
        assert hashes(tmp_path / "o") == whole
        assert [path.name for path in tmp_path.iterdir()] == ["o"]


# -- read only -------------------------------------------------------------------------------------


def test_a_model_that_may_only_be_read_is_compressed(
    cli: Cli, recipe: Path, tiny_llama: Path, whole: Any, tmp_path: Path, tally: Tally, read_only: ReadOnly
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "m" / tiny_llama.name))
    before = hashes(model)
    with tally("fault", "a model that may only be read"), read_only(tmp_path / "m"):
        assert cli("run", recipe, "--model", model, "--out", tmp_path / "o")[0] == 0
        assert hashes(tmp_path / "o") == whole and hashes(model) == before
    with read_only(tmp_path / "o"):
        assert cli("verify", tmp_path / "o")[0] == 0
        assert compress.load(tmp_path / "o") is not None


PLACES: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "run": lambda recipe, model, out: ["run", recipe, "--model", model, "--out", out],
    "run with a log": lambda recipe, model, out: [
        "run", recipe, "--model", model, "--out", out.parent.parent / "o", "--log", out,
    ],
    "export": lambda recipe, model, out: ["export", model, "--out", out],
}  # fmt: skip


@pytest.mark.parametrize("command", PLACES)
def test_a_place_that_may_not_be_written_is_one_line_and_leaves_nothing(
    command: str,
    cli: Cli,
    recipe: Path,
    tiny_llama: Path,
    llama_artifact: Path,
    tmp_path: Path,
    tally: Tally,
    read_only: ReadOnly,
) -> None:
    (tmp_path / "kept").mkdir()
    model = llama_artifact if command == "export" else tiny_llama
    with tally("fault", "a place that may not be written"), read_only(tmp_path / "kept"):
        code, out, err = cli(*PLACES[command](recipe, model, tmp_path / "kept" / "o"))
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ") and str(tmp_path / "kept") in err
        assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.slow
def test_a_stopped_run_that_may_not_be_written_is_one_line_and_goes_on_later(
    cli: Cli,
    recipe: Path,
    forks: Any,
    tiny_llama: Path,
    whole: Any,
    tmp_path: Path,
    tally: Tally,
    read_only: ReadOnly,
) -> None:
    line = ["run", recipe, "--model", tiny_llama, "--out", tmp_path / "o"]
    forks(lines=[line], signals=[2], place=tmp_path, pattern="o.partial/records/00001.json")
    with tally("fault", "a place that may not be written"):
        with read_only(tmp_path / "o.partial"):
            code, out, err = cli(*line)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        code, _, err = cli(*line)
        assert (code, "resuming after block" in err) == (0, True), err
        assert hashes(tmp_path / "o") == whole


def test_a_cache_of_the_hub_that_may_only_be_read_is_no_obstacle(
    cli: Cli,
    recipe: Path,
    tiny_llama: Path,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
    read_only: ReadOnly,
) -> None:
    """`model` may be a folder that a cache links to its blobs, as `hf download` leaves it."""
    hub = tmp_path / "hub"
    snapshot = hub / "models--a--b" / "snapshots" / "0" / tiny_llama.name
    blobs = Path(shutil.copytree(tiny_llama, hub / "models--a--b" / "blobs"))
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(hub))
    with tally("fault", "a model that may only be read"), read_only(hub):
        code, _, err = cli("run", recipe, "--model", snapshot, "--out", tmp_path / "o")
        assert code == 0, err
        assert hashes(tmp_path / "o") == whole
