"""`compress leaderboard`: its output, and a one-line message for every error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compress.cli import main
from compress_evals.results import Results

Store = Callable[[Path, Sequence[Results]], Path]
Versus = Callable[..., Results]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["compress", "leaderboard", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return call


@pytest.mark.slow
def test_it_says_what_it_published(
    run: Callable[..., tuple[int, str, str]],
    dense: Results,
    versus: Versus,
    stored: Store,
    cell: Callable[..., None],
    tmp_path: Path,
) -> None:
    results = stored(tmp_path / "in", [dense, versus("one", {})])
    cell(tmp_path / "in" / "failed")
    code, out, _ = run(results, "--out", tmp_path / "site", "--json")
    assert code == 0
    assert json.loads(out)["boards"] == [{"dense": "dense", "models": 1, "failed": 1}]
    assert (tmp_path / "site" / "index.html").is_file()


def test_what_is_wrong_is_one_line_and_writes_nothing(
    run: Callable[..., tuple[int, str, str]], dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    results = stored(tmp_path / "in", [dense, versus("one", {})])
    (results / "r1" / "results.json").write_text('{"schema": 1}', encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    cases: list[tuple[list[str | Path], str]] = [
        ([results, "--out", tmp_path / "site"], "results schema 1"),
        ([tmp_path / "none", "--out", tmp_path / "site"], "no such folder of results"),
        ([results, "--out", tmp_path / "other"], "--force"),
        ([results, "--out", tmp_path / "site", "--picture", tmp_path / "x.gif"], ".svg or .png"),
        ([results, "--out", results / "r0" / "results.json"], "is not a folder"),
    ]
    for arguments, words in cases:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert words in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other"]
