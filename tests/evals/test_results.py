"""Results survive saving and loading bit for bit; malformed ones are refused with a message that names the place."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import ArtifactError
from compress_evals.comparison import compare
from compress_evals.fidelity import Estimate, Fidelity
from compress_evals.results import Results, Row, load, save

FIDELITY = Fidelity(
    text_sha256="0" * 64,
    tokens=10,
    windows=2,
    kl=Estimate(value=math.inf, low=math.inf, high=math.inf),
    kl_p50=0.1,
    kl_p99=math.inf,
    top1=0.5,
    dense_bits_per_byte=1.0,
    compressed_bits_per_byte=math.inf,
    bits_per_byte_difference=Estimate(value=0.1, low=-0.1, high=0.2),
    answers=3,
    answer_kl=Estimate(value=0.1, low=0.0, high=0.2),
    answer_top1=0.5,
)


@pytest.fixture
def results(make_results: Callable[..., Results]) -> Results:
    dense = make_results("dense", {"facts_trained": [1, 1, 0, 1]})
    compressed = make_results("small", {"facts_trained": [1, 0, 0, 1]}, recipe="passes: []", calibration={"data": "a"})
    return compressed.model_copy(update={"vs": compare(dense, compressed, FIDELITY)})


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "results.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_results_come_back_as_they_were(results: Results, tmp_path: Path) -> None:
    assert save(results, tmp_path) == tmp_path / "results.json"
    assert load(tmp_path) == results
    assert load(tmp_path / "results.json") == results


def test_saving_twice_gives_the_same_bytes(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path / "a")
    save(results, tmp_path / "b")
    files = ["results.json", "samples/facts_trained.jsonl.gz"]
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]
    assert (tmp_path / "a" / files[1]).read_bytes()[4:8] == bytes(4)  # no time of writing in the gzip header
    assert sorted(p.name for p in (tmp_path / "a").rglob("*") if p.is_file()) == [
        "facts_trained.jsonl.gz",
        "results.json",
    ]


def test_the_json_names_its_schema_and_holds_no_rows(results: Results, tmp_path: Path) -> None:
    content = json.loads(save(results, tmp_path).read_text())
    assert content["schema"] == 2
    assert "rows" not in content


def test_line_separators_in_an_answer_do_not_split_rows(results: Results, tmp_path: Path) -> None:
    rows = (
        results.rows["facts_trained"][0].model_copy(update={"said": "a\u2028b\nc"}),
        *results.rows["facts_trained"][1:],
    )
    save(results.model_copy(update={"rows": {"facts_trained": rows}}), tmp_path)
    assert load(tmp_path).rows["facts_trained"][0].said == "a\u2028b\nc"


def test_missing_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such results"):
        load(tmp_path)


@pytest.mark.parametrize("schema", [0, 1, None, "1"])
def test_another_schema_is_refused(results: Results, tmp_path: Path, schema: object) -> None:
    save(results, tmp_path)
    edit(tmp_path, lambda content: content.update(schema=schema))
    with pytest.raises(ArtifactError, match="reads schema 2"):
        load(tmp_path)


def test_an_unknown_field_is_refused_by_its_path(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path)
    edit(tmp_path, lambda content: content["tasks"]["facts_trained"].update(acuracy=1.0))
    with pytest.raises(ArtifactError, match=r"tasks\.facts_trained\.acuracy"):
        load(tmp_path)


def test_an_unknown_field_inside_the_statistics_is_refused(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path)
    edit(tmp_path, lambda content: content["vs"]["tasks"]["facts_trained"]["paired"].update(better=1.0))
    with pytest.raises(ArtifactError, match=r"paired\.better"):
        load(tmp_path)


def test_rows_of_another_run_are_refused(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path)
    path = tmp_path / "samples" / "facts_trained.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join(reversed(lines)).encode()))
    with pytest.raises(ArtifactError, match="do not belong"):
        load(tmp_path)


def test_broken_files_are_refused(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path)
    (tmp_path / "samples" / "facts_trained.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ArtifactError, match=r"facts_trained\.jsonl\.gz: not readable"):
        load(tmp_path)
    (tmp_path / "samples" / "facts_trained.jsonl.gz").unlink()
    with pytest.raises(ArtifactError, match="are missing"):
        load(tmp_path)
    raw = bytearray(gzip.compress(b"0" * 1000))
    raw[10] = 0xFF  # the first block is of no kind that there is
    (tmp_path / "samples" / "facts_trained.jsonl.gz").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"facts_trained\.jsonl\.gz: not readable"):
        load(tmp_path)
    (tmp_path / "results.json").write_text("[" * 200_000)
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        load(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        load(tmp_path)


def test_what_readers_rely_on_is_checked(results: Results, tmp_path: Path) -> None:
    save(results.model_copy(update={"tasks": {}, "vs": None}), tmp_path / "none")
    with pytest.raises(ArtifactError, match="no task was asked"):
        load(tmp_path / "none")
    task = next(iter(results.tasks))
    for changed in ({"headline": "f1"}, {"headline": "f1", "metrics": {"f1": results.tasks[task].score}}):
        other = results.tasks[task].model_copy(update=changed)
        save(results.model_copy(update={"tasks": {**results.tasks, task: other}}), tmp_path / "other")
        with pytest.raises(ArtifactError, match="finite f1"):
            load(tmp_path / "other")
    sure = results.tasks[task].model_copy(update={"chance": 1.0})
    save(results.model_copy(update={"tasks": {**results.tasks, task: sure}}), tmp_path / "sure")
    with pytest.raises(ArtifactError, match="chance"):
        load(tmp_path / "sure")


def test_rows_are_strict() -> None:
    with pytest.raises(ValueError, match="extra"):
        Row.model_validate({"id": "a", "cluster": "a", "hash": "0", "scores": {}, "score": 1})
