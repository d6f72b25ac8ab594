"""`python -m compress_evals.peers`: benchmarks Wanda, SparseGPT, GPTQ and rounding against other tools.

Each tool gets the same folder of safetensors, the same calibration tokens and one thread, and writes a folder; Compress
runs with all of its checks. Each job runs in a process of its own, under the Python interpreter that has the tool, and
is measured there by `job.py`; its output is evaluated here. The other tools need an environment of their own, because
they pin other versions: `make bench-peers` makes one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from compress.artifact import Artifact
from compress.errors import CompressError, RecipeError
from compress_evals.folders import opened
from compress_evals.peers.lines import OURS, Line, append, document, read
from compress_evals.peers.score import Quality, in_place, quality, tensors_of
from compress_evals.peers.subjects import SUBJECTS, TASKS, Subject, prepared
from compress_evals.run import evaluate

JOB = Path(__file__).with_name("job.py")
DOES = {  # the tasks of each tool, and the module that shows whether it is installed
    OURS: (TASKS, "compress"),
    "llm-compressor": (TASKS, "llmcompressor"),
    "modelopt": (("sparsegpt",), "modelopt"),
    "gptqmodel": (("gptq",), "gptqmodel"),
    "auto-round 0": (("rtn",), "auto_round"),
    "auto-round 20": (("gptq",), "auto_round"),
}
ASKED = {"facts_trained": "closed book", "facts_context3": "in context"}
CONDITIONS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
              "GPTQMODEL_CPU_WORKERS": "2"}  # fmt: skip  # gptqmodel refuses fewer workers


def check_tools(python: Path, tools: Sequence[str]) -> None:
    """Raise RecipeError unless the given Python interpreter runs and has the other tools installed."""
    wanted = {DOES[tool][1]: tool for tool in tools if tool != OURS}
    if not wanted:
        return
    code = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    try:
        told = subprocess.run([python, "-c", code, *wanted], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RecipeError(f"--peers-python: {python} does not run; `make bench-peers` makes one") from error
    if told:
        raise RecipeError(f"--peers-python: {python} has no {told[0]}, which {wanted[told[0]]} needs")


def run_job(python: Path, tool: str, task: str, subject: Subject, folder: Path) -> dict[str, Any]:
    """Run one job and return its measurement; raises RecipeError, with the last line of its log, if the tool fails."""
    stem = folder / f"{subject.name}-{tool.replace(' ', '-')}-{task}"
    files = {name: stem.with_suffix(f".{name}") for name in ("json", "result", "yaml", "log")}
    shutil.rmtree(stem, ignore_errors=True)
    files["result"].unlink(missing_ok=True)
    files["yaml"].write_text(subject.recipe(task), encoding="utf-8")
    job = {"tool": tool, "task": task, "model": str(subject.model), "ids": str(subject.ids), "out": str(stem),
           "recipe": str(files["yaml"]), "result": str(files["result"])}  # fmt: skip
    files["json"].write_text(json.dumps(job), encoding="utf-8")
    with files["log"].open("w") as log:
        command = [python, JOB, files["json"]]  # run in that folder: gptqmodel writes logs there
        done = subprocess.run(command, env=os.environ | CONDITIONS, stdout=log, stderr=log, cwd=folder)
    if done.returncode or not files["result"].exists():
        said = files["log"].read_text(errors="replace").strip().splitlines()[-1:]
        raise RecipeError(f"{subject.name}, {task}, {tool}: failed: {' '.join(said)[:200]}; see {files['log']}")
    result: dict[str, Any] = json.loads(files["result"].read_text())
    return {**result, "out": str(stem)}


def judged(dense: Any, tokenizer: Any, subject: Subject, tool: str, out: Path) -> Quality:
    """The quality of the output model; raises RecipeError if Compress was calibrated on other tokens than the rest."""
    made = Artifact(out).provenance["calibration"] if tool == OURS else {}
    if made.get("tokens") and made["sha256"] != subject.sha256:
        raise RecipeError(f"{out}: calibrated on other tokens than the other tools")
    changed = in_place(dense, tensors_of(out))
    scores = {}
    if subject.knows:
        asked = evaluate(changed, tokenizer, name=tool, only=list(ASKED))
        scores = {title: asked.tasks[name].score.value for name, title in ASKED.items()}
    return quality(dense, changed, subject.judged_NT, scores)


def measure(arguments: argparse.Namespace) -> None:
    """Run the selected jobs and append a line for each."""
    folder, path = arguments.out.absolute() / "jobs", arguments.out / "lines.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "?")
    for name in arguments.subjects:
        subject = prepared(name, folder)
        dense, tokenizer = opened(subject.model, "cpu")
        dense = dense.float()  # compares the weights without the rounding of a bf16 forward pass
        for task in arguments.tasks:
            for tool in [tool for tool in arguments.tools if task in DOES[tool][0]]:
                python = Path(sys.executable) if tool == OURS else arguments.peers_python.absolute()
                runs = [run_job(python, tool, task, subject, folder) for _ in range(arguments.runs)]
                outs, versions = [run.pop("out") for run in runs], [run.pop("versions") for run in runs]
                found = judged(dense, tokenizer, subject, tool, Path(outs[-1]))
                append(path, Line(
                    subject=name, tool=tool, task=task, runs=runs, quality=found, versions=versions[-1],
                    date=date.today().isoformat(), cpu=f"{model.partition(': ')[2]}, {os.cpu_count()} cores",
                ))  # fmt: skip
                sys.stderr.write(f"{name}, {task}, {tool}: {', '.join(str(run['cpu']) for run in runs)} cpu s\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables, or print those of stored lines; returns 2 if a tool is missing or fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m compress_evals.peers", description=__doc__)
    parser.add_argument("--peers-python", type=Path, default=Path("out/peers/venv/bin/python"), metavar="PATH")
    parser.add_argument("--out", type=Path, default=Path("out/peers"), help="folder for models, results and lines")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--tools", nargs="+", default=list(DOES), choices=list(DOES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--runs", type=int, default=3, help="runs of each job")
    parser.add_argument("--markdown", type=Path, metavar="LINES", help="only print the tables of these lines")
    arguments = parser.parse_args(argv)
    lines = arguments.markdown or arguments.out / "lines.jsonl"
    try:
        if arguments.runs < 1:
            raise RecipeError(f"--runs: {arguments.runs} is not 1 or more")
        if arguments.markdown is None:
            torch.set_num_threads(1)
            check_tools(arguments.peers_python, arguments.tools)
            measure(arguments)
        found = read(lines)
        if not found:
            raise RecipeError(f"--markdown: {lines} holds no lines")
    except CompressError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(document(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
