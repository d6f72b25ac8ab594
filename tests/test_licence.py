"""The licence in a model's card, and the notices beside it, are carried over to whatever is made from the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import compress
from compress import RTN, Delta, Recipe, merge
from compress.artifact import verify
from compress.export import export
from compress.export.dense import export_dense
from compress.frontmatter import agreed, carried, front_matter, lines

SAID = {
    "license": "other", "license_name": "llama<b>&co", "license_link": "https://a/b?c=1&d=2", "language": ["en", "no"],
    "pipeline_tag": "text-generation",
}  # fmt: skip
CARD = """---
language: [en, no]
license: other
license_name: "llama<b>&co"
license_link: https://a/b?c=1&d=2
pipeline_tag: text-generation
tags: [x]
---
# A model
"""
NOTICES = {"LICENSE.txt", "notice", "Use_Policy.md"}


@pytest.fixture(scope="module")
def owned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says whose it is, with a licence beside it that is too large to be one."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("owned") / "m"))
    (folder / "README.md").write_text(CARD)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    for name in NOTICES:
        (folder / name).write_text("all rights")
    with (folder / "LICENSE.bin").open("wb") as file:
        file.truncate((1 << 20) + 1)
    return folder


def check(folder: Path) -> None:
    """All is said and beside it."""
    assert carried(folder) == SAID
    assert {name for name in NOTICES if (folder / name).is_file()} == NOTICES
    assert not (folder / "LICENSE.bin").exists()


@pytest.mark.slow
def test_a_run_and_its_exports_carry_it(owned: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    out = compress.run(owned, [RTN(bits=8, group=0, symmetric=True)], tmp_path / "out").out
    verify(out)
    check(out)
    assert front_matter(out / "README.md")["base_model"] == "m"
    for form in ("dense", "compressed-tensors"):
        made = export(out, form, tmp_path / form).out
        check(made)
        text = (made / "README.md").read_text()
        assert front_matter(made / "README.md")["tags"] == ["compress", form]
        assert f"by Compress {compress.__version__}" in text and "rtn:" in text
        assert "<b>" not in text


@pytest.mark.slow
def test_a_delta_and_what_it_is_applied_to_carry_it(owned: Path, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(RTN(bits=4, group=8),), delta=Delta(base=str(tiny_llama)))
    delta = compress.run(owned, recipe, tmp_path / "delta").out
    check(delta)
    done = export_dense(delta, tmp_path / "applied", tiny_llama)
    check(done.out)
    assert f"its difference from `{tiny_llama.name}`" in (done.out / "README.md").read_text()


def test_a_merge_carries_what_all_say(owned: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(owned, tmp_path / "other"))
    check(merge(owned, [tiny_llama, other], tmp_path / "same").out)  # one of them says nothing
    (other / "README.md").write_text(CARD.replace("other", "mit"))
    out = merge(owned, {"b": tiny_llama, "a": other}, tmp_path / "differ").out
    assert carried(out) == {key: value for key, value in SAID.items() if key != "license"}
    said = (out / "README.md").read_text()
    assert 'state different licences; each of them holds: `m` `"other"`, `a` `"mit"`.' in said


def test_what_cannot_be_said_in_one_line_is_left_out(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "license: |\n  two\n  lines": {}, 'license: "\\ud800"': {}, 'license: "a\\e[31m"': {}, "license: 3": {},
        f"license: {'x' * 501}": {}, f"language: [{'en, ' * 257}en]": {}, "license: [mit, {a: b}]": {},
        "license: &x mit\nlanguage: *x": {}, f"a: {'[' * 200}": {}, "license: 2024-99-99": {},
        "license: [mit, 'a: b #c']": {"license": ["mit", "a: b #c"]}, "license: '--- \U0001f600'": {
            "license": "--- \U0001f600"}, f"license: mit\nx: {'y' * 70_000}": {},
    }  # fmt: skip
    for text, said in cases.items():
        (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
        assert carried(tmp_path) == said, text[:40]
        (tmp_path / "README.md").write_text("\n".join(["---", *lines(said), "---", ""]))
        assert carried(tmp_path) == said


@pytest.mark.parametrize(
    "card", ["---\nlicense: mit\n---", "\ufeff---\nlicense: mit\n---\n", "---\r\nlicense: mit\r\n---\r\n"]
)
def test_a_card_that_ends_or_begins_oddly_is_read(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert carried(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n--- and more")
    assert carried(tmp_path) == {}


def test_cards_that_say_nothing_do_not_count() -> None:
    assert agreed([]) == agreed([{}]) == {}
    assert agreed([{}, {"license": "mit", "language": "en"}, {"license": "mit"}]) == {"license": "mit"}
