"""Memory: one block at a time for any model size, also when saving and verifying; shards of any size."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import GPTQ, Calibration, Recipe
from compress.artifact import Artifact
from compress.shards import Entry, WriteError, split, write_shard
from compress_evals.streaming import block_bytes, make

WIDE: dict[str, int | float] = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MB = 1_000_000


def peak_of(model: Path, out: Path, recipe: str, limit: Callable[[], None] | None = None) -> int:
    """Peak resident bytes of `compress run` in a process of its own, pages mapped from files included."""
    yaml = out.with_suffix(".yaml")
    yaml.write_text(recipe)
    command = [sys.executable, "-m", "compress", "run", str(yaml), "--model", str(model), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limit) as child:
        assert child.stderr is not None
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, said
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["[{wanda: {sparsity: 2:4}}, {rtn: {group: 64}}]"])
def test_the_peak_does_not_grow_with_the_model(passes: str, tmp_path: Path) -> None:
    recipe = f"passes: {passes}\ncalibration: {{data: text, samples: 2, length: 128}}"
    block, few, many = block_bytes(WIDE), 2, 7
    peaks = []
    for blocks in (few, many):
        size = make(tmp_path / f"m{blocks}", blocks * block + 4 * 4096 * 512, shape=WIDE)
        assert size > blocks * block
        peaks.append(peak_of(tmp_path / f"m{blocks}", tmp_path / f"o{blocks}", recipe))
    assert peaks[1] - peaks[0] < (many - few) * block / 2  # half of what is more; the allocator's noise is a third


@pytest.mark.slow
def test_a_folder_larger_than_the_memory_a_process_may_have_completes(tmp_path: Path) -> None:
    cap = 820 * MB  # of data: code is not counted, the 440 MB of the interpreter with torch are

    def limit() -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # stacks of threads are counted too
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))

    short = {"max_position_embeddings": 64}  # of the windows of the probe, which goes through three times
    size = make(tmp_path / "m", 840 * MB, shape={**WIDE, **short, "hidden_size": 1024, "intermediate_size": 2816})
    assert size > cap
    peak_of(tmp_path / "m", tmp_path / "o", "passes: [rtn: {group: 64, sites: '*.down_proj'}]", limit)
    assert len(Artifact(tmp_path / "o").specs) == len(list((tmp_path / "m").glob("*.safetensors"))) - 1


def test_hidden_states_of_calibration_are_shared_where_they_are_equal(tiny_llama: Path, walk_of: Any) -> None:
    walk = walk_of(tiny_llama)
    ids = torch.randint(4, 200, (6, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = walk.enter(ids[:3]), walk.enter(ids[3:])
    cos = [travellers.calls[0][1]["position_embeddings"][0] for travellers in (first, second)]
    assert cos[0] is cos[1]


# -- shards ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_shards_are_no_larger_than_asked(tiny_llama: Path, tmp_path: Path, ids: Tensor) -> None:
    recipe = Recipe(passes=(GPTQ(group=8),), calibration=Calibration(samples=4, length=32))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    compress.run(tiny_llama, recipe, whole)
    compress.run(tiny_llama, recipe, parts, shard_size=20_000)
    tensors = {name: Artifact(parts).stored_tensor(name).nbytes for name in Artifact(parts).files}
    largest = max(tensors.values())
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    held: dict[str, int] = {}
    for name, shard in index["weight_map"].items():
        held[shard] = held.get(shard, 0) + tensors[name]
    assert len(held) > 3
    assert max(held.values()) <= max(20_000, largest)
    assert set(held) == {f"model-{i + 1:05d}-of-{len(held):05d}.safetensors" for i in range(len(held))}
    assert len(compress.artifact.verify(parts)) == 3
    loaded = [compress.load(folder)(input_ids=ids).logits for folder in (whole, parts)]
    assert torch.equal(*loaded)


def test_a_part_holds_what_fits_and_a_large_entry_stays_alone() -> None:
    entries = [Entry.of(str(n), torch.zeros(n, dtype=torch.uint8)) for n in (3, 4, 20, 2, 8, 1)]
    assert [[entry.nbytes for entry in part] for part in split(entries, 10)] == [[3, 4], [20], [2, 8], [1]]


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
          torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]  # fmt: skip


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = {str(dtype): torch.arange(15).reshape(3, 5).to(dtype) for dtype in DTYPES}
    made |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "turned": torch.arange(6.0).view(2, 3).T}
    sha = write_shard(tmp_path / "x.safetensors", [Entry.of(name, tensor) for name, tensor in made.items()])
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == made.keys()
    for name, tensor in made.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].view(torch.uint8) if tensor.ndim else read[name],
                           tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor)  # fmt: skip
    assert sha == compress.artifact.digest(tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_every_value_starts_where_its_type_may(tmp_path: Path) -> None:
    made = [Entry.of("b", torch.ones(3, dtype=torch.uint8)), Entry.of("a", torch.ones(2, dtype=torch.float64))]
    write_shard(tmp_path / "x.safetensors", made)
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert header["a"]["data_offsets"] == [0, 16]


def test_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def maker(i: int) -> Callable[[], Tensor]:
        def make_one() -> Tensor:
            alive.append(i)
            return torch.full((4,), float(i))

        return make_one

    entries = [Entry(name=str(i), dtype="F32", shape=(4,), nbytes=16, make=maker(i)) for i in range(3)]
    assert alive == []
    write_shard(tmp_path / "x.safetensors", entries)
    assert alive == [0, 1, 2]


def test_a_tensor_that_is_not_as_announced_is_found(tmp_path: Path) -> None:
    entry = Entry(name="x", dtype="F32", shape=(4,), nbytes=16, make=lambda: torch.zeros(5))
    with pytest.raises(compress.VerificationError, match=r"x: torch.float32 of 20 bytes, but 16 were announced"):
        write_shard(tmp_path / "x.safetensors", [entry])


def test_a_place_that_is_gone_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError):
        write_shard(tmp_path / "nowhere" / "x.safetensors", [Entry.of("x", torch.zeros(1))])


def test_what_is_offloaded_reads_back(tmp_path: Path) -> None:
    from compress.model.travellers import Travellers

    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(2, 5, 7).to(dtype)
        travellers = Travellers(torch.zeros(2, 5), hidden, [], tmp_path / "batch")
        assert torch.equal(travellers.hidden_BTD, hidden)
        assert travellers._hidden.is_meta
        travellers.hidden_BTD = hidden * 2
        assert torch.equal(travellers.hidden_BTD, hidden * 2)


def test_rtn_of_rows_at_once_is_rtn_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.weights import grid

    w = torch.randn(37, 24, generator=torch.Generator().manual_seed(0))
    for group, symmetric in ((8, False), (0, True), (-1, False)):
        whole = grid.Grid(bits=3, group=group, symmetric=symmetric).quantize(w, search=True)
        monkeypatch.setattr(grid, "AT_ONCE", 5 * 24)
        parts = grid.Grid(bits=3, group=group, symmetric=symmetric).quantize(w, search=True)
        monkeypatch.undo()
        assert torch.equal(whole.codes, parts.codes)
        assert torch.equal(whole.scale, parts.scale)
        assert (whole.zero is None and parts.zero is None) or torch.equal(whole.zero, parts.zero)


def test_masks_of_rows_at_once_are_masks_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = import_module("compress.weights.pattern")  # the package exports a function of that name
    score = torch.randint(0, 4, (50, 8), generator=torch.Generator().manual_seed(0)).float()  # many ties
    for kind in (pattern.pattern("2:4"), pattern.pattern(0.5)):
        whole = kind.keep(score)
        monkeypatch.setattr(pattern, "AT_ONCE", 7)
        assert torch.equal(kind.keep(score), whole)
        monkeypatch.undo()
