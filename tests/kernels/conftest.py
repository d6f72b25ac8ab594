"""Fixtures of the kernel tests, which run on a GPU if there is one, else in Triton's interpreter.

The interpreter is chosen when triton is imported (`tests/conftest.py`), so this process cannot also compile for a GPU;
the tests of compiled code (`test_aot.py`) use a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic, as set below


def load_here(name: str) -> ModuleType:
    """The helper module `tests/kernels/<name>.py`; tests is not a package, so it is loaded by path."""
    qualified = f"compress_tests_kernels_{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, Path(__file__).parent / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[qualified] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[qualified])
    return sys.modules[qualified]


if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    load_here("interpreter").install()


@pytest.fixture(scope="session")
def load_helper() -> Callable[[str], ModuleType]:
    """`load_helper(name)`: the module `tests/kernels/<name>.py`."""
    return load_here


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which kernels run: a GPU, or the CPU for the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialized tensors with NaN or the largest integer, so that elements which a kernel skips are noticed."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
