"""Every kernel compiled for GPUs that are not here: it fits, it does not spill, and its loop does not grow.

`instructions/FAMILY.json` holds, for one version of triton, the instructions for each weight that a case may issue; a
kernel that issues more is slower on a GPU before anybody has timed it. To renew it after an improvement:
`python tests/kernels/test_aot.py FAMILY`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BOUNDS = Path(__file__).parent / "instructions"
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes of shared memory that a program may have; CUDA guide, table 21
SLACK = 1.01
GPU = Path(__file__).parents[2] / "kernels" / "compress_kernels" / "gpu"
LARGE = ("wq", "nm")  # each in a process of its own, which costs two seconds
FAMILIES = sorted(path.stem for path in GPU.glob("*.py") if "\nCASES = " in path.read_text(encoding="utf-8"))


def compiled(*families: str) -> list[dict[str, Any]]:
    """One line a case and architecture, made in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "compress_kernels.gpu.aot", *families]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("families", [LARGE[:1], LARGE[1:], tuple(f for f in FAMILIES if f not in LARGE)], ids="-".join)
def test_kernels_compile_within_their_bounds(
    families: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # else a stale binary would pass
    known = [json.loads((BOUNDS / f"{family}.json").read_text(encoding="utf-8")) for family in families]
    bounds = {name: figure for each in known for name, figure in each["per_weight"].items()}

    found = compiled(*families)

    assert {80, 90} <= {line["sm"] for line in found}
    for line in found:
        name = f"{line['case']} sm_{line['sm']}"
        assert line["shared"] <= SHARED[line["sm"]], name
        assert line["stack"] == 0, f"{name} spills"
        if line["triton"] == known[0]["triton"] and "per_weight" in line:
            assert line["per_weight"] <= bounds[name] * SLACK, name


def test_the_readme_says_what_is_bounded() -> None:
    bounds: dict[str, float] = {}
    for family in FAMILIES:
        bounds |= json.loads((BOUNDS / f"{family}.json").read_text(encoding="utf-8"))["per_weight"]
    text = (GPU.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    counted = [row for row in rows if len(row) == 7 and row[0] != "case"]

    said = {f"{row[0]} sm_{sm}": row[at] for row in counted for sm, at in ((80, 5), (90, 6)) if row[at] != "-"}

    assert said == {name: str(figure) for name, figure in bounds.items()}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        lines = compiled(name)
        figures = {f"{x['case']} sm_{x['sm']}": x["per_weight"] for x in lines if "per_weight" in x}
        text = json.dumps({"triton": lines[0]["triton"], "per_weight": figures}, indent=1)
        (BOUNDS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
