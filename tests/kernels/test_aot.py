"""Every kernel, compiled ahead of time for GPUs that are not present, fits, does not spill, and has no longer a loop.

`instructions/FAMILY.json` holds the resources of each case and the instructions per weight that it may issue; a kernel
that issues more is slower on a GPU even before it has been timed. It also holds the hash of the sources it was compiled
from. If they have not changed, compiling gives the same result, so only the first case of each family is compiled as a
check. To update it after a change: `python tests/kernels/test_aot.py FAMILY`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

BOUNDS = Path(__file__).parent / "instructions"
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes of shared memory that a program may have; CUDA guide, table 21
SLACK = 1.01
GPU = Path(__file__).parents[2] / "kernels" / "compress_kernels" / "gpu"
FAMILIES = sorted(path.stem for path in GPU.glob("*.py") if "\nCASES = " in path.read_text(encoding="utf-8"))
TOLD = ("shared", "stack", "per_weight")  # of a line, what is recorded


def compiled(*arguments: str) -> dict[str, dict[str, Any]]:
    """What each case needs on each architecture, made in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "compress_kernels.gpu.aot", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {f"{line['case']} sm_{line['sm']}": {told: line[told] for told in TOLD if told in line} for line in lines}


def made_from() -> dict[str, str]:
    """What machine code depends on: the sources of the kernels, and the compiler."""
    sources = sha256(b"\0".join(path.read_bytes() for path in sorted(GPU.glob("*.py")))).hexdigest()
    return {"triton": version("triton"), "sources": sources}


def recorded(family: str) -> dict[str, Any]:
    """What is known of a family: what it was made from, and its cases."""
    known: dict[str, Any] = json.loads((BOUNDS / f"{family}.json").read_text(encoding="utf-8"))
    return known


@pytest.mark.slow
def test_kernels_compile_within_their_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # else a stale binary would pass
    now, known = made_from(), {family: recorded(family) for family in FAMILIES}
    same = [family for family in FAMILIES if known[family].items() >= now.items()]
    changed = [family for family in FAMILIES if family not in same]

    again = compiled("--first", *same) if same else {}
    found = compiled(*changed) if changed else {}

    bounds = {name: needs for each in known.values() for name, needs in each["cases"].items()}
    assert again == {name: bounds[name] for name in again}  # compiling does not depend on chance
    assert len(again) == 2 * len(same)  # for sm_80 and sm_90
    assert set(found) == {name for family in changed for name in known[family]["cases"]}
    for name, needs in (bounds | found).items():
        assert needs["shared"] <= SHARED[int(name[-2:])], name
        assert needs["stack"] == 0, f"{name} spills"
    for family in [family for family in changed if known[family]["triton"] == now["triton"]]:
        for name, bound in known[family]["cases"].items():
            assert found[name].get("per_weight", 0) <= bound.get("per_weight", 0) * SLACK, name


def test_the_readme_says_what_is_bounded() -> None:
    bounds: dict[str, float] = {}
    for family in FAMILIES:
        cases = recorded(family)["cases"]
        bounds |= {name: needs["per_weight"] for name, needs in cases.items() if "per_weight" in needs}
    text = (GPU.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    counted = [row for row in rows if len(row) == 7 and row[0] != "case"]

    said = {f"{row[0]} sm_{sm}": row[at] for row in counted for sm, at in ((80, 5), (90, 6)) if row[at] != "-"}

    assert said == {name: str(figure) for name, figure in bounds.items()}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        text = json.dumps({**made_from(), "cases": compiled(name)}, indent=1)
        (BOUNDS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
