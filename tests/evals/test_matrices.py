"""The matrix bench: its errors are those of the quantizers, and its tables name every kind of matrix."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from compress import RTN
from compress_evals import matrices


def test_errors_are_those_of_each_quantizer_alone(site_of: Callable[..., Any], naive: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(16, 64, generator=generator), torch.randn(300, 64, generator=generator)
    x[:, 5] *= 40
    site = site_of(w, x)
    assert torch.equal(matrices.Look().rewrite(site).dense(), w)
    looked = matrices.Looked.of(site.name, json.loads(json.dumps(site.ledger)))
    want = naive.proxy_loss(w, RTN(bits=3, group=32).rewrite(site).dense(), x.T @ x)
    assert looked.errors["rtn", 3, 32] == pytest.approx(want, rel=1e-3)
    assert ("rtn", 3, 128) not in looked.errors
    assert looked.loudest == pytest.approx(40, rel=0.2)


@pytest.mark.slow
def test_the_command_looks_at_every_matrix(
    tiny_llama: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["matrices", "--model", str(tiny_llama), "--samples", "4", "--length", "32"]
    monkeypatch.setattr(sys, "argv", words)
    matrices.main()
    printed = capsys.readouterr().out
    assert "14 matrices" in printed or "28 matrices" in printed
    assert printed.count("| hqq |") == 3
    assert "| down_proj |" in printed
