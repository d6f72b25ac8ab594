"""Properties of every export: nothing is put in place unless it reads back correctly, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import RTN, RecipeError, VerificationError
from compress.artifact import Artifact
from compress.cli import main
from compress.export import FORMATS, export
from compress.export.compressed_tensors import CompressedTensors
from compress.export.gptq import GPTQLayout
from compress.export.words import from_words, to_nibbles, to_words
from compress.model.source import Checkpoint
from compress.passes import Int8

INT4 = [RTN(bits=4, group=32, symmetric=True)]


@pytest.mark.parametrize("kind", [CompressedTensors, GPTQLayout])
def test_what_does_not_read_back_is_not_put_in_place(
    kind: Any, artifact_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    pack = kind.pack

    def one_bit_off(self: Any, site: Any, scheme: Any) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = pack(self, site, scheme)
        name = next(iter(tensors))
        tensors[name] = tensors[name].clone()
        tensors[name][0, 0] ^= 1
        return tensors

    artifact = artifact_of(INT4)
    monkeypatch.setattr(kind, "pack", one_bit_off)
    with pytest.raises(VerificationError, match="differs from the artifact's"):
        export(artifact, kind.name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["compressed-tensors", "gguf", "gptq"])
def test_two_exports_write_the_same_bytes(to: str, artifact_of: Any, tmp_path: Path) -> None:
    first, second = (export(artifact_of(INT4), to, tmp_path / name).out for name in "ab")
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["bitsandbytes", "compressed-tensors", "gptq"])
def test_biases_and_tied_embeddings_are_kept(to: str, small: Any, artifact_of: Any, tmp_path: Path) -> None:
    pytest.importorskip(to.replace("-", "_") if to != "gptq" else "torch")
    passes = [Int8()] if to == "bitsandbytes" else INT4
    artifact = artifact_of(passes, small("qwen2", tie_word_embeddings=True))
    out, meant = export(artifact, to, tmp_path / "out").out, Artifact(artifact)
    written = Checkpoint(out)
    kept = [name for name in meant.names() if name not in meant.holders]
    assert "lm_head.weight" not in written.names()
    assert sum(name.endswith(".bias") for name in kept) == 6
    assert all(torch.equal(written.tensor(name), meant.tensor(name)) for name in kept)


@pytest.mark.parametrize("to", FORMATS)
def test_an_existing_folder_is_refused(to: str, artifact_of: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"exists; choose another folder$"):
        export(artifact_of(INT4), to, tmp_path)


def test_the_command_says_what_it_wrote(
    artifact_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["compress", "export", str(artifact_of(INT4)), "--to", "gptq", "--out", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as stop:
        main()
    told = json.loads(capsys.readouterr().out)
    assert stop.value.code in (0, None)
    assert (told["format"], told["rounding"], told["out"]) == ("gptq", 0.0, str(tmp_path / "out"))


def test_a_refusal_is_one_line_and_exit_code_2(
    artifact_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = artifact_of([RTN(bits=3, group=32)])
    monkeypatch.setattr("sys.argv", ["compress", "export", str(artifact), "--to", "gptq", "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err.splitlines()
    assert (stop.value.code, len(said)) == (2, 1)
    assert said[0].startswith("error: model.layers.0.self_attn.q_proj (int3g32): gptq cannot represent it: ")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_the_first_code_lowest(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = to_words(codes, bits)
    assert torch.equal(from_words(words, bits), codes.int())
    assert [(int(words[1, 0]) >> bits * i) & (2**bits - 1) for i in range(32 // bits)] == codes[
        1, : 32 // bits
    ].tolist()


def test_nibbles_have_two_orders() -> None:
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert to_nibbles(codes, first_low=True).tolist() == [[0x21, 0x43]]
    assert to_nibbles(codes, first_low=False).tolist() == [[0x12, 0x34]]
