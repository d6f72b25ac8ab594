"""Measures a device for `compress tune`, with one function for each kind of device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress_kernels.bench import search
from compress_kernels.bench.crossover import measure, profile
from compress_kernels.tuning import Profile, TuningError


def tune(kind: str, say: Callable[[str], object] = lambda line: None) -> Profile:
    """Measure a device such as `cpu` and return its profile; `say` is called with what is measured, for progress.

    Raises TuningError for a device that cannot be measured.
    """
    device = measurable(kind)
    return MEASURES[device.type](device, say)


def measurable(kind: str) -> torch.device:
    """The device of this name; raises TuningError if nothing can be measured on it."""
    try:
        device = torch.device(kind)
    except RuntimeError as error:
        raise TuningError(f"--device {kind}: not a device; give one of {', '.join(MEASURES)}") from error
    if device.type not in MEASURES:
        raise TuningError(f"--device {kind}: nothing is measured there; give one of {', '.join(MEASURES)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TuningError(f"--device {device}: there is no GPU here, or this torch is built without CUDA")
    return device


def tune_cpu(device: torch.device, say: Callable[[str], object]) -> Profile:
    """Time packed products of every size against plain ones, a fraction of a second each."""
    del device
    done = []
    for found in measure():
        say(f"{found.out} x {found.inputs}, {found.rows} rows")
        done.append(found)
    return profile(done)


def tune_gpu(device: torch.device, say: Callable[[str], object]) -> Profile:
    """Time the configurations of every kernel, and decoding the weight first instead."""
    return search.profile(device, say)


MEASURES: dict[str, Callable[[torch.device, Callable[[str], object]], Profile]] = {"cpu": tune_cpu, "cuda": tune_gpu}
