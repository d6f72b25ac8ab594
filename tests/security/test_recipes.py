"""Untrusted recipes are only data: bombs, code, and tricks with text or numbers give one line, and no code is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.passes import PASSES
from compress.recipe import LARGEST, from_dict, load

Refuse = Callable[..., str]
GOOD = "passes: [rtn: {bits: 4, group: 8}]\n"
CODE = "__import__('os').system('touch CANARY')"

TEXTS: dict[str, str] = {
    "an alias bomb": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\npasses: *c",
    "an anchor": "passes: &a [rtn]",
    "a merge of an alias": "a: &a {bits: 4}\npasses: [rtn: {<<: *a}]",
    "an object": f"passes: !!python/object/apply:os.system [\"{CODE}\"]",
    "a name": "passes: [rtn: {bits: !!python/name:os.system }]",
    "a module": "passes: !!python/module:os",
    "bytes": "passes: [rtn: {bits: !!binary aaaa}]",
    "a tag of its own": "%TAG ! tag:evil,2026:\n---\npasses: [!x rtn]",
    "YAML 1.1": "%YAML 1.1\n---\n" + GOOD,
    "two documents": f"{GOOD}---\n{GOOD}",
    "deep lists": "passes: " + "[" * 50_000,
    "deep mappings": "\n".join(" " * i + "a:" for i in range(300)),
    "a key twice": "passes: [rtn]\npasses: [rtn]",
    "an option twice": "passes: [rtn: {bits: 4, bits: 8}]",
    "a list as a key": "passes: [rtn]\n? [a]\n: b",
    "a mapping as a key": "passes: [{? {a: 1} : 2}]",
    "a number as a key": "passes: [1: {}]",
    "no key": "passes: [~: {}]",
    "nothing": "", "a scalar": "3", "a NUL": "passes: [rtn]\0", "a tab": "passes:\n\t- rtn",
    "too long": "#" * (LARGEST + 1) + "\n" + GOOD,
    "too long in bytes": "# " + "\u00e9" * (LARGEST // 2) + "\n" + GOOD,
    "9000 passes": "passes: [" + ", ".join(["rtn"] * 9000) + "]",
    "65 passes": "passes: [" + ", ".join(["rtn"] * 65) + "]",
    "5000 digits": "passes: [rtn: {bits: " + "9" * 5000 + "}]",
    "1e400": "passes: [rtn: {bits: 1e400}]", "a float": "passes: [rtn: {bits: 4.0}]",
    "a truth": "passes: [rtn: {bits: true}]",
    "a date": "passes: [rtn: {bits: 2020-01-01}]", "no date": "passes: [rtn: {bits: 2020-99-99}]",
    "NaN": "passes: [magnitude: {sparsity: .nan}]", "infinity": f"{GOOD}limits: {{max_untouched: .inf}}",
    "NaN as a limit": f"{GOOD}limits: {{max_untouched: .nan}}", "NaN accepted": f"{GOOD}accept: {{max_drop: .nan}}",
    "a seed of 60 digits": f"{GOOD}calibration: {{seed: {'9' * 60}}}",
    "code as a number": f'passes: [rtn: {{bits: "{CODE}"}}]', "code as a pass": f'passes: ["{CODE}"]',
    "a dunder": "passes: [__class__: {}]", "a dunder option": "passes: [rtn: {__init__: 1}]",
    "an import": "passes: [os.system: {}]", "a template": "passes: ['{{ 7*7 }}', '${HOME}']",
    "trust": GOOD + "trust_remote_code: true", "an escape": 'passes: [rtn: {sites: "\\e[31m\\a"}]',
    "text turned round": "passes: [rtn: {sites: \"\u202eabc\"}]", "half a pair": 'passes: [rtn: {sites: "\\ud800"}]',
    "a line in a name": 'passes: ["rtn\\nerror: fine"]', "no width": "passes: [r\u200btn]",
    "letters that look alike": "passes: [\U0001d42b\U0001d42d\U0001d427]", "Cyrillic": "passes: [w\u0430nda]",
    "a model that is a list": GOOD + "model: [a]", "an order that is a mapping": GOOD + "ordering: {a: 1}",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_a_hostile_recipe(text: str, tmp_path: Path, refuse: Refuse, canary: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXTS[text].replace("CANARY", str(canary)), encoding="utf-8")
    refuse(lambda: load(path), "bad input", "hostile recipes")


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00", b"\x80\x04\x95c__main__\n", GOOD.encode("utf-16"), b"\xed\xa0\x80"])
def test_bytes_that_are_no_text(raw: bytes, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "r.yaml").write_bytes(raw)
    refuse(lambda: load(tmp_path / "r.yaml"), "bad input", "hostile recipes")


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path, refuse: Refuse) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(1 << 40)
    assert "larger than" in refuse(lambda: load(tmp_path / "r.yaml"), "bad input", "hostile recipes")


@pytest.mark.parametrize("name", ["/dev/zero", "../../../etc/passwd", "x" * 5000, "a\0b", ""])
def test_a_place_that_is_no_recipe(name: str, refuse: Refuse) -> None:
    refuse(lambda: load(name), "bad input", "hostile recipes")


STRANGE = [float("nan"), float("inf"), -float("inf"), 1e308, -1, 10**30, -(10**30), "", "x" * 10_000, "\x1b[31m",
    None, [],
           [[]], {}, True, b"x"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_no_option_of_any_pass_breaks_on_a_strange_value(name: str, tally: Any) -> None:
    """Some values are allowed; every other one is a RecipeError."""
    for option in fields(PASSES[name]):
        for value in STRANGE:
            with tally("bad input", "strange values of options, refused or allowed by the option"):
                try:
                    from_dict({"passes": [{name: {option.name: value}}]})
                except compress.RecipeError as error:
                    assert str(error).isprintable()
                else:
                    assert value == value, f"{name}.{option.name} takes NaN"


@pytest.mark.parametrize(
    "data", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/shadow\0", "/nowhere", ".", "hub:../../x"]
)
def test_a_recipe_that_reads_what_is_no_text(
    data: str, single: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(single.parent)  # "." is a folder of this test, not a checkout with its environment
    calibration = compress.Calibration(data=data, samples=4, length=32)
    refuse(
        lambda: compress.run(single, [compress.Wanda()], single.parent / "out", calibration=calibration),
        "bad input",
        "hostile recipes",
    )


@pytest.mark.slow
@pytest.mark.parametrize("text", ["an object", "an alias bomb", "9000 passes", "an escape", "1e400"])
def test_the_command_line_says_it_in_one_line(text: str, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "r.yaml").write_text(TEXTS[text], encoding="utf-8")
    code, printed, said = cli("run", tmp_path / "r.yaml", "--model", "builtin", "--out", tmp_path / "out")
    assert (code, printed) == (2, "") and not (tmp_path / "out").exists()
    assert said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable()
