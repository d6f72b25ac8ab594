"""The ledger as a picture: the errors of each block's sites, and the sizes of the blocks before and after.

One SVG without scripts or embedded fonts, light or dark like the viewer's colour scheme; the same ledger gives the same
bytes. Each line shows one kind of site; where a block has several of a kind, such as experts, their median and range.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from compress.errors import visible

Row = Mapping[str, Any]
Blocks = Mapping[int, Mapping[str, Sequence[Row]]]  # block number -> kind of site -> rows
WIDE, LEFT, RIGHT = 960, 84, 24  # pixels, as in the next line
LEGEND, LINE, HIGH, GAP = 90, 24, 190, 74
PALETTE = ("4477aa", "ee6677", "228833", "aa8800", "2299bb", "aa3377", "777777", "cc7711")  # after Paul Tol's "bright"
STYLE = """\
svg{background:#fff;color:#222;font:13px system-ui,sans-serif}text{fill:currentColor}.h{font-size:19px;font-weight:600}
.t{font-weight:600}.s{fill-opacity:.75}.n{text-anchor:end}.m{text-anchor:middle}.g{stroke:currentColor;stroke-opacity:.16}
.l{fill:none;stroke-width:1.5;stroke-linejoin:round;stroke-opacity:.7}.d{stroke-linecap:round}
.r{fill:none;stroke-width:2;stroke-opacity:.45}.b{fill-opacity:.35}.f{stroke:#d00;stroke-width:2;fill:none}
.e{fill:#fff;stroke:#222}
@media(prefers-color-scheme:dark){svg{background:#16181c;color:#e4e4e4}.f{stroke:#f66}.e{fill:#16181c;stroke:#e4e4e4}
.b{fill-opacity:.5}}
"""
PARTS = 8  # components of a name that its label may use; a name in an untrusted file may have a hundred thousand
LEAST = 1e-300  # an axis treats smaller values as 0, because a smaller power of ten would be 0
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
TITLE = "error and size over depth"
FELL, STARVED = '<circle class="f" cx="{}" cy="{}" r="7"/>', '<circle class="e" cx="{}" cy="{}" r="3"/>'


def picture(provenance: Mapping[str, Any]) -> str:
    """The SVG of an artifact's sites, from compress.json; an empty string if none of them is in a block."""
    sites: Mapping[str, Row] = provenance["sites"]
    blocks = by_block(sites)
    if not blocks:
        return ""
    kinds = dict.fromkeys(kind for rows in blocks.values() for kind in rows)
    colours = {kind: f"#{PALETTE[i % len(PALETTE)]}" for i, kind in enumerate(kinds)}
    shown, lines = legend(colours, sites.values())
    y, panels = LEGEND + LINE * lines + 30, []
    for key, title in (("output_error", "output error, relative"), ("weight_error", "weight error, relative")):
        if any(drawable(row[key]) for row in sites.values()):
            panels += errors_panel(blocks, key, title, colours, y)
            y += HIGH + GAP
    if all(drawable(row.get("dense_bytes")) and drawable(row["bytes"]) for row in sites.values()):
        panels += sizes_panel(blocks, colours, y)
        y += HIGH + GAP
    name, size = provenance["source"]["name"], f'width="{WIDE}" height="{y - 16}" viewBox="0 0 {WIDE} {y - 16}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>', f"<title>{words(name, 200)}: {TITLE}</title>",
        f"<desc>{words(summary(sites), 400)}</desc>", f"<style>{STYLE}</style>",
        f'<text class="h" x="24" y="38">{words(name, 48)}: {TITLE}</text>',
        f'<text class="s" x="24" y="62">{words(facts(provenance), 120)}</text>',
    ]  # fmt: skip
    return "\n".join([*head, *shown, *panels, "</svg>\n"])


def facts(provenance: Mapping[str, Any]) -> str:
    """The line below the title."""
    sizes, weights = provenance["sizes"], sorted({row["weight"] for row in provenance["sites"].values()})
    made = ", ".join([*(weight[:24] for weight in weights[:3]), *([f"{len(weights) - 3} more"] if weights[3:] else [])])
    errors = "errors relative to the difference; " if provenance.get("base") else ""
    return f"{sizes['bits_per_weight']:.2f} bits a block weight; {made}; {errors}{provenance['calibration']['name']}"


def by_block(sites: Mapping[str, Row]) -> Blocks:
    """The rows of each block, by the kind of site; sites outside all blocks are left out."""
    found: dict[int, dict[str, list[Row]]] = {}
    for site, row in sites.items():
        place = re.search(r"(?:^|\.)(\d{1,6})\.(.+)", site)
        if place is not None:
            kind = ".".join(part for part in place[2].split(".") if not part.isdigit())
            found.setdefault(int(place[1]), {}).setdefault(kind, []).append(row)
    return dict(sorted(found.items()))


def labels(kinds: Iterable[str]) -> dict[str, str]:
    """The label of each kind in the legend: the shortest end of its name that is unique, or the whole name."""
    parts = {kind: kind.rsplit(".", PARTS)[-PARTS:] for kind in kinds}
    ends = {kind: [".".join(last[-n:]) for n in range(1, len(last) + 1)] for kind, last in parts.items()}
    count = Counter(end for each in ends.values() for end in each)
    found = {kind: next((end for end in each if count[end] == 1), kind) for kind, each in ends.items()}
    return {kind: end if "." in end else end.removesuffix("_proj") for kind, end in found.items()}


def drawable(value: float | None) -> bool:
    """Whether a number is one that a run can have written; the file may come from an untrusted place."""
    return value is not None and 0 <= value < 2**63


def words(said: str, most: int) -> str:
    """An untrusted name escaped for XML and cut to `most` characters."""
    return escape(visible(said if len(said) <= most else f"{said[: most - 1]}…"))


def summary(sites: Mapping[str, Row]) -> str:
    """The picture in words, for screen readers."""
    said = [f"{len(sites)} sites"]
    for key, called in (("output_error", "output error"), ("weight_error", "weight error")):
        errors = {site: row[key] for site, row in sites.items() if drawable(row[key])}
        if errors:
            worst = max(errors, key=lambda site: errors[site])
            middle = median(errors.values())
            said.append(f"relative {called}: median {middle:.3f}, largest {errors[worst]:.3f} at {worst}")
    said.append(f"{sum(len(row['fallbacks']) for row in sites.values())} fallbacks")
    said.append(f"{sum(bool(row.get('starved')) for row in sites.values())} starved")
    return "; ".join(said)


def legend(colours: Mapping[str, str], rows: Iterable[Row]) -> tuple[list[str], int]:
    """The legend of the kinds and marks that occur, and how many lines it takes."""
    rows = list(rows)
    dot = '<path class="d" stroke-width="7" stroke="{}" d="M{{}} {{}}h0"/>'
    entries = [(label, dot.format(colours[kind])) for kind, label in labels(colours).items()]
    entries += [("fallback", FELL)] if any(row["fallbacks"] for row in rows) else []
    entries += [("starved of tokens", STARVED)] if any(row.get("starved") for row in rows) else []
    shown, x, lines = [], 30, 1
    for said, mark in entries:
        wide = 38 + round(7.5 * min(40, len(said)))
        if x + wide > WIDE - RIGHT:
            x, lines = 30, lines + 1
        y = LEGEND + LINE * (lines - 1)
        shown += [mark.format(x, y - 4), f'<text x="{x + 12}" y="{y}">{words(said, 40)}</text>']
        x += wide
    return shown, lines


def errors_panel(blocks: Blocks, key: str, title: str, colours: Mapping[str, str], y: int) -> list[str]:
    """One line over the blocks for each kind of site, with the range where a block has several sites of a kind."""
    known = {
        (i, kind): [row for row in rows if drawable(row[key])]
        for i, block in enumerate(blocks.values()) for kind, rows in block.items()
    }  # fmt: skip
    axes, top = frame(blocks, title, max((row[key] for rows in known.values() for row in rows), default=0), 1, y)
    apart, dot = min(6.0, step(blocks) / (len(colours) + 1)), min(7.0, max(3.0, step(blocks) / 2))
    drawn, marks = [], []
    for j, (kind, colour) in enumerate(colours.items()):
        line, ranges = [], []
        for i in range(len(blocks)):
            rows = known.get((i, kind))
            if not rows:
                continue
            x = f"{LEFT + (i + 0.5) * step(blocks) + (j - (len(colours) - 1) / 2) * apart:.1f}"
            low, middle, high = (f"{y + HIGH * (1 - value / top):.1f}" for value in spread([row[key] for row in rows]))
            line.append(f"{x} {middle}")
            ranges += [f"M{x} {low}V{high}"] if low != high else []
            marks += [FELL.format(x, middle)] if any(row["fallbacks"] for row in rows) else []
            marks += [STARVED.format(x, middle)] if any(row.get("starved") for row in rows) else []
        drawn += [f'<path class="r" stroke="{colour}" d="{"".join(ranges)}"/>'] if ranges else []
        drawn += [f'<path class="l" stroke="{colour}" d="M{"L".join(line)}"/>'] if len(line) > 1 else []
        points = f"M{'h0M'.join(line)}h0"
        drawn += [f'<path class="d" stroke-width="{dot:.1f}" stroke="{colour}" d="{points}"/>'] if line else []
    return [*axes, *drawn, *marks]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The minimum, the median and the maximum."""
    return min(values), median(values), max(values)


def sizes_panel(blocks: Blocks, colours: Mapping[str, str], y: int) -> list[str]:
    """Two bars for each block, dense and stored, stacked by kind of site."""
    totals = [sum(row[key] for rows in block.values() for row in rows)
              for block in blocks.values() for key in ("dense_bytes", "bytes")]  # fmt: skip
    unit, name = next(pair for pair in UNITS if max(totals) >= pair[0] or pair[0] == 1)
    title = f"size of each block's sites, {name}: before (pale, left) and after"
    axes, top = frame(blocks, title, max(totals), unit, y)
    wide = 0.38 * step(blocks)
    bars: dict[tuple[str, str], list[str]] = {}
    for i, block in enumerate(blocks.values()):
        for key, x in (("dense_bytes", -wide), ("bytes", 0.0)):
            below = 0.0
            for kind in (kind for kind in colours if kind in block):
                tall = HIGH * sum(row[key] for row in block[kind]) / top
                left, base = LEFT + (i + 0.5) * step(blocks) + x, y + HIGH - below
                bars.setdefault((kind, key), []).append(f"M{left:.1f} {base:.1f}v-{tall:.1f}h{wide:.1f}v{tall:.1f}z")
                below += tall
    shade = {"dense_bytes": ' class="b"', "bytes": ""}
    return axes + [
        f'<path{shade[key]} fill="{colours[kind]}" d="{"".join(paths)}"/>' for (kind, key), paths in bars.items()
    ]


def step(blocks: Blocks) -> float:
    """Pixels from one block to the next."""
    return (WIDE - LEFT - RIGHT) / len(blocks)


def frame(blocks: Blocks, title: str, most: float, unit: float, y: int) -> tuple[list[str], float]:
    """The axes of a panel whose largest value is `most`, labelled in `unit`, and the value at its upper edge."""
    gap = nice(most / unit / 4)
    lines = max(1, math.ceil(most / unit / gap - 1e-9))
    shown = [f'<text class="t" x="24" y="{y - 16}">{title}</text>']
    for k in range(lines + 1):
        at = f"{y + HIGH * (1 - k / lines):.1f}"
        shown.append(f'<path class="g" d="M{LEFT} {at}H{WIDE - RIGHT}"/>')
        shown.append(f'<text class="n s" x="{LEFT - 10}" y="{float(at) + 4:.1f}">{k * gap:.6g}</text>')
    every = max(1, round(nice(len(blocks) / 20)))
    for i, block in enumerate(blocks):
        if i % every == 0:
            x = f"{LEFT + (i + 0.5) * step(blocks):.1f}"
            shown.append(f'<text class="m s" x="{x}" y="{y + HIGH + 18}">{block}</text>')
    shown.append(f'<text class="n s" x="{LEFT - 10}" y="{y + HIGH + 18}">block</text>')
    return shown, lines * gap * unit


def nice(value: float) -> float:
    """The value rounded up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value >= LEAST else 1.0
    return next((power * digit for digit in (1, 2, 5) if power * digit >= value * (1 - 1e-9)), power * 10)
