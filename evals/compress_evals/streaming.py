"""Measures time and peak memory of compressing a model that is much larger than the memory it may use.

`python -m compress_evals.streaming` makes a Llama with random bfloat16 weights in many shards, runs recipes on it, each
in a process of its own, and prints seconds and peak resident memory together with the size of the model. `--shape 8b`
has the widths of Llama 3 8B; with `--device cuda`, peak GPU memory is also reported. Random weights say nothing about
quality, so none is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.model.source import locate

SHAPE = {"vocab_size": 32000, "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 32,
         "num_key_value_heads": 8, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SHAPES = {
    "2.6b": SHAPE,
    "8b": SHAPE | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "rope_theta": 5e5},
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CALIBRATED = "calibration: {data: text, samples: %d, length: %d}\n"
RECIPES = {
    "rtn int4": "passes: [rtn: {bits: 4, group: 64}]\n",
    "wanda 2:4": CALIBRATED + "passes: [wanda: {sparsity: 2:4}]\n",
    "gptq int4": CALIBRATED + "passes: [gptq: {bits: 4, group: 64}]\n",
    "gptq int4 g128": CALIBRATED + "passes: [gptq: {bits: 4, group: 128}]\n",
    "wanda 2:4 + gptq int4": CALIBRATED
    + "passes:\n  - wanda: {sparsity: 2:4}\n  - gptq: {bits: 4, group: 64, target: original}\n",
}


def block_bytes(shape: dict[str, int | float]) -> int:
    """The bytes of one block in bfloat16."""
    hidden, inner = int(shape["hidden_size"]), int(shape["intermediate_size"])
    keys = hidden * int(shape["num_key_value_heads"]) // int(shape["num_attention_heads"])
    return 2 * (2 * hidden * hidden + 2 * keys * hidden + 3 * hidden * inner + 2 * hidden)


def block_tensors(
    i: int, hidden: int, keys: int, inner: int, matrix: Callable[[int, int], Tensor]
) -> dict[str, Tensor]:
    """The tensors of one block."""
    sides = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    matrices = {f"model.layers.{i}.{name}.weight": matrix(*side) for name, side in sides.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return matrices | {f"model.layers.{i}.{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}


def make(
    folder: Path, size: float, seed: int = 0, shape: dict[str, int | float] | None = None, device: str = "cpu"
) -> int:
    """Write a random Llama of about `size` bytes with one shard per block, and return its tensor bytes.

    Random numbers are drawn on `device`. Peak memory is one shard.
    """
    shape = SHAPE if shape is None else shape
    hidden, inner, vocabulary = (int(shape[key]) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = hidden * int(shape["num_key_value_heads"]) // int(shape["num_attention_heads"])
    blocks = max(2, round((size - 4 * vocabulary * hidden) / block_bytes(shape)))
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        drawn = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return drawn.normal_(0, columns**-0.5, generator=generator).cpu()

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    total = 0
    index: dict[str, str] = {}
    for i in range(blocks + 1):
        if i < blocks:
            tensors = block_tensors(i, hidden, keys, inner, matrix)
        else:
            tensors = {name: matrix(vocabulary, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        name = f"model-{i + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, part / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    config = {**shape, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "num_hidden_layers": blocks, "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip
    described = {"config.json": config,
                 "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": index}}  # fmt: skip
    for name, content in described.items():
        (part / name).write_text(json.dumps(content, indent=1))
    for name in TOKENIZER:
        shutil.copyfile(locate("builtin") / name, part / name)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return total


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run: wall seconds, peak resident bytes (including mapped file pages), peak GPU bytes, and bytes written.

    `recorded` is the time spent, after the shards were written, waiting until hidden states were on disk, in seconds.
    """

    seconds: float
    peak: int
    video: int
    written: int
    recorded: float


def measure(model: Path, recipe: str, out: Path, options: list[str]) -> Measured:
    """Run a recipe in a process of its own and measure it; raises SystemExit with its exit code if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    written, log = out.with_suffix(".yaml"), out.with_suffix(".jsonl")
    written.write_text(recipe)
    log.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "compress",
        "run",
        str(written),
        "--model",
        str(model),
        "--out",
        str(out),
        "--log",
        str(log),
        "--restart",
        *options,
    ]
    began = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(child.returncode)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return Measured(
        seconds=time.monotonic() - began, peak=usage.ru_maxrss * 1024, written=size,
        video=max(event.get("gpu_peak_bytes", 0) for event in events),
        recorded=sum(event["seconds"] for event in events if event["event"] == "BlockRecorded"),
    )  # fmt: skip


def main() -> None:
    """Make the model if it does not exist, run the recipes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, default=4e9, help="approximate size of the model in bytes")
    parser.add_argument(
        "--dir", type=Path, default=Path("out/bench/streaming"), help="folder for the model and results"
    )
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--offload", action="store_true", help="keep hidden states on disk")
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="2.6b", help="model size whose layer widths the blocks have"
    )
    parser.add_argument("--device", default="cpu", help="device to compute on")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    model = arguments.dir / f"llama-{arguments.shape}-{arguments.bytes:.0f}"
    if not model.is_dir():
        make(model, arguments.bytes, shape=shape, device=arguments.device)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    rows = []
    for name in arguments.recipes:
        options = ["--offload"] if arguments.offload else []
        recipe = RECIPES[name].replace("%d", str(arguments.samples), 1).replace("%d", str(arguments.length), 1)
        found = measure(model, recipe, arguments.dir / "out", [*options, "--device", arguments.device])
        rows.append(
            f"| {name} | {found.seconds:.0f} s | {found.recorded:.0f} s | {found.peak / 1e9:.2f} GB | "
            f"{found.video / 1e9:.2f} GB | {found.written / 1e9:.2f} GB |"
        )
    on_gpu = arguments.device.startswith("cuda")
    device = torch.cuda.get_device_name(arguments.device) if on_gpu else "cpu"
    shards = len(list(model.glob("*.safetensors")))
    hidden = arguments.samples * arguments.length * int(shape["hidden_size"]) * 2
    print(
        f"\n{size / 1e9:.2f} GB of bfloat16 in {shards} shards, {arguments.samples} x {arguments.length} tokens, whose "
        f"hidden states take {hidden / 1e9:.2f} GB; {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; one run each"
    )
    print(
        "| recipe | time | of it waiting for records | peak resident memory | peak video memory | written |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows)
    )


if __name__ == "__main__":
    main()
