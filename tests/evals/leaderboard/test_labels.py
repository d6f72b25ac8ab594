"""Labels of points are placed near them, do not overlap each other, and cover nothing if there is room."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_evals.leaderboard.labels import HEIGHT, MARK, PER_LETTER, along, placed

ROOM = (0.0, 0.0, 390.0, 260.0)


def box(name: str, corner: tuple[float, float]) -> tuple[float, float, float, float]:
    left, bottom = corner
    return left, bottom, left + PER_LETTER * len(name), bottom + HEIGHT


def test_a_name_stands_right_above_its_point_where_nothing_is() -> None:
    [(left, bottom)] = placed(["gptq"], [(100, 100)], [(100, 100)], [], ROOM)
    assert 100 < left < 110 and 100 < bottom < 110


def test_names_at_the_edge_stay_inside() -> None:
    names, anchors = ["sparsegpt-sparsity=0.1", "vq"], [(388.0, 258.0), (1.0, 1.0)]
    for name, corner in zip(names, placed(names, anchors, anchors, [], ROOM), strict=True):
        left, bottom, right, top = box(name, corner)
        assert left >= 0 and bottom >= 0 and right <= 390 and top <= 260


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(60, 330), st.floats(40, 220)), min_size=1, max_size=6))
def test_few_names_hide_neither_each_other_nor_points(anchors: list[tuple[float, float]]) -> None:
    names = [f"recipe-{i}" for i in range(len(anchors))]
    boxes = [box(*each) for each in zip(names, placed(names, anchors, anchors, [], ROOM), strict=True)]
    for (left, bottom, right, top), (other, low, end, high) in combinations(boxes, 2):
        assert right <= other or end <= left or top <= low or high <= bottom
    for left, bottom, right, top in boxes:
        assert not any(left - MARK < x < right + MARK and bottom - MARK < y < top + MARK for x, y in anchors)


def test_places_along_a_line() -> None:
    found = along([(0, 0), (9, 0), (9, 3)])
    assert found[0] == (0, 0) and found[-1] == (9, 3) and (9, 0) in found
