"""A user's pass, in a file of at most twenty lines, works like a built-in one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import RecipeError
from compress.artifact import Artifact, verify
from compress.recipe import from_dict, load

SOURCE = '''\
"""One bit a weight."""
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from compress import Dense, Signs, Site, Weight, WeightPass


@dataclass(frozen=True, kw_only=True)
class OneBit(WeightPass, name="one-bit"):
    """The sign of each weight times the mean size of its row."""

    shrink: Annotated[float, Field(gt=0, le=1, description="factor on every scale")] = 1.0

    def rewrite(self, site: Site) -> Weight:
        w_OI = site.expect(Dense, by=self.name).dense().float()
        return Signs(w_OI > 0, w_OI.abs().mean(1, keepdim=True) * self.shrink)
'''
RECIPE = "passes:\n- one-bit: {shrink: 0.9, sites: '*.mlp.*'}\n"


def import_file(path: Path) -> None:
    """Run a file as a module of its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[path.stem])


@pytest.fixture
def example(tmp_path: Path, registry: dict[str, Any]) -> Iterator[Path]:
    """The file, not yet imported; afterwards nobody knows its pass any more."""
    del registry  # restores the registered passes
    path = tmp_path / "one_bit_of_mine.py"
    path.write_text(SOURCE)
    yield path
    sys.modules.pop(path.stem, None)


@pytest.fixture
def one_bit(example: Path, registry: dict[str, Any]) -> Any:
    """The class, from its own file."""
    import_file(example)
    return registry["one-bit"]


def logits(folder: Path, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(compress.load(folder)(ids).logits)


def test_the_example_is_short() -> None:
    assert len(SOURCE.splitlines()) <= 20


def test_it_runs_from_python(one_bit: Any, tiny_llama: Path, tmp_path: Path, ids: Tensor) -> None:
    report = compress.run(tiny_llama, [one_bit()], tmp_path / "out")
    assert report.bits_per_weight < 2
    assert verify(report.out)
    assert bool(torch.isfinite(logits(report.out, ids)).all())


def test_it_runs_from_a_recipe(one_bit: Any, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    report = compress.run(tiny_llama, tmp_path / "mine.yaml", tmp_path / "out")
    sites = Artifact(report.out).provenance["sites"]
    assert load(tmp_path / "mine.yaml").passes == (one_bit(shrink=0.9, sites="*.mlp.*"),)
    assert {row["weight"] for row in sites.values()} == {"sign"}
    assert len(sites) == 6


@pytest.mark.usefixtures("one_bit")
def test_its_artifact_loads_without_it(tiny_llama: Path, tmp_path: Path, ids: Tensor, registry: dict[str, Any]) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    out = compress.run(tiny_llama, tmp_path / "mine.yaml", tmp_path / "out").out
    del registry["one-bit"]
    weight = Artifact(out).tensor("model.layers.0.mlp.up_proj.weight")
    assert weight.abs().unique(dim=1).shape == (72, 1)
    assert bool(torch.isfinite(logits(out, ids)).all())


@pytest.mark.usefixtures("one_bit")
def test_its_options_are_strict(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("passes: [one-bit: {shrink: 2}]\n")
    with pytest.raises(RecipeError, match=r"^passes\[0\]\.one-bit\.shrink: 2 is not allowed; it must be less than or"):
        load(tmp_path / "mine.yaml")


def test_it_follows_ours(one_bit: Any, tiny_llama: Path, tmp_path: Path) -> None:
    steps = [compress.Magnitude(sites="*.self_attn.*"), one_bit(sites="*.mlp.*")]
    sites = Artifact(compress.run(tiny_llama, steps, tmp_path / "out").out).provenance["sites"]
    assert len(sites) == 14


@dataclass
class Entry:
    """What `importlib.metadata` gives for a declared entry point."""

    path: Path

    def load(self) -> None:
        import_file(self.path)


def test_an_installed_package_brings_its_passes(
    example: Path, registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.passes.declared", lambda path: [Entry(example)])
    assert from_dict({"passes": ["one-bit"]}).passes == (registry["one-bit"](),)


@pytest.mark.parametrize("group", [[("gone", "no_such_module"), "No module named 'no_such_module'"],
                                   [("odd", "json:loads.no"), "has no attribute 'no'"]], ids=str)  # fmt: skip
def test_a_package_whose_pass_cannot_be_imported_is_named_in_one_line(
    group: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, value), why = group
    entry = EntryPoint(name=name, value=value, group="compress.passes")
    monkeypatch.setattr("compress.passes.declared", lambda path: [entry])
    code, out, err = cli("passes")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"the pass {name!r} cannot be imported from {value}: " in err and why in err


@pytest.mark.parametrize("name", ["errors", "weight", "inputs"])
def test_a_note_under_a_name_that_rows_have_is_refused(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    class Noting(compress.Magnitude):
        def score(self, site: compress.Site) -> Tensor:
            site.ledger[name] = 1
            return super().score(site)

    with pytest.raises(RecipeError, match=f"a pass noted '{name}' in the ledger, which is a field of every row"):
        compress.run(tiny_llama, [Noting()], tmp_path / "o")
    assert not (tmp_path / "o").exists()
