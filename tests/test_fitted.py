"""Tables on a terminal: at any width, every name and number can be read in full."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.commands.fitted import Fitted
from compress.commands.output import result
from compress.console import quality_table

SITES = [f"model.layers.{i}.{name}" for i in (3, 11) for name in ("self_attn.q_proj", "mlp.down_proj")]
VERDICTS = ("inconclusive", "drop, at most 6.1 points")


def printed(table: Table, width: int) -> str:
    """A table as a terminal of so many characters shows it."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(Fitted(table))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


def sites_table() -> Table:
    """Long names, numbers, and a note that has to give way."""
    table = Table("site", title="out/small")
    for header in ("bytes", "weight error"):
        table.add_column(header, justify="right")
    table.add_column("notes")
    for site in SITES:
        table.add_row(site, "25,690,112", "0.1106", r"damping 0.01, fallback of gptq: a row \[is] empty")
    return table


def results_table() -> Table:
    pair = SimpleNamespace(n=200, delta=-0.025, low=-0.061, high=0.012, lost=12, gained=7)
    score = SimpleNamespace(value=0.885)
    rows = [
        SimpleNamespace(
            paired=pair, verdict=verdict, title="Key-value retrieval", dense_metric=score, metric=score, p=0.3
        )
        for verdict in VERDICTS
    ]
    return quality_table(rows, "small against builtin")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_no_width_cuts_a_name_or_a_number(width: int) -> None:
    text = printed(sites_table(), width)
    assert "…" not in text
    assert all(site.removeprefix("model.layers.") in text for site in SITES)
    assert text.count("25,690,112") == text.count("0.1106") == len(SITES)
    assert "model.layers." in text and "[is]" in text


@pytest.mark.parametrize("width", [30, 60, 80, 100])
def test_no_width_cuts_a_verdict(width: int) -> None:
    words = set(re.split(r"[\s┃│;]+", printed(results_table(), width)))
    assert words >= {"inconclusive", "drop,", "at", "most", "6.1", "points", "-2.5", "(-6.1", "+1.2)", "12/7", "0.300"}


def test_what_all_names_share_is_said_once_where_room_is_short() -> None:
    assert printed(sites_table(), 80).count("model.layers.") == 1
    assert printed(sites_table(), 160).count("model.layers.") == len(SITES)


def test_options_that_begin_alike_are_not_names() -> None:
    table = Table("pass", "what it does to the sites it is given")
    for sites in ("attn", "mlp"):
        table.add_row(f"gptq(damping=0.01, sites={sites})", "rounds")
    assert printed(table, 50).count("gptq(damping=0.01,") == 2


def test_a_list_leaves_out_what_is_empty() -> None:
    table = Table("layers", "rows", "computed_by_rule")
    table.add_row(Text("q_proj", style="red"), "1", "packed")
    table.add_row("", "8", "decoded")
    said = "q_proj rows 1; computed_by_rule packed rows 8; computed_by_rule decoded"
    assert printed(table, 20).split() == said.split()


def test_commands_fit_their_tables_to_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result({}, False, sites_table())
    assert SITES[0] in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    result({}, False, sites_table())
    assert "all begin with model.layers." in capsys.readouterr().out
