"""Untrusted LoRA adapters: what their configuration and their tensors claim is checked before it is used."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.adapters import import_adapter
from compress.adapters.attach import attach
from compress.tenants import reader

Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
WHAT = "hostile adapters"
Refuse = Callable[..., str]


def written(folder: Path, config: Any = CONFIG, tensors: dict[str, Tensor] | None = None) -> Path:
    """An adapter of the tiny Llama's first query matrix, or of what is given instead."""
    folder.mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    factors = {f"{Q}.lora_A.weight": torch.ones(2, 48), f"{Q}.lora_B.weight": torch.ones(48, 2)}
    save_file(factors if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def refused(tiny_llama: Path, llama_artifact: Path, tmp_path: Path, refuse: Refuse) -> Callable[[Path], str]:
    """The message of importing an adapter; attaching it is refused too."""

    def check(adapter: Path) -> str:
        refuse(lambda: attach(llama_artifact, adapter, tmp_path / "out"), "bad input", WHAT)
        refuse(lambda: reader(llama_artifact)(adapter), "bad input", WHAT)
        return refuse(lambda: import_adapter(adapter, tiny_llama, tmp_path / "out"), "bad input", WHAT)

    return check


def test_the_adapter_these_tests_change_is_taken(tiny_llama: Path, llama_artifact: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter")
    assert import_adapter(adapter, tiny_llama, tmp_path / "delta").matrices == 1
    assert attach(llama_artifact, adapter, tmp_path / "attached").matrices == 1


VALUES = [-1, 0, 1.5, 10**30, "2", None, [], {}, float("nan"), float("inf")]


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_rank_that_cannot_be(value: object, refused: Any, tmp_path: Path) -> None:
    assert "adapter_config.json" in refused(written(tmp_path / "adapter", {**CONFIG, "r": value})) or value == 10**30


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", ["4", None, [], {}, float("nan"), float("inf"), -float("inf"), 10**400, 1e300], ids=str
)
def test_an_alpha_that_cannot_be(value: object, refused: Any, tmp_path: Path) -> None:
    refused(written(tmp_path / "adapter", {**CONFIG, "lora_alpha": value}))


PATTERNS = ["(a+)+$", "(.*)*x", ".*.*.*x", "[a-z]*[a-z]*[a-z]*[a-z]*x", "(", "a" * 300, "(a|a)*$", "(.{1,99}){1,99}"]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_made_to_hang(field: str, pattern: str, refused: Any, tmp_path: Path) -> None:
    refused(written(tmp_path / "adapter", {**CONFIG, field: {pattern: 2}}))


CONFIGS = {
    "no object": "[1, 2]",
    "no JSON": "{",
    "a key twice": '{"peft_type": "LORA", "r": 2, "r": 3, "lora_alpha": 4}',
    "nested deep": '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "x": ' + "[" * 5000 + "]" * 5000 + "}",
    "no type": '{"r": 2, "lora_alpha": 4}',
    "a type of no text": '{"peft_type": ["LORA"], "r": 2, "lora_alpha": 4}',
    "empty": "",
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_none(case: str, refused: Any, tmp_path: Path) -> None:
    assert "adapter_config.json" in refused(written(tmp_path / "adapter", CONFIGS[case]))


@pytest.mark.parametrize("key", ["\x1b[2J", "../../etc/passwd", "base_model.model.\u202eq_proj.lora_A.weight", ""])
def test_a_tensor_of_an_odd_name(key: str, refused: Any, tmp_path: Path) -> None:
    refused(written(tmp_path / "adapter", tensors={key: torch.ones(2, 2)}))


def test_a_header_that_lies(refused: Any, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    body = file.read_bytes()
    size = struct.unpack("<Q", body[:8])[0]
    header = json.loads(body[8 : 8 + size])
    for shape in ([2, 2**40], [2**62, 2**62], [-2, 48], [2]):
        header[f"{Q}.lora_A.weight"]["shape"] = shape
        new = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + body[8 + size :])
        refused(adapter)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "LICENSE"])
def test_a_link_out_of_the_folder(name: str, refused: Any, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter")
    secret = tmp_path / "secret"
    file = adapter / name
    if file.exists():
        file.rename(secret)
    else:
        secret.write_text("secret")
    file.symlink_to(secret)
    assert "links out of the folder" in refused(adapter)


def test_pickled_weights_are_not_read(canary: Path, refused: Any, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    assert "a pickled adapter_model.bin is not read" in refused(adapter)


def test_a_whole_tensor_of_integers(refused: Any, tmp_path: Path) -> None:
    norm = {"base_model.model.model.norm.weight": torch.ones(48, dtype=torch.int64)}
    factors = {f"{Q}.lora_A.weight": torch.ones(2, 48), f"{Q}.lora_B.weight": torch.ones(48, 2)}
    assert "norm.weight in I64, the base in F32" in refused(written(tmp_path / "adapter", tensors=factors | norm))


def test_one_factor_under_two_names(refused: Any, tmp_path: Path) -> None:
    factors = {f"{Q}.lora_A.weight": torch.ones(2, 48), f"{Q}.lora_B.weight": torch.ones(48, 2)}
    again = {f"{Q}.base_layer.lora_A.weight": torch.zeros(2, 48)}
    assert "are the same tensor" in refused(written(tmp_path / "adapter", tensors=factors | again))
