"""Untrusted names are shown literally: no console markup, no HTML, and no terminal control sequences."""

from __future__ import annotations

import io
import json
import re
import shutil
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import compress
from compress import CompressError, Magnitude
from compress.artifact import Artifact
from compress.card import card
from compress.commands.output import readable
from compress.console import Progress, escape, inspect_table, quality_table, survey_table
from compress.events import Fallback, ModelReshaped, RunStarted
from compress.survey import survey

EVIL = ["[red]x[/red]", "[/]", "[bold", "[link=http://evil]x[/link]", "x\\", "a[/]b\\[c]"]
HTML = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"'><svg onload=alert(1)>", "</code></pre><b>",
    "```\n<b>",
        "[x](javascript:alert(1))", "a|b", "`<b>`", "&lt;b&gt;", "]]>", "<!--", "{{ 7*7 }}", "{% raw %}"]  # fmt: skip
UNSEEN = [
    "\x1b[31m",
    "\x1b]8;;http://evil\x07",
    "\x9b31m",
    "\r",
    "\x08" * 9,
    "a\nb",
    "\u202ea",
    "\u2066a",
    "\0",
    "\ud800",
    "\x07",
]


def printed(*things: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=4000, highlight=False)
    for thing in things:
        console.print(readable(thing))
    return file.getvalue()


def view(artifact: Path, name: str) -> dict[str, Any]:
    """What `inspect` shows, with a name in every place that has one."""
    made = deepcopy(Artifact(artifact).provenance)
    row = {**next(iter(made["sites"].values())), "weight": name, "fallbacks": [(name, name)], "starved": [name]}
    return {"path": name, "source": name, "version": name, "calibration": name, "sizes": made["sizes"],
            "probe": made["probe"], "untouched": {name: 1}, "reshaped": [{"step": name, "change": name}],
            "base": {"name": name}, "sites": {name: row}}  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_markup_in_a_name_is_text(name: str, llama_artifact: Path, tiny_llama: Path) -> None:
    surveyed = {**survey(tiny_llama), "path": name, "family": name, "architecture": name, "untouched": {name: 1}}
    said = printed(*inspect_table(view(llama_artifact, name)), *survey_table(surveyed), quality_table([], name))
    assert said.count(name) >= 12
    assert "\x1b[31m" not in said and "\x1b]8" not in said


@pytest.mark.parametrize("name", EVIL)
def test_markup_in_an_event_is_text(name: str) -> None:
    file = io.StringIO()
    show = Progress(Console(file=file, force_terminal=True, width=4000, highlight=False))
    show(RunStarted(model=name, blocks=1, sites=1, steps=(name,), calibration=name, tokens=1, untouched={name: 1}))
    show(ModelReshaped(step="x", change=name, parameters=(1, 1), blocks=(1, 1)))
    show(Fallback(site=name, step="x", reason=name))
    assert re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()).count(name) == 7


@pytest.mark.parametrize("text", UNSEEN)
def test_what_does_not_show_is_escaped(text: str) -> None:
    assert str(CompressError(text)).isprintable() and escape(text).isprintable()
    assert str(CompressError("plain")) == "plain" == escape("plain")


def test_a_message_has_an_end() -> None:
    assert len(str(CompressError("x" * 10**6))) == 2000


@pytest.mark.parametrize("line", ["[/]", "x [/y] z", "[red]fine[/]"])
def test_a_line_that_is_no_markup_is_printed_as_it_is(line: str) -> None:
    assert "fine" in str(readable(line)) or str(readable(line)) == line


class Tags(HTMLParser):
    """Collects what a browser would take for a tag or a comment."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(tag)

    handle_endtag = handle_startendtag = handle_comment = handle_decl = lambda self, *found: self.found.append(
        str(found)
    )


@pytest.mark.parametrize("name", [*HTML, *UNSEEN])
def test_a_card_holds_names_and_no_html(name: str, llama_artifact: Path) -> None:
    from ruamel.yaml import YAML

    made = deepcopy(Artifact(llama_artifact).provenance)
    plain = card(made)
    made["source"]["name"] = made["calibration"]["name"] = made["versions"]["compress"] = name
    made["sites"] = {name: {**next(iter(made["sites"].values())), "weight": name}}
    made["untouched"], made["base"] = {name: (1, name)}, {"name": name, "sha256": "0"}
    made["reshaped"] = [{"step": name, "change": name}]
    text = card(made)
    outside, parser = text.partition("## Recipe")[0], Tags()
    parser.feed(outside)
    assert parser.found == []
    front = YAML(typ="safe", pure=True).load(text.split("---")[1])
    assert front.keys() == {"library_name", "base_model", "tags"}
    assert name == "\ud800" or front["base_model"] == name
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {8} and plain != text


@pytest.mark.parametrize("recipe", ["a: '```'\n", "a: |\n  ```\n  <b>x</b>\n  ````\n"])
def test_a_recipe_stays_in_its_fence(recipe: str, llama_artifact: Path) -> None:
    made = deepcopy(Artifact(llama_artifact).provenance)
    made["recipe"] = recipe
    block = card(made).partition("## Recipe")[2].partition("## Sites")[0].strip()
    fence = block[: block.index("yaml")]
    assert block == f"{fence}yaml\n{recipe}{fence}" and fence not in recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["<b>x", "[red]x", "a b|c", "'quoted\"", "$(touch x)", "-rf"])
def test_a_folder_of_any_name_is_compressed_and_shown(name: str, tiny_llama: Path, tmp_path: Path, cli: Any) -> None:
    folder, out = Path(shutil.copytree(tiny_llama, tmp_path / name)), tmp_path / f"{name} out"
    compress.run(folder, [Magnitude()], out)
    for command in ("verify", "inspect"):
        code, said, _ = cli(command, out)
        assert code == 0 and (command == "verify" or name in said)
    assert json.loads((out / "compress.json").read_text())["source"]["name"] == name
    assert "<b>" not in (out / "README.md").read_text().partition("## Recipe")[0]


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\u202ex"])
def test_a_folder_whose_name_does_not_show_gives_one_line(
    name: str, tiny_llama: Path, tmp_path: Path, cli: Any
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / name))
    code, printed_, said = cli(
        "run", "rtn-int4", "--model", folder, "--set", "passes.0.bits=99", "--out", tmp_path / "o"
    )
    assert code == 2 and not printed_ and said.count("\n") == 1
    (folder / "model.safetensors").write_bytes(b"")
    code, printed_, said = cli("run", "rtn-int4", "--model", folder, "--out", tmp_path / "o")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable()
