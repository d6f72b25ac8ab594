"""Any bytes are read or refused: a quick part of `make fuzz`, and regression tests for what it has found so far."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SPEC = importlib.util.spec_from_file_location("compress_fuzz_targets", Path(__file__).with_name("targets.py"))
assert SPEC is not None and SPEC.loader is not None
targets = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = targets
SPEC.loader.exec_module(targets)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_what_is_edited_is_valid_at_first(name: str) -> None:
    assert targets.held(targets.TARGETS[name], b"")


@pytest.mark.slow
@pytest.mark.parametrize("name", targets.TARGETS)
def test_any_bytes_are_read_or_refused(name: str, tally: Any) -> None:
    @settings(max_examples=60)
    @given(data=st.binary(max_size=60))
    def once(data: bytes) -> None:
        with tally("fuzz", f"executions of {name}"):
            targets.held(targets.TARGETS[name], data)

    once()
