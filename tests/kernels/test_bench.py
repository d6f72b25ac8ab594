"""The kernel benchmark itself: it times correct results and reports what it cannot time; speed is not tested."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress_kernels import dispatch, tuning, wq
from compress_kernels.bench import first, fit, gpu, plot, search, subjects
from compress_kernels.dispatch import DEVICES, Format, known, predict

CPU = torch.device("cpu")
INT4 = Format(name="int4 g128", bytes=0.516, instructions=(2.05, 2.4, 3.0))
EIGHT = Format(name="int8", bytes=1.0, instructions=(2.05, 2.4, 3.0))
LINES = Path(__file__).parents[2] / "docs" / "kernels-h200.jsonl"


@pytest.mark.slow
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
        rounds = line["format"] == "int8 x int8"  # its inputs too
        assert line.get("error", 0) < (1e-2 if rounds else 2e-3)


def test_only_the_named_formats_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lines.jsonl"
    gpu.main(["--device", "cpu", "--shapes", "64x256", "--rows", "1", "--formats", "2:4", "dense", "--out", str(out)])
    assert [json.loads(line).get("format") for line in out.read_text().splitlines()[1:]] == ["dense", "2:4"]

    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--formats", "int5"])
    assert "--formats: no 'int5'; there are dense, " in capsys.readouterr().err


BITS = {  # a weight of each of our formats, as it is stored: values and masks, then scales
    "int8 row": 8 + 16 / 1024, "int4 g128": 4.125, "int4 g32": 4.5, "int3 g128": 3.125, "int2 g128": 2.125,
    "fp8 row": 8 + 16 / 1024, "2:4": 9, "1:4": 5, "4:8": 9, "2:4 int4 g128": 3.125, "int8 x int8": 8 + 32 / 1024,
}  # fmt: skip


@pytest.mark.parametrize("subject", list(subjects.ours()), ids=lambda subject: str(subject.name))
def test_a_subject_reads_the_bytes_of_its_format(subject: subjects.Ours) -> None:
    form = subject.pack(torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)).half())

    if subject.name in BITS:
        assert form.nbytes * 8 == BITS[subject.name] * 128 * 1024
    assert dispatch.format_of(form, 128 * 1024).bytes == form.nbytes / (128 * 1024)
    assert form.kind in dispatch.INSTRUCTIONS


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
    large = predict(EIGHT, 1, 1 << 34, device)  # type: ignore[arg-type]  # where the start of a launch is nothing

    assert few.path == "kernel" and 1 < few.speedup < 2 / INT4.bytes
    assert large.bound == "memory" and large.speedup == pytest.approx(2 / EIGHT.bytes, rel=0.01)
    assert many.path == "dense" and many.speedup < 1
    assert predict(INT4, 16, 1 << 24, device).path == "kernel"  # type: ignore[arg-type]


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()]


def test_the_shipped_slack_is_what_the_recorded_lines_give() -> None:
    found = fit.ratios(recorded(), known("H200"))
    assert {
        name: tuple(round(statistics.median(tiles[rows]), 2) for rows in fit.TILES) for name, tiles in found.items()
    } == dispatch.SLACK


@pytest.mark.parametrize("group", [0, 16, 128])
@pytest.mark.parametrize("kind", [*dispatch.INSTRUCTIONS, "3:8 fp8", "5:16 half", "1:4 int8"])
def test_every_kind_has_a_slack(kind: str, group: int) -> None:
    form = dispatch.format_of(SimpleNamespace(kind=kind, group=group, nbytes=100), 100)
    assert form.slack in dispatch.SLACK.values()
    assert (form.slack == dispatch.SLACK["int4 g32"]) == (kind in dispatch.WORDS and group == 16)


@pytest.mark.parametrize(("rows", "least", "most"), [(1, 0.7, 1.5), (256, 0.35, 1.2)])  # several tiles hide waits
def test_what_was_measured_is_near_what_is_expected_with_other_rows(rows: int, least: float, most: float) -> None:
    found = fit.ratios(recorded(), known("H200"), [rows], shipped=True)
    assert len(found) >= 12
    for name, ratios in found.items():
        assert least < min(ratios[rows]) and max(ratios[rows]) < most, name


def test_an_unknown_device_is_taken_for_the_slowest() -> None:
    assert known("NVIDIA H200").kind == "H200"
    assert known("GeForce").bandwidth == min(device.bandwidth for device in DEVICES)


@pytest.mark.slow
def test_the_first_questions_are_answered_yes_by_the_interpreter(device: torch.device) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    found = list(first.answers(device, shape=(64, 256), runs=3))

    assert [answer["question"] for answer in found if not answer["yes"]] == []
    assert len(found) == 6 + 2 * len(wq.BITS) + 2 * len(wq.SUBNORMAL) + 2


@pytest.mark.slow
def test_a_search_keeps_the_fastest_of_what_fits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    monkeypatch.setattr(search, "REPLAYS", 2)

    found = search.profile(device, lambda line: None, shapes=((64, 256),), rows=(1,), copies=1)

    assert {key.format for key in found.entries} == {
        "int8", "int4", "int3", "int2", "e4m3", "book", "2:4 half", "1:4 half", "4:8 half", "2:4 nibble",
    }  # fmt: skip
    for key, choice in found.entries.items():
        assert (key.op, key.out, key.inputs, key.rows) == ("gpu", 64, 256, 1)
        assert choice["path"] == ("kernel" if choice["speedup"] >= 1 else "dense")
        assert choice["outputs"] in (64, 128) and choice["splits"] in search.SPLITS


def test_a_profile_of_a_gpu_decides_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    from compress_kernels.gpu import launch

    sizes = {"rows": 8, "outputs": 128, "splits": 4, "warps": 4, "stages": 3}
    entries = {tuning.Key("gpu", "int4", 4096, 4096, 8): {"path": "kernel", "speedup": 2.0, **sizes},
               tuning.Key("gpu", "int4", 4096, 4096, 64): {"path": "dense", "speedup": 0.5, **sizes}}  # fmt: skip
    profile = tuning.Profile("NVIDIA H200", torch.__version__, "2026-11-26", 1, entries)
    monkeypatch.setattr(tuning, "known", lambda kind: profile)
    dispatch._tuned.cache_clear()
    cuda = torch.device("cuda:0")

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    assert launch.tuned("int4", 5, 4096, 4096, 32, cuda) == launch.Config(**sizes)
    assert launch.tuned("int4", 5, 4096, 4096, 2, cuda) == launch.Config(**(sizes | {"splits": 2}))
    assert launch.tuned("int4", 5, 192, 4096, 32, cuda) is None  # 128 outputs do not divide its rows of words
    assert launch.tuned("int4", 65, 4096, 4096, 32, cuda) is None  # more rows of x than were measured
    assert dispatch.decodes("int4", 65, 4096, 4096, cuda, above=64)
    assert dispatch.decodes("int4", 33, 4096, 4096, cuda, above=256)
    assert not dispatch.decodes("int4", 8, 4096, 4096, cuda, above=4)
    assert launch.tuned("int3", 5, 4096, 4096, 32, cuda) is None
    assert launch.tuned("int4", 5, 4096, 4096, 32, torch.device("cpu")) is None
    dispatch._tuned.cache_clear()


def test_tuning_a_gpu_that_is_not_here_is_refused() -> None:
    from compress_kernels.bench.tune import tune

    if not torch.cuda.is_available():
        with pytest.raises(tuning.TuningError, match="there is no GPU here"):
            tune("cuda")


@pytest.mark.parametrize(
    ("family", "name", "kind"),
    [("wq", "wq int4 g128", "int4"), ("wq", "wq int8 g0", "int8"), ("wq", "wq e4m3 g0", "e4m3"),
     ("nm", "nm 2:4 half", "2:4 half"), ("nm", "nm 1:4 half", "1:4 half")],
)  # fmt: skip
def test_predictions_rest_on_what_is_counted(family: str, name: str, kind: str) -> None:
    counted = json.loads((Path(__file__).parent / "instructions" / f"{family}.json").read_text(encoding="utf-8"))

    found = counted["cases"][f"{name} bf16 8x128 sm_90"]["per_weight"]

    assert dispatch.INSTRUCTIONS[kind][0] == pytest.approx(found, rel=0.1)


def test_what_keeps_kernels_from_running_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    cuda = torch.device("cuda:0")

    def missing(device: torch.device = cuda) -> str:
        return dispatch.missing.__wrapped__(device)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert missing(CPU) == "cpu is not an NVIDIA GPU"
    assert "capability (7, 5)" in missing()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert missing() == ""
    monkeypatch.setattr(dispatch, "version", lambda name: "3.5.1")
    assert "3.5.1 is older than 3.6" in missing()
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert "not installed" in missing()
