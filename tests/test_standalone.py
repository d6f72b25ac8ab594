"""In a fresh interpreter: a light import without side effects, and artifacts that load with or without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress.export.dense import export_dense

HEAVY = ("transformers", "triton", "bitsandbytes", "optimum", "lm_eval", "datasets", "accelerate", "typer")


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a new interpreter with warnings as errors outside of other people's modules."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# -- import ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """Modules and root handlers after `import compress`."""
    done = python(
        "import json, logging, sys; import compress; from compress import *;"
        "print(json.dumps({'modules': sorted(sys.modules),"
        "'handlers': len(logging.getLogger().handlers)}))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("module", HEAVY)
def test_importing_does_not_import(imported: dict[str, Any], module: str) -> None:
    assert module not in imported["modules"]


def test_the_command_line_answers_before_torch_is_loaded() -> None:
    done = python("import sys; import compress.cli; print({'torch', 'scipy', 'numpy'} & {*sys.modules})")
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_every_name_is_there_when_asked_for_and_nothing_else_is() -> None:
    assert {*compress.__all__} <= {*dir(compress)}
    missing = [name for name in compress.__all__ if not hasattr(compress, name)]
    assert not missing
    assert compress.GPTQ is compress.passes.GPTQ
    with pytest.raises(AttributeError, match="'compress' has no attribute 'GPTQQ'"):
        _ = compress.GPTQQ


def test_importing_configures_no_logging(imported: dict[str, Any]) -> None:
    assert imported["handlers"] == 0


@pytest.mark.slow
def test_transformers_knows_the_method_if_it_came_first() -> None:
    """The other order is that of `test_importing_compress_is_enough_to_load`."""
    done = python(
        "import transformers, compress; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known;"
        "assert 'compress' in known"
    )
    assert done.returncode == 0, done.stderr


# -- loading in another process --------------------------------------------------------------------

LOAD = """
import sys, torch
{first}
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True, dtype="auto").eval()
with torch.inference_mode():
    logits = model(input_ids=load_file(sys.argv[2])["ids"], use_cache=False).logits
save_file({{"logits": logits.contiguous()}}, sys.argv[3])
assert ("compress" in sys.modules) == bool({first!r})
"""


@pytest.fixture
def expected(llama_artifact: Path, ids: Tensor, tmp_path: Path) -> Tensor:
    """The logits in this process; the windows are left in `ids.safetensors`."""
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    with torch.inference_mode():
        return torch.as_tensor(compress.load(llama_artifact)(input_ids=ids, use_cache=False).logits)


@pytest.mark.slow
def test_importing_compress_is_enough_to_load(
    llama_artifact: Path, expected: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    code = LOAD.format(first="import compress")
    done = python(code, llama_artifact, tmp_path / "ids.safetensors", tmp_path / "logits.safetensors")
    assert done.returncode == 0, done.stderr
    assert_close("logits", load_file(tmp_path / "logits.safetensors")["logits"], expected, 1e-6)


@pytest.mark.slow
def test_the_dense_export_loads_without_us(
    llama_artifact: Path, expected: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    export_dense(llama_artifact, tmp_path / "dense")
    done = python(
        LOAD.format(first=""), tmp_path / "dense", tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"
    )
    assert done.returncode == 0, done.stderr
    assert_close("logits", load_file(tmp_path / "logits.safetensors")["logits"], expected, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("expected")
def test_the_artifact_does_not_load_silently_without_us(llama_artifact: Path, tmp_path: Path) -> None:
    done = python(LOAD.format(first=""), llama_artifact, tmp_path / "ids.safetensors", tmp_path / "logits.safetensors")
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatched" in done.stderr
    assert not (tmp_path / "logits.safetensors").exists()
