"""`python -m compress_kernels.gpu.aot [--markdown] [--first] [FAMILY ...]`: compiles kernels without a GPU, and counts.

Prints, for each case and architecture, one JSON line or one table row: registers, spilled bytes (stack), shared memory,
and the instructions issued per weight in the innermost loop, read off the machine code. The program's threads share a
tile of BN x BK weights, so this is `loop length * threads / weights of an iteration`. It decides whether a low-bit
product is bound by memory or by instruction issue, and can be determined without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}  # most bytes per program; the compiler does not check
HERE = Path(__file__).parent
FAMILIES = tuple(sorted(path.stem for path in HERE.glob("*.py") if "\nCASES = " in path.read_text(encoding="utf-8")))
SUMS = {"p_work": "*fp32", "p_count": "*i32"}  # the types of a launch's workspaces
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][A-Z0-9_.]+)(.*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration to compile: a kernel, the types of its arguments (`*fp16`, `i32`) and its constants.

    `weights` is the number of weights that one iteration of the innermost loop processes.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    weights: int = 0
    warps: int = 4
    stages: int = 4
    architectures: tuple[int, ...] = field(default=ARCHITECTURES)


def compiled(case: Case, architecture: int) -> Any:
    """The kernel compiled for an architecture; pointers and integers are assumed divisible by 16, as in launches."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    whole = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or signature[n] == "i32"
    }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=whole)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def measured(case: Case, architecture: int) -> dict[str, Any]:
    """The resources and instructions of a compiled case; raises RuntimeError if the tools report no registers."""
    built = compiled(case, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{case.name}: cuobjdump names no registers")
    loop = innermost(code)
    mix = Counter(name.partition(".")[0] for name in loop)
    figures = {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": int(built.metadata.shared),
        "loop": len(loop),
        "mix": dict(mix.most_common()),
    }
    if case.weights:
        figures["per_weight"] = round(len(loop) * 32 * case.warps / case.weights, 3)
    return {"case": case.name, "sm": architecture, "triton": triton.__version__, **figures}


def tool(name: str, *arguments: str) -> str:
    """The output of a tool of the CUDA toolchain that ships with triton."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def innermost(code: str) -> list[str]:
    """The instructions of the longest loop that contains no other, from disassembled code; empty without a loop."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := INSTRUCTION.search(line):
            lines.append((instruction[1], instruction[2]))
    loops = []
    for end, (name, rest) in enumerate(lines):
        target = re.search(r"(\.L_x_\d+)", rest) if name.startswith("BRA") else None
        if target and labels.get(target[1], end) < end:
            loops.append((labels[target[1]], end))
    inner = [a for a in loops if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        return []
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return [name for name, _ in lines[begin : end + 1]]


def cases(families: tuple[str, ...], most: int | None = None) -> Iterator[Case]:
    """The cases of these families; if `most` is given, at most this many of each."""
    for family in families:
        yield from importlib.import_module(f"compress_kernels.gpu.{family}").CASES[:most]


def table(lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A Markdown table: each case with its figures on every architecture, `-` where there is none."""
    columns = [(name, sm) for name in ("registers", "shared", "per_weight") for sm in ARCHITECTURES]
    said = {"registers": "registers", "shared": "shared bytes", "per_weight": "instructions a weight"}
    yield "| case | " + " | ".join(f"{said[name]}, sm_{sm}" for name, sm in columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["case"], {})[line["sm"]] = line
    for case, by_sm in found.items():
        yield f"| {case} | " + " | ".join(str(by_sm.get(sm, {}).get(name, "-")) for name, sm in columns) + " |"


def main() -> None:
    """Print the lines, or the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all if none is named")
    parser.add_argument("--markdown", action="store_true", help="print a table")
    parser.add_argument("--first", action="store_true", help="only the first case of each family")
    given = parser.parse_args()
    families = tuple(given.families) or FAMILIES
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"no family {min(unknown)!r}; there are {', '.join(FAMILIES)}")
    chosen = cases(families, 1 if given.first else None)
    lines = (measured(case, architecture) for case in chosen for architecture in case.architectures)
    for text in table(lines) if given.markdown else map(json.dumps, lines):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
