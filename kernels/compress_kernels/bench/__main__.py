"""`python -m compress_kernels.bench`: times packed products on the CPU against plain ones, in one run.

Prints the median and the range of each speed-up; `compress tune` makes the same measurements and saves the choices.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch

from compress_kernels import cpu
from compress_kernels.bench.crossover import Timed, measure
from compress_kernels.tuning import device_name

FORMS = (cpu.INT4, cpu.INT8, cpu.CSR, cpu.INT8_INT8)


def row(found: Timed) -> str:
    """One line of the table: the speed-up of each packed product over the plain one."""
    cells = []
    for form in FORMS:
        ratios = found.ratios(form) if form in found.packed else []
        cells.append(f"{statistics.median(ratios):5.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "none")
    base = statistics.median(found.plain[cpu.INT4]) * 1e3
    return f"{found.out}x{found.inputs} | {found.rows} | {base:.3f} ms | {' | '.join(cells)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.4, help="for each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write = sys.stdout.write
    write(
        f"{device_name('cpu')}, torch {torch.__version__}, {arguments.threads} threads, {arguments.seconds} s a line\n"
    )
    write(f"csr keeps {cpu.SPARSE:.0%}; speed-up over bf16, of {cpu.INT8_INT8} over rounded bf16: median (min-max)\n")
    write(f"weight | rows | bf16 | {' | '.join(FORMS)}\n")
    for found in measure(seconds=arguments.seconds):
        write(row(found) + "\n")


if __name__ == "__main__":
    main()
