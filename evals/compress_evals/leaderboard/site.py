"""Writes a site atomically: into a temporary folder beside it, which then replaces it.

An existing folder is replaced only if it is a leaderboard site or with `force`, and never if it contains the results
that the site is made from. Files that someone else added to an existing site are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compress.errors import RecipeError
from compress.partial import beside, clear, exchange
from compress_evals.leaderboard.collect import MADE_HERE, Board, Collection, collect
from compress_evals.leaderboard.export import KIND, LeaderboardOut, as_csv, as_data, as_markdown
from compress_evals.leaderboard.figures import picture as draw_picture
from compress_evals.leaderboard.naming import slugs
from compress_evals.leaderboard.pages import board_page, boards_page, model_page, rows_by_model
from compress_evals.leaderboard.runs import together
from compress_evals.leaderboard.svg import check_picture
from compress_evals.leaderboard.table import Line, lines
from compress_evals.report import TableRow

EXAMPLES = 20  # as many as a result stores
PARTS = {"index.html", "models", MADE_HERE, "leaderboard.csv", "leaderboard.md", "leaderboard.schema.json"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was written: the site, and for each board the dense model and the numbers of lines and failed cells."""

    site: Path
    boards: tuple[tuple[str, int, int], ...]
    lines: tuple[tuple[Line, ...], ...]


def publish(
    paths: Sequence[Path],
    site: Path,
    *,
    force: bool = False,
    picture: Path | None = None,
    examples: int = EXAMPLES,
    each_run: bool = False,
) -> Published:
    """Write the site of all results below `paths`, and the first board's trade-off figure to `picture` (SVG or PNG).

    A model's page shows at most `examples` lost answers per task, and as many gained ones. Results of one recipe with
    several calibration seeds are merged into one line, their mean, unless `each_run` gives every run its own line.

    Raises ArtifactError for results that cannot be read or paired, RecipeError for a folder that must not be replaced.
    """
    check_target(site, paths, force)
    if picture is not None:
        check_picture(picture)
    collection = collect(paths)
    if not each_run:
        collection = replace(collection, boards=tuple(map(together, collection.boards)))
    tables = [(board, lines(board)) for board in collection.boards]
    with beside(site) as folder:
        partial = folder / "site"
        try:
            partial.mkdir()
            _write(collection, tables, partial, examples)
            _keep(partial, site)
            exchange(partial, site)
        except OSError as error:
            raise RecipeError(f"--out: {site} cannot be written: {error.strerror}") from error
    if picture is not None:
        draw_picture(tables[0][1], picture)
    return Published(
        site=site,
        boards=tuple((board.dense.name, len(found), len(board.failed)) for board, found in tables),
        lines=tuple(tuple(found) for _, found in tables),
    )


def check_target(site: Path, paths: Sequence[Path], force: bool) -> None:
    """Raise RecipeError unless `site` may be written: it is new, empty, an existing site, or `force` is given.

    Also if it contains one of `paths` or the current directory.
    """
    place = site.resolve()
    for path in paths:
        if path.resolve().is_relative_to(place) or Path.cwd().is_relative_to(place):
            raise RecipeError(f"--out: {site} contains {path} or the current directory; give a folder of its own")
    clear(site)
    if site.is_file() or site.is_symlink():
        raise RecipeError(f"--out: {site} is not a folder")
    if site.is_dir() and any(site.iterdir()) and not force and not is_site(site):
        raise RecipeError(
            f"--out: {site} exists and is not a leaderboard; give another folder, or --force to replace it"
        )


def is_site(folder: Path) -> bool:
    """Whether a folder was written by `publish`."""
    try:
        content = json.loads((folder / MADE_HERE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND


def strangers(site: Path) -> list[Path]:
    """The files in a published site that `publish` did not write, such as a page about it or the sweep behind it."""
    if not is_site(site):
        return []
    boards = json.loads((site / MADE_HERE).read_text(encoding="utf-8")).get("boards") or []
    folders = {str(board.get("folder")) for board in boards if isinstance(board, dict)}
    return sorted(path for path in site.iterdir() if path.name not in PARTS | folders)


def _write(collection: Collection, tables: Sequence[tuple[Board, list[Line]]], out: Path, examples: int) -> None:
    single = len(tables) == 1
    folders = [""] if single else slugs(board.dense.name for board, _ in tables)
    rows = [rows_by_model(board) for board, _ in tables]
    for (board, found), folder, by_model in zip(tables, folders, rows, strict=True):
        _board(board, found, by_model, out / folder, examples, home="" if single else "../index.html")
        if not single:
            _data([(board, "", found, by_model)], out / folder)
    if not single:
        summaries = [(folder, found) for folder, (_, found) in zip(folders, tables, strict=True)]
        _text(out / "index.html", boards_page(collection, summaries))
    _data([(b, f, found, by) for (b, found), f, by in zip(tables, folders, rows, strict=True)], out)
    schema = LeaderboardOut.model_json_schema(by_alias=True)
    _text(out / "leaderboard.schema.json", json.dumps(schema, indent=1, ensure_ascii=False) + "\n")


def _board(
    board: Board, found: Sequence[Line], rows: dict[str, list[TableRow]], out: Path, examples: int, home: str
) -> None:
    (out / "models").mkdir(parents=True, exist_ok=True)
    _text(out / "index.html", board_page(board, found, home=home))
    for place, line in enumerate(found, start=1):
        for of_it, mean in [(line, None), *((run, line) for run in line.runs)]:
            page = model_page(board, of_it, rows[of_it.name], place, len(found), examples, mean)
            _text(out / "models" / f"{of_it.slug}.html", page)


def _data(boards: Sequence[tuple[Board, str, Sequence[Line], dict[str, list]]], out: Path) -> None:  # type: ignore[type-arg]
    _text(out / MADE_HERE, as_data(boards).model_dump_json(by_alias=True, indent=1) + "\n")
    _text(out / "leaderboard.csv", as_csv([(board, found) for board, _, found, _ in boards]))
    _text(out / "leaderboard.md", "\n".join(as_markdown(board, found) for board, _, found, _ in boards))


def _text(path: Path, content: str) -> None:
    path.write_bytes(content.encode("utf-8", "replace"))


def _keep(partial: Path, site: Path) -> None:
    """Copy the files that someone else added to `site` into the folder that replaces it."""
    for path in strangers(site):
        target = partial / path.name
        if target.exists():  # a new board has this name
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True)
        else:
            shutil.copy2(path, target, follow_symlinks=False)
