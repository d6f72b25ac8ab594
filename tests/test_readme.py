"""The README and the pages in docs are correct: the recipe parses, the pass runs, commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import compress
from compress.cli import app
from compress.recipe import from_dict, parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def block(language: str, containing: str) -> str:
    """The fenced block of a language that contains a text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return next(text for kind, text in blocks if kind == language and containing in text)


def test_the_recipe_in_the_readme_is_valid() -> None:
    recipe = from_dict(parse(block("yaml", "calibration:")))
    assert [step.name for step in recipe.passes] == ["wanda", "gptq"]


def test_the_pass_in_the_readme_runs_and_loads(tiny_llama: Path, tmp_path: Path) -> None:
    code = block("python", "class SquaredWanda")
    namespace: dict[str, object] = {"__name__": "readme_pass"}
    exec(compile(code, "README.md", "exec"), namespace)
    kind = namespace["SquaredWanda"]
    report = compress.run(
        tiny_llama,
        [kind(sparsity=0.5)],
        tmp_path / "o",
        calibration=compress.Calibration(samples=4, length=32),  # type: ignore[operator]
    )
    model = compress.load(report.out)
    assert len(code.splitlines()) <= 20
    assert float((model.model.layers[0].mlp.up_proj.expression.dense() == 0).float().mean()) == 0.5


@pytest.mark.parametrize(
    "line", re.findall(r"^(compress \w+.*?)\s*(?:#.*)?$", block("", "compress run quickstart"), re.M)
)
def test_each_command_in_the_readme_exists(line: str) -> None:
    command = line.split()[1]
    names = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
    names |= {group.typer_instance.info.name for group in app.registered_groups if group.typer_instance}
    assert command in names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_states_its_measured_result_and_command(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("model:")[0]
    assert re.search(r"# Source: .+", header)
    assert re.search(r"# Measured \d{4}-\d\d-\d\d on .+ by `.+`", header)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_seven_recipes_at_least() -> None:
    assert len(RECIPES) >= 7
