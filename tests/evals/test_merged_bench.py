"""The bench of merged adapters: its table, and the ranks that it reports."""

from __future__ import annotations

from compress_evals.merged import Measured, found_in, table


def test_the_table_has_a_line_for_each_model() -> None:
    common = {"ability": "arithmetic", "dtype": "bfloat16", "own_kl": 1e-5, "text_kl": 2e-5, "right": 0.975}
    rows = [Measured(model="merged checkpoint", bytes=1000, **common), Measured(model="lora", bytes=10, **common)]  # type: ignore[arg-type]
    assert table(rows).splitlines()[-1] == "| arithmetic | bfloat16 | lora | 10 | 1.00e-05 | 2.00e-05 | 97.5 |  |"


def test_ranks_are_counted() -> None:
    rows = {
        "a": {"rank": 8, "reproduced": 1.0},
        "b": {"rank": 8, "reproduced": 0.5},
        "c": {"rank": 7, "reproduced": 0.9},
    }
    assert found_in(rows) == "ranks 1 x 7, 2 x 8; 80.0% of entries reproduced"
