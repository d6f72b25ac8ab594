"""Temporary files beside a target are removed once no process is working on them, and never while one is.

Kills are SIGKILLs: of small processes here, and of whole commands by `forks.py`.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compress import RTN, Magnitude, Recipe, run
from compress.errors import ArtifactError, RecipeError
from compress.extraction import best_of
from compress.partial import LOCK, beside, clear, exchange, put
from compress.plan import free_place
from compress.recipe import Delta

Tally = Callable[[str, str], AbstractContextManager[None]]
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def killed(code: str, out: Path) -> None:
    """Run a program about `out` that kills itself."""
    head = "import os, signal, sys, pathlib\nfrom compress import partial\nout = pathlib.Path(sys.argv[1])\n"
    done = subprocess.run([sys.executable, "-c", head + code, str(out)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL


# -- a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "disk full"), KeyboardInterrupt()])
def test_a_file_is_put_in_place_whole_or_not_at_all(error: BaseException, tmp_path: Path) -> None:
    put(tmp_path / "x", lambda partial: partial.write_text("old"))

    def half(partial: Path) -> None:
        partial.write_text("half")
        raise error

    with pytest.raises(type(error)):
        put(tmp_path / "x", half)
    assert (names(tmp_path), (tmp_path / "x").read_text()) == (["x"], "old")


def test_two_that_put_one_file_in_place_do_not_meet(tmp_path: Path) -> None:
    """Such as machines that share a cache, on each of which the process has the same number."""

    def late(partial: Path) -> None:
        partial.write_text("one")
        put(tmp_path / "x", lambda partial: partial.write_text("other"))

    put(tmp_path / "x", late)
    assert (tmp_path / "x").read_text() == "one" and names(tmp_path) == ["x"]


# -- the folder ------------------------------------------------------------------------------------


def test_a_folder_beside_is_gone_at_the_end_with_those_above(tmp_path: Path) -> None:
    with pytest.raises(KeyError), beside(tmp_path / "a" / "b" / "o") as folder:
        (folder / "made").mkdir()
        raise KeyError
    assert names(tmp_path) == []


MOMENTS = {
    "at work": f"with partial.beside(out) as folder:\n (folder / 'made').mkdir(), (folder / 'x').touch(), {KILL}",
    "before the lock": f"partial.hold = lambda *_: {KILL}\nwith partial.beside(out): pass",
    "before the lock is held": f"partial.fcntl.flock = lambda *_: {KILL}\nwith partial.beside(out): pass",
    "while it is removed": f"partial.shutil.rmtree = lambda *_: {KILL}\n"
    "with partial.beside(out) as folder: (folder / 'made').mkdir(), (folder / 'x').touch()",
    "when all but the folder is": f"partial.Path.rmdir = lambda *_: {KILL}\nwith partial.beside(out): pass",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_dead_process_left_is_removed(moment: str, tmp_path: Path) -> None:
    killed(MOMENTS[moment], tmp_path / "o[1]")  # as a pattern, that is o1
    assert len(names(tmp_path)) == 1
    clear(tmp_path / "o1")
    clear(tmp_path / "o")
    assert len(names(tmp_path)) == 1
    free_place(tmp_path / "o[1]", tmp_path / "model", force=False)
    assert names(tmp_path) == []


def test_what_somebody_is_making_is_left_alone(tmp_path: Path) -> None:
    with beside(tmp_path / "o") as one, beside(tmp_path / "o") as other:  # of this process, as of a thread
        (one / "made").mkdir()
        killed(f"partial.clear(out)\n{KILL}", tmp_path / "o")
        clear(tmp_path / "o")
        assert names(tmp_path) == sorted((one.name, other.name))
        assert names(one) == [LOCK, "made"]
        exchange(one / "made", tmp_path / "o")
    assert names(tmp_path) == ["o"]


def test_a_folder_that_is_taken_for_dead_before_it_is_held_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import partial

    hold, cleared = partial.hold, list[Path]()

    def late(lock: Path, flags: int = 0) -> int:
        if not cleared:
            cleared.append(lock.parent)
            monkeypatch.setattr(partial, "hold", hold)
            clear(tmp_path / "o")
        return hold(lock, flags)

    monkeypatch.setattr(partial, "hold", late)
    with beside(tmp_path / "o") as folder:
        assert names(tmp_path) == [folder.name] != [cleared[0].name]


def test_what_is_not_known_as_ours_is_left_alone(tmp_path: Path) -> None:
    for name in ("o.partial-backup", "o.partial-0123abcd", "else"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    (tmp_path / "o.partial-backup" / LOCK).touch()
    (tmp_path / "else" / LOCK).touch()
    (tmp_path / "o.partial-00000000").symlink_to(tmp_path / "else")
    (tmp_path / "o.partial-11111111").touch()
    before = sorted(tmp_path.rglob("*"))
    clear(tmp_path / "o")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"file: cannot write there: Not a directory"), beside(tmp_path / "file/o"):
        pass


# -- replacing -------------------------------------------------------------------------------------

REPLACING = """
steps = iter(range(1, 9))
def audit(event, _):
    if event in ("os.rename", "shutil.rmtree") and next(steps) == {last}:
        os.kill(os.getpid(), signal.SIGKILL)
