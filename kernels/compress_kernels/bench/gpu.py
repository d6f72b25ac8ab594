"""`python -m compress_kernels.bench.gpu`: times every format and its peers over shapes and rows of x, as JSON lines.

Weights rotate through enough copies to exceed the last-level cache; on a GPU the rotation is one CUDA graph, so that
launches are not timed. The first line holds the conditions and the measured memory bandwidth; each further line says
how far the result was from float64 and what share of that bandwidth it reached. On a CPU the same code runs with the
reference implementation of the ops, which tests this command and measures nothing useful.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_kernels.bench.subjects import Made, Subject, ours, peers

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))  # [out, in] of models of 8 and 70 billion
ROWS = (1, 8, 16, 64, 256)
ROTATED = 1 << 28  # bytes of weights to rotate through: four times the last-level cache of an H200
REPLAYS = 30


def conditions(device: torch.device) -> dict[str, Any]:
    """The conditions that the figures depend on: device, versions, date, clocks."""
    found: dict[str, Any] = {"device": device.type, "torch": torch.__version__, "date": date.today().isoformat()}
    if device.type == "cuda":
        import triton

        found |= {
            "device": torch.cuda.get_device_name(device),
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        }
        found["clocks"] = clocks()
    return found


def clocks() -> str | None:
    """Current and maximum clocks, as nvidia-smi reports them; None if it is not installed or prints nothing."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.draw,driver_version"
    done = subprocess.run([tool, query, "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.strip() or None


def spans(calls: Sequence[Callable[[], object]], device: torch.device, replays: int) -> list[float]:
    """The mean seconds per call of each of `replays` runs over all calls; on a GPU they are one CUDA graph."""
    for call in calls:
        call()
    if device.type != "cuda":
        return [elapsed(calls) / len(calls) for _ in range(replays)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    taken = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return taken


def elapsed(calls: Sequence[Callable[[], object]]) -> float:
    """Wall-clock seconds for all calls together."""
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """The measured memory bandwidth: bytes per second, read plus written, of an elementwise kernel."""
    source = torch.ones((nbytes if device.type == "cuda" else nbytes >> 4) // 4, device=device)
    target = torch.empty_like(source)
    # measured with a kernel, because a memory copy as a node of a CUDA graph is slower
    return 2 * source.nbytes / statistics.median(spans([lambda: torch.neg(source, out=target)], device, 10))


def weights(shape: tuple[int, int], subject: Subject, device: torch.device, dtype: torch.dtype) -> Iterator[Made]:
    """Copies of one subject that together exceed the last-level cache; on a CPU, one copy."""
    generator = torch.Generator(device).manual_seed(0)
    total = 0
    while total < (ROTATED if device.type == "cuda" else 1):
        made = subject.make(torch.randn(shape, generator=generator, device=device).to(dtype) / shape[1] ** 0.5)
        total += made.nbytes
        yield made


def measure(
    subject: Subject,
    shape: tuple[int, int],
    rows: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    roof: float,
) -> Iterator[dict[str, Any]]:
    """One line for each number of rows."""
    copies = list(weights(shape, subject, device, dtype))
    for m in rows:
        x = torch.randn(m, shape[1], generator=torch.Generator(device).manual_seed(m), device=device).to(dtype)
        taken = spans([partial(made.product, x) for made in copies], device, REPLAYS)
        low, _, high = (statistics.quantiles(taken, n=10)[i] for i in (0, 4, 8))
        median = statistics.median(taken)
        yield {
            "format": subject.name, "out": shape[0], "in": shape[1], "rows": m, "dtype": str(dtype).partition(".")[2],
            "way": copies[0].way(m),
            "seconds": median, "p10": low, "p90": high, "replays": REPLAYS, "copies": len(copies),
            "bytes": copies[0].nbytes, "bytes_per_second": copies[0].nbytes / median,
            "of_roof": copies[0].nbytes / median / roof, "error": error(copies[0], x),
        }  # fmt: skip


def error(made: Made, x: Tensor) -> float:
    """The relative error of a product against float64 with the matrix that the weight decodes to."""
    want = x[:16].double() @ made.matrix.double().T
    return float((made.product(x)[:16].double() - want).norm() / want.norm())


def lines(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    formats: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """The conditions, then a line for every measurement or for the reason why there is none.

    `formats` selects formats by name; all if empty.
    """
    roof = bandwidth(device)
    yield {"conditions": conditions(device), "roof_bytes_per_second": roof}
    for shape in shapes:
        for subject in subjects(device):
            if formats and subject.name not in formats:
                continue
            if subject.missing:
                yield {"format": subject.name, "out": shape[0], "in": shape[1], "missing": subject.missing}
                continue
            try:
                yield from measure(subject, shape, rows, device, dtype, roof)
            except (RuntimeError, ValueError, AttributeError, TypeError) as problem:  # a peer's failure is a result too
                yield {"format": subject.name, "out": shape[0], "in": shape[1], "failed": str(problem)[:300]}


def subjects(device: torch.device) -> list[Subject]:
    """The formats of other libraries, then those of this package."""
    return [*peers(device), *(Subject(name=each.name, make=each.make) for each in ours())]


def shape_of(text: str) -> tuple[int, int]:
    """`4096x14336` as (out, in)."""
    out, _, inputs = text.partition("x")
    return int(out), int(inputs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the lines to the terminal, or to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a file for the lines; default: the terminal")
    parser.add_argument("--device", default="cuda", help="cpu only tests this command")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--formats", nargs="+", default=[], help="only these, by name; default: all")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here, or this torch is built without CUDA; --device cpu only tests this command")
    known = [subject.name for subject in subjects(device)]
    if unknown := [name for name in given.formats if name not in known]:
        parser.error(f"--formats: no {unknown[0]!r}; there are {', '.join(known)}")
    dtype = getattr(torch, given.dtype)
    text = (json.dumps(line) + "\n" for line in lines(given.shapes, given.rows, device, dtype, given.formats))
    if given.out is None:
        sys.stdout.writelines(text)
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", encoding="utf-8") as file:
        for line in text:
            file.write(line)
            file.flush()


if __name__ == "__main__":
    main()
