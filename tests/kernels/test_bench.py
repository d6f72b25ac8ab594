"""The benchmark's own code: what it times is right, what it cannot time it says; never how fast anything was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress_kernels import wq
from compress_kernels.bench import first, gpu, plot, subjects
from compress_kernels.dispatch import DEVICES, Format, known, most_rows, predict

CPU = torch.device("cpu")
INT4 = Format(name="int4 g128", bytes=0.516, instructions=(2.05, 2.4, 3.0))


def test_lines_say_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "lines.jsonl"

    gpu.main(["--device", "cpu", "--shapes", "64x256", "--rows", "1", "3", "--dtype", "float16", "--out", str(out)])

    head, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert head["conditions"]["device"] == "cpu" and head["roof_bytes_per_second"] > 0
    named = {line["format"] for line in lines}
    assert {subject.name for subject in (*subjects.ours(), *subjects.peers(CPU))} == named
    assert not [line for line in lines if "failed" in line]
    assert {line["format"] for line in lines if line.get("missing") == "for CUDA"} >= {"tinygemm int4 g128"}
    for line in lines:
        assert "missing" in line or (line["rows"] in (1, 3) and line["p10"] <= line["seconds"] <= line["p90"])
        assert line.get("error", 0) < 2e-3


@pytest.mark.parametrize("subject", list(subjects.ours()), ids=lambda subject: str(subject.name))
def test_a_subject_reads_the_bytes_of_its_format(subject: subjects.Subject) -> None:
    made = subject.make(torch.randn(128, 1024))

    bits = int(subject.name[3])
    group = int(subject.name.partition(" g")[2] or 1024)
    assert made.nbytes == 128 * 1024 * bits // 8 + 2 * 128 * 1024 // group


def test_a_picture_is_drawn_of_what_was_timed(tmp_path: Path) -> None:
    shape = {"out": 64, "in": 256, "rows": 1}
    lines = [{"conditions": {"device": "cpu"}}, {"format": "dense", "seconds": 2.0, **shape},
             {"format": "int4", "seconds": 1.0, **shape}, {"format": "nf4", "missing": "not installed"}]  # fmt: skip

    assert plot.speedups(lines) == {(64, 256): {"int4": [(1, 2.0)]}}
    plot.draw(lines, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no format"):
        plot.draw(lines[:2], tmp_path / "y.png")


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: str(device.kind))
def test_prediction_is_the_roofline(device: object) -> None:
    few, many = (predict(INT4, m, 1 << 24, device) for m in (1, 4096))  # type: ignore[arg-type]

    assert (few.path, few.bound) == ("kernel", "memory")
    assert few.speedup == pytest.approx(2 / INT4.bytes)
    assert many.path == "dense" and many.speedup < 1
    assert 16 <= most_rows(INT4, device) < 4096  # type: ignore[arg-type]


def test_an_unknown_device_is_taken_for_the_slowest() -> None:
    assert known("NVIDIA H200").kind == "H200"
    assert known("GeForce").bandwidth == min(device.bandwidth for device in DEVICES)


def test_the_first_questions_are_answered_yes_by_the_interpreter(device: torch.device) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    found = list(first.answers(device, shape=(64, 256), runs=3))

    assert [answer["question"] for answer in found if not answer["yes"]] == []
    assert len(found) == 6 + 2 * len(wq.BITS) + 2 * len(wq.SUBNORMAL) + 2
