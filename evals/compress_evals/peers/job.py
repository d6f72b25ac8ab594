"""Runs and measures one job of one tool in a process of its own: `python job.py JOB.json`.

It runs under the Python interpreter that has the tool, where Compress need not be installed, so nothing of Compress is
imported except for jobs of Compress itself. It measures what a user waits for, from one folder of safetensors to
another: wall seconds, CPU seconds (user and system, including child processes), and peak resident memory. Imports
happen before the measurement and are not counted; the memory that they hold is reported as the base.

JOB.json holds `tool`, `task`, `model`, `ids` (a safetensors file with `windows` [N, T]), `out`, `result` (the path for
the measurement) and `recipe`, which only Compress reads.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
LLAMA = "transformers.models.llama.modeling_llama"  # every tool would import this when it builds the model
EVERY = 0.01  # seconds between two samples of the memory
GROUP = 128


# -- the tools -------------------------------------------------------------------------------------


def windows(job: Job) -> Any:
    """The calibration windows [N, T]."""
    from safetensors.torch import load_file

    return load_file(job["ids"])["windows"]


def dense_and_tokenizer(job: Job) -> tuple[Any, Any]:
    """The model, in the dtype of its file, and its tokenizer, as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", local_files_only=True)
    return model, AutoTokenizer.from_pretrained(job["model"], local_files_only=True)


def ours(job: Job) -> None:
    """Run the command `compress run`, with all of its checks."""
    command = ["run", job["recipe"], "--model", job["model"], "--out", job["out"], "--force"]
    if code := importlib.import_module("compress.cli").app(command, standalone_mode=False):
        raise SystemExit(code)


def llmcompressor(job: Job) -> None:
    """Run `oneshot` with its defaults, and save as its documentation says."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    cut = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    rounded = {"targets": "Linear", "scheme": "W4A16", "ignore": ["lm_head"]}
    modifiers: dict[str, Callable[[], Any]] = {
        "wanda": lambda: WandaPruningModifier(**cut), "sparsegpt": lambda: SparseGPTModifier(**cut),
        "gptq": lambda: GPTQModifier(**rounded), "rtn": lambda: QuantizationModifier(**rounded),
    }  # fmt: skip
    model, tokenizer = dense_and_tokenizer(job)
    if job["task"] == "rtn":
        oneshot(model=model, recipe=modifiers["rtn"]())
    else:
        rows = windows(job).tolist()
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        oneshot(
            model=model, tokenizer=tokenizer, dataset=data, num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]), recipe=modifiers[job["task"]](),
        )  # fmt: skip
    model.save_pretrained(job["out"], save_compressed=True)


def modelopt(job: Job) -> None:
    """Run `mts.sparsify` with its defaults."""
    import modelopt.torch.sparsity as mts

    model, _ = dense_and_tokenizer(job)
    batches = [{"input_ids": row[None]} for row in windows(job)]
    model = mts.sparsify(model, "sparsegpt", config={"data_loader": batches, "collect_func": lambda batch: batch})
    mts.export(model).save_pretrained(job["out"])


def gptqmodel(job: Job) -> None:
    """Run GPTQ with its defaults, in the dtype of the file."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    dtype = getattr(torch, json.loads((Path(job["model"]) / "config.json").read_text())["dtype"])
    settings = QuantizeConfig(bits=4, group_size=GROUP, device="cpu")
    model = GPTQModel.load(job["model"], settings, dtype=dtype)
    rows = windows(job).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(job["out"])


def autoround(job: Job, iterations: int) -> None:
    """Run AutoRound; with 0 iterations it rounds to nearest."""
    from auto_round import AutoRound

    model, tokenizer = dense_and_tokenizer(job)
    rows = windows(job)
    AutoRound(
        model, tokenizer, scheme="W4A16", dataset=[{"input_ids": row[None]} for row in rows], iters=iterations,
        nsamples=len(rows), seqlen=rows.shape[1], batch_size=4, device_map="cpu", enable_torch_compile=False,
    ).quantize_and_save(output_dir=job["out"], format="llm_compressor")  # fmt: skip


TOOLS: dict[str, tuple[str, tuple[str, ...], Callable[[Job], None]]] = {  # distribution, what to import first, the work
    "ours": ("compress-llm", ("compress.cli", "compress.driver", "compress.recipe", "accelerate"), ours),
    "llm-compressor": (
        "llmcompressor",
        ("llmcompressor", "llmcompressor.modifiers.gptq", "llmcompressor.modifiers.pruning", "datasets"),
        llmcompressor,
    ),
    "modelopt": ("nvidia-modelopt", ("modelopt.torch.sparsity",), modelopt),
    "gptqmodel": ("gptqmodel", ("gptqmodel",), gptqmodel),
    "auto-round 0": ("auto-round", ("auto_round",), lambda job: autoround(job, 0)),
    "auto-round 20": ("auto-round", ("auto_round",), lambda job: autoround(job, 20)),
}


# -- the measurement -------------------------------------------------------------------------------


def memory(*fields: str) -> list[int]:
    """Memory fields of this process's /proc status, in bytes."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return [1024 * int(told[field].split()[0]) for field in fields]


def cpu_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


class Anonymous(threading.Thread):
    """A thread that samples anonymous (not file-backed) resident memory until `over` is set; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        """Sample the memory every EVERY seconds."""
        while not self.over.wait(EVERY):
            self.peak = max(self.peak, memory("RssAnon")[0])


def measured(work: Callable[[], None]) -> dict[str, Any]:
    """The time and memory that `work` takes; memory is in bytes, and the base is what is held before `work` starts.

    The peak of resident memory is the kernel's high-water mark, which is reset here. The peak of anonymous memory is
    sampled.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current resident memory
    base, base_anonymous = memory("VmRSS", "RssAnon")
    watch = Anonymous()
    watch.start()
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    watch.over.set()
    watch.join()
    return {
        "wall": round(wall, 3), "cpu": round(cpu, 3), "base": base, "peak": memory("VmHWM")[0],
        "anonymous_base": base_anonymous, "anonymous_peak": max(watch.peak, base_anonymous),
        "children_peak": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def main(path: str) -> None:
    """Run one job and write its measurement."""
    job: Job = json.loads(Path(path).read_text())
    distribution, modules, work = TOOLS[job["tool"]]
    for name in (*modules, LLAMA, "safetensors.torch"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = measured(lambda: work(job))
    found["versions"] = {name: version(name) for name in dict.fromkeys((distribution, "torch", "transformers"))}
    found["threads"] = torch.get_num_threads()
    Path(job["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files must not shadow a tool's modules
    main(sys.argv[1])
