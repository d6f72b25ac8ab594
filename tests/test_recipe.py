"""Recipes: strict YAML 1.2, errors that name their path, changes from the command line, and writing recipes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress import GPTQ, KV, RTN, SVD, Accept, Calibration, Limits, Magnitude, Recipe, RecipeError, Wanda, WeightPass
from compress.passes import PASSES, Pass
from compress.recipe import DEEPEST, LARGEST, apply_change, find, from_dict, load, packaged, parse

PACKAGED = list(packaged().values())


def read(text: str) -> Recipe:
    return from_dict(parse(text))


# -- YAML ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"), ("16:32", "16:32"), ("1e-2", 0.01), ("5e-1", 0.5), ("off", "off"), ("on", "on"), ("yes", "yes"),
        ("no", "no"), ("y", "y"), ("true", True), ("False", False), ("~", None), ("null", None), ("0.5", 0.5),
        ("017", 17), ("0o17", 15), ("0x1F", 31), ("'4'", "4"), (".inf", float("inf")), ("-3", -3),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse(f"value: {text}\n")["value"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_directive_does_not_bring_yaml_1_1_back() -> None:
    with pytest.raises(RecipeError, match=r"only YAML 1\.2 is supported"):
        parse("%YAML 1.1\n---\nvalue: 2:4\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"not valid YAML: .*duplicate key.*\(line 2\)"),
        ("passes:\n- wanda: {sparsity: 0.5, sparsity: 0.6}\n", r"not valid YAML: .*duplicate key"),
        ("a: &x 1\n", r"anchors, aliases and tags are not allowed \(line 1\)"),
        ("a: &x {b: 1}\nc: *x\n", r"anchors, aliases and tags are not allowed"),
        ("a: 1\nb: !!python/object:os.system x\n", r"anchors, aliases and tags are not allowed \(line 2\)"),
        ("a: !!str 1\n", r"anchors, aliases and tags are not allowed"),
        ("a: [1, 2\n", r"not valid YAML"),
        ("a: 'x\n", r"not valid YAML"),
        ("a: 1\n\tb: 2\n", r"not valid YAML"),
        ("a: \x01\n", r"not valid YAML"),
        ("a: 1\n---\nb: 2\n", r"not valid YAML"),
    ],
)
def test_what_is_not_plain_data_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^recipe: {message}"):
        parse(text)


def test_nesting_is_capped() -> None:
    parse("a: " + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))
    with pytest.raises(RecipeError, match=rf"nested deeper than {DEEPEST} \(line 1\)"):
        parse("a: " + "[" * DEEPEST + "]" * DEEPEST)


def test_a_very_deep_file_is_refused_not_crashed_on() -> None:
    with pytest.raises(RecipeError, match="nested deeper"):
        parse("[" * 20000)


def test_size_is_capped() -> None:
    with pytest.raises(RecipeError, match=rf"recipe: larger than {LARGEST} bytes"):
        parse("# " + "x" * LARGEST)


@pytest.mark.slow
@given(text=st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        recipe = read(text)
    except RecipeError:
        return
    assert recipe.passes


# -- errors name their path ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "problem"),
    [
        ("", "recipe", "expected a mapping with `passes`"),
        ("- wanda\n", "recipe", "expected a mapping with `passes`"),
        ("model: x\n", "passes", "expected a list with at least one pass"),
        ("passes: []\n", "passes", "expected a list with at least one pass"),
        ("passes: wanda\n", "passes", "expected a list with at least one pass"),
        ("passes: {wanda: {}}\n", "passes", "expected a list with at least one pass"),
        ("pases: [wanda]\n", "recipe", "unknown key 'pases'; did you mean 'passes'?"),
        ("model: 3\npasses: [wanda]\n", "model", "expected a folder or `builtin`, got 3"),
        ("passes: [wandaa]\n", "passes[0]", "unknown pass 'wandaa'; did you mean 'wanda'?"),
        ("passes: [rtn, gtpq: {bits: 4}]\n", "passes[1]", "unknown pass 'gtpq'; did you mean 'gptq'?"),
        ("passes: [3]\n", "passes[0]", "expected one `name: {options}`, got 3"),
        (
            "passes: [{wanda: {}, rtn: {}}]\n",
            "passes[0]",
            "expected one `name: {options}`, got {'wanda': {}, 'rtn': {}}",
        ),
        ("passes: [wanda: 0.5]\n", "passes[0].wanda", "expected options as `name: value`, got 0.5"),
        ("passes: [gptq: {bit: 4}]\n", "passes[0].gptq", "unknown option 'bit'; did you mean 'bits'?"),
        (
            "passes: [rtn, gptq: {bits: 1}]\n",
            "passes[1].gptq.bits",
            "1 is not allowed; it must be greater than or equal to 2",
        ),
        ("passes: [gptq: {bits: four}]\n", "passes[0].gptq.bits", "'four' is not allowed; it must be a valid integer"),
        (
            "passes: [gptq: {order: up}]\n",
            "passes[0].gptq.order",
            "'up' is not allowed; it must be 'natural', 'activation' or 'groups'",
        ),
        (
            "passes: [rtn]\nlimits: {max_untouched: 2}\n",
            "limits.max_untouched",
            "2 is not allowed; it must be less than or equal to 1",
        ),
        (
            "passes: [rtn]\nlimits: {untouched: 0}\n",
            "limits",
            "unknown option 'untouched'; did you mean 'max_untouched'?",
        ),
        ("passes: [rtn]\nlimits: 3\n", "limits", "expected options as `name: value`, got 3"),
        (
            "passes: [rtn]\ncalibration: {sample: 3}\n",
            "calibration",
            "unknown option 'sample'; did you mean 'samples'?",
        ),
        (
            "passes: [rtn]\ncalibration: {samples: 0}\n",
            "calibration.samples",
            "0 is not allowed; it must be greater than or equal to 1",
        ),
        ("passes: [rtn]\naccept: {max_drop: 0}\n", "accept.max_drop", "0 is not allowed; it must be greater than 0"),
        ("passes: [rtn]\nkv: {bits: 3}\n", "kv.bits", "3 is not allowed; it must be 8, 4 or 2"),
        ("passes: [rtn]\nkv: {bit: 4}\n", "kv", "unknown option 'bit'; did you mean 'bits'?"),
        ("passes: [rtn]\nkv: 4\n", "kv", "expected options as `name: value`, got 4"),
        ("kv: {bits: 4}\n", "passes", "expected a list with at least one pass"),
        ("passes: [rtn]\nordering: sites\n", "ordering", "'sites' is not allowed; it must be site, block or dense"),
    ],
)
def test_an_error_names_the_path_and_the_remedy(text: str, path: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        read(text)
    assert str(error.value) == f"{path}: {problem}"


def test_a_meaningless_pattern_names_its_path() -> None:
    with pytest.raises(RecipeError, match=r"^passes\[1\]\.wanda\.sparsity: '4:2'"):
        read("passes: [rtn, wanda: {sparsity: 4:2}]\n")


def test_a_recipe_reads_as_written() -> None:
    recipe = read(
        "model: some/folder\n"
        "calibration: {data: text, samples: 16, length: 64, seed: 3}\n"
        "ordering: block\n"
        "passes:\n- wanda: {sparsity: 2:4, sites: '*mlp*'}\n- gptq:\n    bits: 3\n- rtn\n- magnitude:\n"
        "limits: {max_fallbacks: 2}\naccept: {max_drop: 5e-2}\n"
        "kv: {bits: 2, residual: 32}\n"
    )
    assert recipe == Recipe(
        model="some/folder",
        passes=(Wanda(sparsity="2:4", sites="*mlp*"), GPTQ(bits=3), RTN(), Magnitude()),
        calibration=Calibration(data="text", samples=16, length=64, seed=3),
        ordering="block",
        limits=Limits(max_fallbacks=2),
        accept=Accept(max_drop=0.05),
        kv=KV(bits=2, residual=32),
    )


@pytest.mark.parametrize(("steps", "needs"), [((Magnitude(), RTN()), False), ((Magnitude(), GPTQ()), True)])
def test_a_recipe_knows_whether_it_needs_data(steps: tuple[WeightPass, ...], needs: bool) -> None:
    assert Recipe(passes=steps).needs_data() is needs


def test_a_recipe_needs_a_pass() -> None:
    with pytest.raises(RecipeError, match="passes: a recipe needs at least one pass"):
        Recipe(passes=())


# -- --set -----------------------------------------------------------------------------------------

TEXT = "model: x\npasses:\n- wanda: {sparsity: 2:4}\n- gptq\n- rtn:\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ("passes.0.sparsity=0.6", lambda r: r.passes[0] == Wanda(sparsity=0.6)),
        ("passes.0.sparsity=1:4", lambda r: r.passes[0] == Wanda(sparsity="1:4")),
        ("passes.1.bits=3", lambda r: r.passes[1] == GPTQ(bits=3)),
        ("passes[1].bits=3", lambda r: r.passes[1] == GPTQ(bits=3)),
        ("passes[1].gptq.bits=3", lambda r: r.passes[1] == GPTQ(bits=3)),
        ("passes.0.wanda.sparsity=0.6", lambda r: r.passes[0] == Wanda(sparsity=0.6)),
        ("passes.2.group=0", lambda r: r.passes[2] == RTN(group=0)),
        ("passes.1.sites='*.mlp.*'", lambda r: r.passes[1] == GPTQ(sites="*.mlp.*")),
        ("calibration.samples=7", lambda r: r.calibration.samples == 7),
        ("limits.max_fallbacks=3", lambda r: r.limits.max_fallbacks == 3),
        ("ordering=block", lambda r: r.ordering == "block"),
        ("model=builtin", lambda r: r.model == "builtin"),
        ("passes.1.damping=1e-3", lambda r: r.passes[1] == GPTQ(damping=0.001)),
        ("accept.max_drop=0.1", lambda r: r.accept == Accept(max_drop=0.1)),
        ("accept.suite=kick_mini", lambda r: r.accept is not None and r.accept.suite == "kick_mini"),
        ("kv.bits=2", lambda r: r.kv == KV(bits=2)),
    ],
)
def test_a_change_sets_one_option(file: Path, change: str, want: Any) -> None:
    assert want(load(file, [change]))


def test_a_change_may_be_a_bare_glob(file: Path) -> None:
    assert load(file, ["passes.1.sites=*.mlp.*"]).passes[1] == GPTQ(sites="*.mlp.*")


@pytest.mark.parametrize("key", ["calibration", "limits", "accept", "delta", "kv"])
def test_a_change_opens_a_key_that_holds_nothing(tmp_path: Path, key: str) -> None:
    option = {
        "calibration": "samples",
        "limits": "max_fallbacks",
        "accept": "confidence",
        "delta": "base",
        "kv": "bits",
    }
    value = {"delta": "org/base", "accept": "0.9"}.get(key, "4")
    (tmp_path / "null.yaml").write_text(f"{key}:\npasses: [rtn: {{}}]\n")
    (tmp_path / "none.yaml").write_text("passes: [rtn: {}]\n")
    change = [f"{key}.{option[key]}={value}"]
    assert load(tmp_path / "null.yaml", change) == load(tmp_path / "none.yaml", change)


def test_changes_apply_in_order(file: Path) -> None:
    assert load(file, ["passes.1.bits=3", "passes.1.bits=5", "passes.1.group=32"]).passes[1] == GPTQ(bits=5, group=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("passes.0.sparsity", "expected path=value, such as passes.0.sparsity=0.6"),
        ("passes.9.bits=3", "no item '9'; there are 3"),
        ("passes[3].gptq.bits=3", "no item '3'; there are 3, numbered from 0"),
        ("passes[0].gptq.bits=3", "passes[0].wanda: unknown option 'gptq'"),
        ("passes[1].gptq=3", "passes[1].gptq: unknown option 'gptq'"),
        ("passes[1]=rtn", "name one of its options, such as passes[1].sparsity"),
        ("passes[first].bits=3", "--set passes[first].bits: unknown key 'passes[first]'; did you mean 'passes'?"),
        ("passes.-1.bits=3", "no item '-1'; there are 3"),
        ("passes.first.bits=3", "no item 'first'; there are 3"),
        ("passes.0=rtn", "name one of its options, such as passes.0.sparsity"),
        ("passes.0.sparsity.x=1", "'sparsity' has no options"),
        ("model.x=1", "'model' has no options"),
        ("passes.1.bits=[3", "not valid YAML"),
        ("passes.1.bits=99", r"passes[1].gptq.bits: 99 is not allowed"),
        ("passes.1.bit=3", r"passes[1].gptq: unknown option 'bit'; did you mean 'bits'?"),
        ("limit.max_fallbacks=3", "--set limit.max_fallbacks: unknown key 'limit'; did you mean 'limits'?"),
        ("bits=3", "--set bits: unknown key 'bits'; did you mean 'passes.1.bits'?"),
        ("samples=8", "--set samples: unknown key 'samples'; did you mean 'calibration.samples'?"),
        ("=3", "--set : unknown key ''"),
    ],
)
def test_a_change_that_leads_nowhere_is_refused(file: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(file, [change])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("", "ordering=block"),
        ("3", "a=1"),
        (TEXT, "passes.².bits=3"),
        ("passes: 3", "bits=3"),
        ("passes: [3, [rtn], {}]", "bits=3"),
    ],
)
def test_a_change_of_something_else_is_refused(text: str, change: str) -> None:
    data = parse(text)
    with pytest.raises(RecipeError):
        apply_change(data, change)
        from_dict(data)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", PACKAGED, ids=lambda p: p.stem)
def test_every_packaged_recipe_reads_and_writes(path: Path) -> None:
    recipe = load(path)
    assert load(path.stem) == recipe
    assert read(recipe.to_yaml()) == recipe


@pytest.mark.slow
@pytest.mark.parametrize("kind", PASSES.values(), ids=PASSES)
def test_every_pass_survives_the_way_to_yaml_and_back(kind: type[Pass]) -> None:
    recipe = Recipe(passes=(kind(), Wanda(sites="*.mlp.*"), SVD(sites="*.o_proj"), RTN()))
    assert read(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(passes=(Wanda(sparsity="2:4"), GPTQ(bits=3, damping=1e-05, order="activation", target="original"))),
        Recipe(passes=(Wanda(),), model="a: b # c", calibration=Calibration(data="off", samples=1, length=8, seed=9)),
        Recipe(passes=(RTN(sites="[ab]*: yes"),), limits=Limits(max_untouched=1.0, max_fallbacks=9), accept=Accept()),
        Recipe(passes=(Magnitude(sparsity=1, scope="16x16"),), ordering="block", model="~"),
    ],
    ids=lambda r: r.passes[0].name,
)
def test_a_recipe_survives_the_way_to_yaml_and_back(recipe: Recipe) -> None:
    assert read(recipe.to_yaml()) == recipe


def test_the_text_of_a_recipe_writes_every_option_out() -> None:
    text = Recipe(passes=(GPTQ(),)).to_yaml()
    assert all(
        f"{name}:" in text for name in ("bits", "group", "damping", "order", "samples", "ordering", "max_fallbacks")
    )


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe file at '.*nothing\.yaml'"):
        find(tmp_path / "nothing.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: cannot be read"):
        load(path)
