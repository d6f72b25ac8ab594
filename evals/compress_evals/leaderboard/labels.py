"""Places the labels of points in a figure so that they overlap as little as possible. Lengths are typographic points.

It is a greedy search over a few candidate places per label, not an optimal layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

HEIGHT = 9.0  # of a line of text in 8 points
PER_LETTER = 4.3  # approximate width: the text is rendered in the reader's own fonts
DISTANCES = (7.0, 12.0, 18.0, 26.0, 37.0, 50.0)
COMPASS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))  # above right is tried first
HIDES_NAME, HIDES_POINT, HIDES_LINE, LEAVES = 200.0, 60.0, 6.0, 400.0  # cost of each overlap, in points of distance
MARK = 4.0  # radius of a point

Place = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top


def placed(
    names: Sequence[str], anchors: Sequence[Place], points: Sequence[Place], line: Sequence[Place], room: Box
) -> list[Place]:
    """The lower left corner of each name, near its anchor and within `room` if it fits; earlier names are placed first.

    `points` are all points drawn, `line` holds sample points along the line drawn between them.
    """
    taken: list[Box] = []
    for name, (x, y) in zip(names, anchors, strict=True):
        width = PER_LETTER * len(name)
        tries = [(far, box_beside(x, y, width, far, way)) for far, way in product(DISTANCES, COMPASS)]
        costs = [
            far + cost(box, taken, points, line, room) + HIDES_LINE * led_over((x, y), box, taken) for far, box in tries
        ]
        taken.append(tries[costs.index(min(costs))][1])
    return [(left, bottom) for left, bottom, _, _ in taken]


def box_beside(x: float, y: float, width: float, far: float, way: tuple[int, int]) -> Box:
    """The box of a name at distance `far` from a point, in the direction `way`."""
    length = math.hypot(*way)
    middle_x = x + way[0] * (far / length + width / 2)
    middle_y = y + way[1] * (far / length + HEIGHT / 2)
    return middle_x - width / 2, middle_y - HEIGHT / 2, middle_x + width / 2, middle_y + HEIGHT / 2


def cost(box: Box, taken: Sequence[Box], points: Sequence[Place], line: Sequence[Place], room: Box) -> float:
    """The cost of a place for a name: what it covers (names, points, the line), and whether it leaves `room`."""
    left, bottom, right, top = box
    names = sum(left < r and le < right and bottom < t and b < top for le, b, r, t in taken)
    hidden = sum(left - MARK < x < right + MARK and bottom - MARK < y < top + MARK for x, y in points)
    crossed = sum(left < x < right and bottom < y < top for x, y in line)
    outside = left < room[0] or bottom < room[1] or right > room[2] or top > room[3]
    return HIDES_NAME * names + HIDES_POINT * hidden + HIDES_LINE * crossed + LEAVES * outside


def led_over(anchor: Place, box: Box, taken: Sequence[Box]) -> int:
    """How many sample points of the line from a point to its name lie on other names."""
    led = along([anchor, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)])
    return sum(left < x < right and bottom < y < top for x, y in led for left, bottom, right, top in taken)


def along(corners: Sequence[Place], step: float = 3.0) -> list[Place]:
    """Sample points, at most `step` apart, along the line through `corners`."""
    found: list[Place] = []
    for (x, y), (to_x, to_y) in pairwise(corners):
        count = max(1, math.ceil(math.hypot(to_x - x, to_y - y) / step))
        found += [(x + (to_x - x) * i / count, y + (to_y - y) * i / count) for i in range(count + 1)]
    return found
