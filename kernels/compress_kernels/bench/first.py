"""`python -m compress_kernels.bench.first`: checks that must hold on a GPU before its speed is worth measuring.

It checks three things. Tensor cores do not flush subnormal float16 inputs to zero, as either operand and in tiles of
several sizes; the fastest decoding relies on this. Inline assembly gives the same bits as plain Triton. A thousand runs
that split the inputs, while another stream keeps the GPU busy, give the same bits and leave their counters at zero.
Prints one JSON line for each question; the exit code is 1 if any answer is no. In Triton's interpreter the same code
runs as a test of itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress_kernels import wq

RUNS = 1000


def subnormals(device: torch.device) -> Iterator[dict[str, Any]]:
    """Check products of subnormal float16 numbers with normal ones, as either operand, against float64."""
    from compress_kernels.gpu.probes import bits_product

    for rows, columns in ((16, 16), (64, 16), (128, 64)):
        small = torch.arange(rows * 32, device=device).remainder(1 << 10).to(torch.int16).view(rows, 32)
        plain = torch.randn(columns, 32, generator=torch.Generator(device).manual_seed(0), device=device).half()
        want = small.view(torch.float16).double() @ plain.double().T
        for name, got in (
            ("first", bits_product(small, plain.view(torch.int16))),
            ("second", bits_product(plain.view(torch.int16), small).T),
        ):
            distance = float((got.double() - want).norm() / want.norm())
            yield {
                "question": f"subnormals as {name} operand, {rows}x{columns}",
                "yes": distance < 1e-5,
                "error": distance,
            }


def weights(bits: int, group: int, shape: tuple[int, int], device: torch.device) -> wq.Packed:
    """A weight of random integer codes."""
    codes, scale = random(2**bits, group, shape, device)
    return wq.pack(codes, scale, bits)


def random(below: int, group: int, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Random codes below `below`, and random scales of groups."""
    generator = torch.Generator(device).manual_seed(below)
    codes = torch.randint(below, shape, generator=generator, device=device, dtype=torch.uint8)
    scale = torch.rand(shape[0], shape[1] // group if group else 1, generator=generator, device=device).half()
    return codes, scale / 64


def every_form(shape: tuple[int, int], device: torch.device) -> Iterator[tuple[str, wq.Packed]]:
    """A random weight of each form, in groups of 128."""
    for bits in wq.INTEGERS:
        yield f"int{bits}", weights(bits, 128, shape, device)
    codes, scale = random(256, 128, shape, device)
    for form, dtype in wq.FLOATS.items():
        data = (codes % 120).view(dtype)  # without NaN and infinities
        yield form, wq.pack_floats(data, scale, (1, 128))
    codes, scale = random(16, 128, shape, device)
    yield "e2m1", wq.pack_book(codes, torch.tensor(wq.E2M1, device=device), scale)
    yield "book", wq.pack_book(codes, torch.linspace(-1, 1, 16, device=device), scale)


def assembly(device: torch.device, shape: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Compare inline assembly with plain Triton, bit for bit, and decoding by subnormal numbers with the usual one."""
    from compress_kernels.gpu.launch import Config

    config = Config(rows=8, outputs=64)
    for form, packed in every_form(shape, device):
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(8, shape[1], generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
            one, two = (product(packed, x, replace(config, assembly=on)) for on in (True, False))
            yield {"question": f"assembly is plain Triton, {form} {dtype}", "yes": torch.equal(one, two)}
            if form in wq.SUBNORMAL:
                other = product(packed, x, replace(config, subnormal=True))
                error = float((one.double() - other.double()).norm() / one.double().norm())
                yield {"question": f"subnormal codes, {form} {dtype}", "yes": error < 5e-3, "error": error}


def product(packed: wq.Packed, x: Tensor, config: Any) -> Tensor:
    """The product by one launch with a given configuration."""
    from compress_kernels.gpu import wq as gpu

    return gpu.linear(x, packed, None, config)


def splits(device: torch.device, shape: tuple[int, int], runs: int) -> Iterator[dict[str, Any]]:
    """Check that programs that split the inputs, under contention, always give the same bits and zero counters."""
    from compress_kernels.gpu.launch import Config, workspace

    packed = weights(4, 128, shape, device)
    x = torch.randn(8, shape[1], generator=torch.Generator(device).manual_seed(2), device=device).half()
    for count in (2, 8):
        config = Config(rows=8, outputs=64, splits=count)
        first = product(packed, x, config)
        whole = product(packed, x, replace(config, splits=1))
        keep_busy(device)
        same = sum(torch.equal(product(packed, x, config), first) for _ in range(runs))
        close = float((first.double() - whole.double()).norm() / whole.double().norm())
        zero = not bool(workspace(config, 8, shape[0], device)[1].any())
        yield {
            "question": f"{count} splits, {runs} runs", "yes": same == runs and zero and close < 1e-3,
            "same": same, "counters_zero": zero, "error": close,
        }  # fmt: skip


def keep_busy(device: torch.device) -> None:
    """Queue products on another stream, so that they compete for the GPU; does nothing on a CPU."""
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream(device)):
            a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
            for _ in range(2000):
                a = torch.nn.functional.normalize(a @ a)


def answers(device: torch.device, shape: tuple[int, int] = (4096, 4096), runs: int = RUNS) -> Iterator[dict[str, Any]]:
    """Every question and its answer."""
    yield from subnormals(device)
    yield from assembly(device, shape)
    yield from splits(device, shape, runs)


def main() -> None:
    """Print the answers, and exit with code 1 if one is no."""
    if not torch.cuda.is_available():
        sys.exit("compress_kernels.bench.first: there is no GPU here; it answers what only a GPU can")
    found = []
    for answer in answers(torch.device("cuda")):
        found.append(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    sys.exit(0 if all(answer["yes"] for answer in found) else 1)


if __name__ == "__main__":
    main()