with partial.beside(out) as folder:
    (folder / "1").mkdir(), (folder / "1" / "new").touch()
    sys.addaudithook(audit)
    partial.exchange(folder / "1", out)
"""  # killed before one of: the rename of what was there, that of what was made, the removal of what was there


@pytest.mark.parametrize(("last", "found"), [(1, "old"), (2, "old"), (3, "new")])
def test_a_replacement_killed_at_a_rename_is_undone_or_done(last: int, found: str, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "old").touch()
    killed(REPLACING.format(last=last), tmp_path / "o")
    assert (tmp_path / "o").exists() == (last != 2)
    clear(tmp_path / "o")
    assert (names(tmp_path), names(tmp_path / "o")) == (["o"], [found])


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupt_between_two_renames_loses_nothing(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o" / "old").mkdir(parents=True)
    rename, calls = Path.rename, list[Path]()

    def interrupted(path: Path, target: Path) -> None:
        calls.append(path)
        if len(calls) > 1 and again:  # nor can it be undone
            raise OSError
        rename(path, target)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), beside(tmp_path / "o") as folder:
        (folder / "1").mkdir()
        patch.setattr(Path, "rename", interrupted)
        exchange(folder / "1", tmp_path / "o")
    assert (tmp_path / "o").exists() != again
    clear(tmp_path / "o")
    assert (names(tmp_path), names(tmp_path / "o")) == (["o"], ["old"])


def test_what_is_left_of_an_old_output_is_not_put_back_for_a_new_one_that_was_moved(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    killed(REPLACING.format(last=3), tmp_path / "o")
    (tmp_path / "o").rename(tmp_path / "moved")
    clear(tmp_path / "o")
    assert names(tmp_path) == ["moved"]


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(model_folder: Callable[..., Path]) -> Path:
    """A Llama of one block."""
    return model_folder("short")


@pytest.fixture(scope="module")
def finetuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, a little moved."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("finetuned") / "tuned"))
    moved = {name: t + 0.01 * t.roll(1, 0) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def delta(finetuned: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(passes=(Magnitude(sparsity=0.5),), delta=Delta(base=str(base)))
    return run(finetuned, recipe, tmp_path_factory.mktemp("delta") / "d").out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["merge", "export", "apply"])
def test_a_command_that_was_killed_leaves_nothing_once_it_runs_again(
    command: str, forks: Any, finetuned: Path, delta: Path, base: Path, llama_artifact: Path, tmp_path: Path,
    tally: Tally,
) -> None:  # fmt: skip
    out = tmp_path / "o"
    line: list[Any] = {
        "merge": ["merge", base, finetuned, "--out", out],
        "export": ["export", llama_artifact, "--to", "dense", "--out", out],
        "apply": ["delta", "apply", delta, "--base", base, "--out", out],
    }[command]
    with tally("fault", "SIGKILL of a command right before it is done"):
        [told] = forks(lines=[line], place=out, renames=1)
        assert told["code"] == -9, told["err"]
        assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith("o.partial-")
        [told] = forks(lines=[line])
        assert told["code"] == 0, told["err"]
        assert names(tmp_path) == ["o"]


@pytest.mark.slow
def test_an_extraction_puts_back_what_a_killed_one_was_replacing(
    finetuned: Path, delta: Path, base: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(delta, tmp_path / "o"))
    recipes = [Recipe(passes=(RTN(bits=bits, group=8),), delta=Delta(base=str(base))) for bits in (3, 4)]
    killed(REPLACING.format(last=2), out)
    with pytest.raises(RecipeError, match="exists; choose another folder"):
        best_of(finetuned, recipes, out)
    assert names(tmp_path) == ["o"] and hashes(out) == hashes(delta)
    killed(REPLACING.format(last=2), out)
    best_of(finetuned, recipes, out, force=True)
    assert names(tmp_path) == ["o"] and hashes(out) != hashes(delta)


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 2])
def test_an_extraction_killed_while_it_replaces_an_output_leaves_the_old_or_the_new(
    last: int, forks: Any, finetuned: Path, delta: Path, base: Path, tmp_path: Path, tally: Tally
) -> None:
    out = Path(shutil.copytree(delta, tmp_path / "o"))
    line = ["delta", "extract", finetuned, "--base", base, "--out", out]
    with tally("fault", "SIGKILL at a rename of an extraction"):
        [told] = forks(lines=[[*line, "--force"]], place=out, renames=last)
        assert (told["code"], out.exists()) == (-9, last == 1), told["err"]
        [told] = forks(lines=[line])
        assert told["code"] == 2 and "exists; choose another folder" in told["err"]
        assert names(tmp_path) == ["o"] and hashes(out) == hashes(delta)
        [told] = forks(lines=[[*line, "--force"]])
        assert told["code"] == 0, told["err"]
        assert names(tmp_path) == ["o"] and hashes(out) != hashes(delta)
