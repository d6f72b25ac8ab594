"""The files of the site: the content of its pages, the exports for other programs, and what is never overwritten."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compress.errors import ArtifactError, RecipeError
from compress_evals.fidelity import Estimate
from compress_evals.leaderboard import publish
from compress_evals.leaderboard.export import LeaderboardOut
from compress_evals.results import Results

Store = Callable[[Path, Sequence[Results]], Path]
Versus = Callable[..., Results]
REPLACING = """
import os, pathlib, sys
from compress import partial
site = pathlib.Path(sys.argv[1])
with partial.beside(site) as folder:
    (folder / "site").mkdir()
    rename, partial.Path.rename = partial.Path.rename, lambda *paths: (rename(*paths), os.kill(os.getpid(), 9))
    partial.exchange(folder / "site", site)
"""  # killed behind the first of two renames
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes, text, and whether tags close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def pages(hostile_site: Path) -> dict[str, Page]:
    return {str(path.relative_to(hostile_site)): Page(path) for path in sorted(hostile_site.rglob("*.html"))}


@pytest.mark.slow
def test_every_model_has_a_page_inside_the_site(hostile_site: Path, hostile: tuple[str, ...]) -> None:
    names = sorted(path.name for path in (hostile_site / "models").iterdir())
    assert len(names) == len(hostile) + 1
    assert all(re.fullmatch(r"[a-z0-9-]+\.html", name) for name in names)
    assert "etc-passwd.html" in names


def test_strangers_words_are_text(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert page.tags.count("script") == (name == "index.html")
        assert not {"img", "iframe", "link", "object", "base"} & set(page.tags)
        assert not [a for a in page.attributes if a[1].startswith("on") or a[1] in ("src", "srcset")]
        assert "<script>alert(1)</script>" in page.text or name != "index.html"
    assert "\u202e" not in pages["index.html"].text


def test_nothing_is_loaded_from_elsewhere(hostile_site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        links = [value for _, attribute, value in page.attributes if attribute in ("href", "xlink:href")]
        assert not [link for link in links if re.match(r"[a-z]+:|//", link)]
        targets = {(hostile_site / name).parent / link for link in links if not link.startswith("#")}
        assert not [target for target in targets if not target.is_file()]
        ids = [value for _, attribute, value in page.attributes if attribute == "id"]
        assert [i for i, times in Counter(ids).items() if times > 1] == []
        assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
        text = (hostile_site / name).read_text(encoding="utf-8")
        assert not re.search(r"@import|url\((?!#)", text)
        assert set(re.findall(r"https?://[^\"' ]*", text)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }


@pytest.mark.slow
def test_as_many_flipped_answers_are_shown_as_asked_for(
    hostile_results: Path, pages: dict[str, Page], tmp_path: Path
) -> None:
    def shown(all_pages: Sequence[str]) -> int:
        return sum(text.count("It is <script>") for text in all_pages)

    publish([hostile_results], tmp_path / "site", examples=1)
    few = [Page(path).text for path in (tmp_path / "site").rglob("*.html")]
    assert shown([page.text for page in pages.values()]) == 6  # two lost and one gained of two models
    assert shown(few) == 4


def test_the_policy_allows_our_script_alone(hostile_site: Path) -> None:
    page = (hostile_site / "index.html").read_text(encoding="utf-8")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='$", policy)
    model = next((hostile_site / "models").iterdir()).read_text(encoding="utf-8")
    assert "script-src" not in model


def test_the_table_shows_every_figure(pages: dict[str, Page]) -> None:
    text = pages["index.html"].text
    for shown in (
        "1 of 40 answers of dense flip", "built in (3 tasks)", "80 % power", "cpu, float32", "failed",
        "Bits per byte: not a quality metric", "1.10×", "−22.5",
    ):  # fmt: skip
        assert shown in text
    assert "Traceback" not in text  # of an error its last line


def test_a_models_page_shows_the_answers_side_by_side(pages: dict[str, Page]) -> None:
    text = pages["models/script-alert-1-script.html"].text
    assert "Gained: 1 of 0" in text and "Lost: 2 of 0" in text
    assert "mark" in pages["models/script-alert-1-script.html"].tags
    assert text.count("It is <script>alert(1)</script>.") == 3


def test_figures_are_named_for_those_who_cannot_see_them(pages: dict[str, Page]) -> None:
    page = pages["index.html"]
    drawn = page.tags.count("svg")
    assert drawn == 5 + 2 * 3  # two trade-offs in size, two in speed, flips; curves: two budgets, three families
    assert page.attributes.count(("svg", "role", "img")) == drawn
    assert page.tags.count("desc") == drawn
    assert page.tags.count("details") == drawn


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(hostile_results: Path, hostile_site: Path, tmp_path: Path) -> None:
    publish([hostile_results], tmp_path / "again")
    ours = {p.relative_to(hostile_site): p.read_bytes() for p in hostile_site.rglob("*.*")}
    again = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*.*")}
    assert ours == again


def test_the_data_are_described_and_agree(hostile_site: Path) -> None:
    data = json.loads((hostile_site / "leaderboard.json").read_text(encoding="utf-8"))
    LeaderboardOut.model_validate(data)
    schema = json.loads((hostile_site / "leaderboard.schema.json").read_text(encoding="utf-8"))
    assert set(schema["required"]) <= data.keys() <= schema["properties"].keys()
    with (hostile_site / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    [board] = data["boards"]
    assert [row["worst_kept"] for row in rows] == [f"{m['worst_kept']['value']:.6g}" for m in board["models"]]
    described = set(data["csv_columns"])
    assert {re.sub(r"^facts_\w+|^closed book", "FAMILY", column) for column in rows[0]} == described
    task = board["models"][-1]["tasks"]["facts_mc"]
    assert task["normalised"] == pytest.approx((task["score"] - task["chance"]) / (1 - task["chance"]))
    assert board["failed"][0]["error"].startswith("Traceback")


def test_a_spreadsheet_takes_no_name_for_a_formula(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    tasks = {name: task.model_copy(update={"family": "=1+1"}) for name, task in dense.tasks.items()}
    strange = dense.model_copy(update={"tasks": tasks})
    made = versus('=HYPERLINK("x")', {}, original=strange)
    publish([stored(tmp_path / "in", [strange, made])], tmp_path / "site")
    with (tmp_path / "site" / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        line = next(csv.DictReader(stream))
    assert line["model"] == '\'=HYPERLINK("x")'
    assert "'=1+1 score" in line and not any(cell.startswith("=") for cell in (*line, *line.values()))


def test_markdown_escapes_names(hostile_site: Path) -> None:
    text = (hostile_site / "leaderboard.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<", text)
    assert r"\<script\>alert(1)\</script\>" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:5]}) == 1


@pytest.mark.slow
def test_several_boards_have_a_page_that_tells_them_apart(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    other = dense.model_copy(update={"engine": dense.engine.model_copy(update={"max_length": 99})})
    stored(tmp_path / "in" / "a", [dense, versus("one", {})])
    stored(tmp_path / "in" / "b", [other, versus("one", {}, original=other)])
    done = publish([tmp_path / "in"], tmp_path / "site")
    assert done.boards == (("dense", 1, 0), ("dense", 1, 0))
    index = Page(tmp_path / "site" / "index.html")
    assert "max length" in index.text and "99" in index.text
    assert (tmp_path / "site" / "dense-2" / "models" / "one.html").is_file()
    assert len(json.loads((tmp_path / "site" / "leaderboard.json").read_text(encoding="utf-8"))["boards"]) == 2


@pytest.mark.slow
def test_only_a_site_of_ours_is_replaced(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    results = stored(tmp_path / "in", [dense, versus("one", {})])
    site = tmp_path / "site"
    site.mkdir()
    (site / "precious.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match="--force"):
        publish([results], site)
    assert [path.name for path in site.iterdir()] == ["precious.txt"]
    publish([results], site, force=True)
    publish([results], site)
    assert not (site / "precious.txt").exists()
    for folder in (tmp_path, results, results / "r0"):
        with pytest.raises(RecipeError, match="folder of its own"):
            publish([results / "r0"], folder, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "site"]


@pytest.mark.slow
def test_a_site_that_was_being_replaced_by_a_killed_process_is_put_back(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    results, site = stored(tmp_path / "in", [dense, versus("one", {})]), tmp_path / "site"
    publish([results], site)
    (site / "findings.md").write_text("mine", encoding="utf-8")
    subprocess.run([sys.executable, "-c", REPLACING, site], check=False, timeout=60)
    assert not site.exists()
    publish([results], site)
    assert (site / "findings.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "site"]


@pytest.mark.slow
def test_what_was_put_into_a_site_stays(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    results, site = stored(tmp_path / "in", [dense, versus("one", {}), versus("two", {})]), tmp_path / "site"
    publish([results], site)
    (site / "findings.md").write_text("mine", encoding="utf-8")
    (site / "more").mkdir()
    (site / "more" / "sweep.yaml").write_text("mine", encoding="utf-8")
    shutil.rmtree(results / "r2")
    publish([results], site)
    assert [path.name for path in (site / "models").iterdir()] == ["one.html"]
    assert [(site / path).read_text() for path in ("findings.md", "more/sweep.yaml")] == ["mine", "mine"]


def test_a_result_that_cannot_be_read_leaves_the_site_as_it_was(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    results, site = stored(tmp_path / "in", [dense, versus("one", {})]), tmp_path / "site"
    publish([results], site)
    before = (site / "index.html").read_bytes()
    (results / "r1" / "samples" / "facts_mc.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ArtifactError, match="not readable"):
        publish([results], site)
    assert (site / "index.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "site"]


@pytest.mark.slow
def test_a_site_is_not_searched_for_results(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    results = stored(tmp_path / "in", [dense, versus("one", {})])
    publish([results], results / "site")
    publish([results], results / "site")
    assert len(list((results / "site" / "models").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_picture_is_the_front_in_light_colours(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"new/picture.{ending}"
    publish([stored(tmp_path / "in", [dense, versus("one", {})])], tmp_path / "site", picture=path)
    if ending == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "#2b5f75" in path.read_text(encoding="utf-8")
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_a_picture_of_another_kind_is_refused(hostile_results: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\.svg or \.png"):
        publish([hostile_results], tmp_path / "site", picture=tmp_path / "picture.gif")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_without_others_has_an_empty_board(
    dense: Results, stored: Store, cell: Callable[..., None], tmp_path: Path
) -> None:
    results = stored(tmp_path / "in", [dense])
    cell(results / "cells")
    publish([results], tmp_path / "site")
    assert "0 compressed models" in Page(tmp_path / "site" / "index.html").text


def test_a_board_says_which_figures_were_measured_otherwise(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    def measured(name: str, lost: int, dtype: str = "float32", **changes: object) -> Results:
        made = versus(name, {"facts_mc": lost})
        assert made.vs is not None and made.vs.fidelity is not None
        found = replace(made.vs.fidelity, **changes)
        engine = made.engine.model_copy(update={"dtype": dtype})
        return made.model_copy(update={"vs": made.vs.model_copy(update={"fidelity": found}), "engine": engine})

    results = [
        dense,
        measured("alpha", 1, top=64),
        measured("beta", 2, top=64),
        measured("gamma", 3, top=64, text_sha256="f" * 64),
        measured("delta", 4, dtype="bfloat16", top=64),
    ]
    publish([stored(tmp_path / "in", results)], tmp_path / "site")
    board = json.loads((tmp_path / "site" / "leaderboard.json").read_text(encoding="utf-8"))["boards"][0]
    assert board["facts"]["Hardware"].endswith("; cpu, bfloat16: delta")
    usual = "1,000 tokens of the text with SHA-256 000000000000"
    usual += "; KL over the 64 likeliest tokens and the rest, a lower bound"
    assert board["facts"]["Fidelity"] == f"{usual}; measured in another way, not to be compared: gamma"
    assert {(model["kl_top"], model["text"][0]) for model in board["models"]} == {(64, "0"), (64, "f")}
    page = Page(tmp_path / "site" / "index.html")
    assert "≥ 0.0100" in page.text and page.text.count("measured otherwise") == 2


@pytest.mark.slow
def test_a_model_without_distributions_is_on_the_board_and_on_no_axis(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    def wanda(sparsity: float, bits: float) -> Results:
        made = versus(f"wanda {sparsity}", {"facts_mc": 10}, recipe=f"passes:\n- wanda: {{sparsity: {sparsity}}}\n")
        assert made.vs is not None and made.vs.fidelity is not None
        found = replace(made.vs.fidelity, compressed_bits_per_byte=bits, kl=Estimate(value=bits, low=bits, high=bits))
        return made.model_copy(update={"vs": made.vs.model_copy(update={"fidelity": found})})

    publish([stored(tmp_path / "in", [dense, wanda(0.1, 1.8), wanda(0.9, math.inf)])], tmp_path / "site")
    page = Page(tmp_path / "site" / "index.html")
    sorted_by = {value for _, name, value in page.attributes if name == "data-v"}
    assert "inf" in page.text and "Infinity" in sorted_by and "inf" not in sorted_by  # as JavaScript reads it
    data = json.loads((tmp_path / "site" / "leaderboard.json").read_text(encoding="utf-8"))
    assert [model["bits_per_byte"] for model in data["boards"][0]["models"]] == [1.8, "Infinity"]
    LeaderboardOut.model_validate(data)
