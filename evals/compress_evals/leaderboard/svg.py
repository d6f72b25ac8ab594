"""Converts matplotlib figures to SVG for a page: text stays text, and colours are the page's CSS variables.

Figures for a page are drawn in placeholder colours, which no palette contains, and these are then replaced by CSS
variables, so that they follow the page's light or dark mode. A picture file is drawn in light colours directly. The
output is reproducible: it has no date and no random ids. Ids are prefixed with the figure's name, so that several
figures can be on one page. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from compress.errors import RecipeError

SERIES = 8
NAMES = ("ink", "soft", "line", "card", "accent", *(f"c{i}" for i in range(1, SERIES + 1)))
STAND_IN = {name: f"#01fe{i:02x}" for i, name in enumerate(NAMES)}
LIGHT = {
    "ink": "#1d2126", "soft": "#5c646e", "line": "#e2dfd8", "card": "#ffffff", "accent": "#2b5f75",
    "c1": "#2b5f75", "c2": "#b3261e", "c3": "#2f7d32", "c4": "#8a4fb0",
    "c5": "#a15c00", "c6": "#0b7a75", "c7": "#b0307a", "c8": "#5f6570",
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖")  # the same markers as text for a legend
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress",
    "text.parse_math": False,  # model names may contain dollar signs
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.5,
    "path.simplify": False,
}


@contextmanager
def drawing() -> Iterator[Any]:
    """Gives the matplotlib module, configured for these figures; raises RecipeError if it is not installed."""
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise RecipeError("leaderboards need matplotlib: pip install 'compress-llm[eval]'") from error
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # readers' fonts render the text
        yield matplotlib


def axes_of(figure: Any, colours: Mapping[str, str], **labels: Any) -> Any:
    """Axes in the style of the page."""
    axes = figure.subplots()
    axes.set(facecolor="none", **labels)
    axes.grid(True, color=colours["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(colours["soft"])
    axes.tick_params(colors=colours["soft"], labelsize=8, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=colours["soft"], fontsize=8.5)
    return axes


def inline(figure: Any, name: str, title: str, about: str, links: Mapping[str, str]) -> str:
    """The figure as an inline SVG element; `links` gives the tooltip of each address that a point links to."""
    text = _written(figure)
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = re.sub(r'<a xlink:href="([^"]*)"[^>]*>', lambda found: _anchor(found[1], links), text)
    for variable, stand_in in STAND_IN.items():
        text = text.replace(stand_in, f"var(--{variable})")
    size = re.search(r'viewBox="[^"]*"', text)
    head = (
        f'<svg class="figure" {size[0] if size else ""} role="img" aria-labelledby="{name}-title {name}-about">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-about">{escape(about)}</desc>'
    )
    return head + text[text.index(">") + 1 :]


def check_picture(path: Path) -> None:
    """Raise RecipeError unless the path ends in .svg or .png."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise RecipeError(f"--picture: {path} must end in .svg or .png")


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure drawn in light colours as SVG or PNG, by the ending of `path`."""
    content: bytes
    if path.suffix.lower() == ".svg":
        content = _written(figure, LIGHT["card"]).encode()
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor=LIGHT["card"], metadata={"Software": None})
        content = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise RecipeError(f"--picture: {path} cannot be written: {error.strerror}") from error


def _written(figure: Any, background: str = "none") -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", facecolor=background, metadata=nothing)
    return buffer.getvalue()


def _anchor(address: str, links: Mapping[str, str]) -> str:
    """The link of a point; it is skipped by keyboard navigation, because the table has the same links."""
    return f'<a href="{address}" tabindex="-1"><title>{escape(links.get(address, address))}</title>'
