"""Which names a pass's `sites` select."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.model.globs import matches

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.31.mlp.down_proj")


@pytest.mark.parametrize(
    ("globs", "chosen"),
    [
        ("*", (0, 1, 2)),
        ("*q_proj", (0,)),
        ("*q_proj *.31.*", (0, 2)),
        ("* !*down_proj", (0,)),
        ("!*down_proj", (0,)),
        ("*mlp* !*.31.* !*.3.*", (1,)),
        ("!*", ()),
        ("", ()),
        ("q_proj", ()),
    ],
)
def test_globs_select_and_exclude(globs: str, chosen: tuple[int, ...]) -> None:
    assert [name for name in NAMES if matches(name, globs)] == [NAMES[i] for i in chosen]


@given(st.text(alphabet="ab.*[]?", min_size=1), st.text(alphabet="ab.", max_size=8))
def test_one_glob_is_a_glob_and_its_exclusion_the_rest(glob: str, name: str) -> None:
    assert matches(name, glob) == fnmatchcase(name, glob) != matches(name, f"!{glob}")
