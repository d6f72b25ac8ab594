"""Evaluating folders: killed and resumed, short of memory, hostile input, and a model compared with itself."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import RTN, Magnitude
from compress.artifact import Artifact
from compress.errors import RecipeError
from compress.model.source import BUILTIN
from compress_evals import answers as asking
from compress_evals import folders
from compress_evals.fidelity import evaluation_text
from compress_evals.folders import SHORTEST, evaluate_folders
from compress_evals.results import load

TASKS = ["facts_trained", "facts_mc", "facts_generate"]
TEXT = evaluation_text()[:SHORTEST]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress.run("builtin", [RTN(bits=3, group=64)], tmp_path_factory.mktemp("folders") / "small").out


@pytest.fixture(autouse=True)
def fewer_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fidelity is not what is tested here."""
    whole = folders.references.all_windows

    def windows(*arguments: Any, **options: Any) -> Any:
        pieces, asked = whole(*arguments, **options)
        return pieces, asked[:20]

    monkeypatch.setattr(folders.references, "all_windows", windows)


def evaluated(artifact: Path, **options: Any) -> Any:
    return evaluate_folders([artifact], **{"only": TASKS, "limit": 8, "text": TEXT, **options})


def timeless(path: Path) -> Any:
    """A result without its dates and times."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(entry) for key, entry in value.items() if key not in ("created", "seconds")}
        return value

    return clean(json.loads(path.read_text()))


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_at_the_next_task_and_two_share_a_cache(
    artifact: Path, forks: Any, tally: Any, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    line = ["eval", artifact, "--tasks", ",".join(TASKS), "--limit", "4", "--noise", "4",
            "--text", tmp_path / "text.txt", "--out"]  # fmt: skip
    stored = tmp_path / "killed" / "cache" / "answers"
    imports = ["compress_evals", "lm_eval.models.huggingface", "lm_eval.tasks"]
    with tally("fault", "SIGKILL of an evaluation"):
        [told] = forks(
            lines=[[*line, tmp_path / "killed"]], imports=imports, signals=[signal.SIGKILL], place=stored,
            pattern="*.json.gz", count=2,
        )  # fmt: skip
        assert told["code"] == -signal.SIGKILL
        before = {path: path.stat().st_mtime_ns for path in stored.glob("*.json.gz")}
        assert 2 <= len(before) < 9  # of three tasks, asked of two models, and once more of the dense one
        assert not (tmp_path / "killed" / "builtin").exists()
    with tally("fault", "evaluations at once with one cache"):
        beside = [*line, tmp_path / "beside", "--cache", stored.parent]
        told, other = forks(lines=[[*line, tmp_path / "killed"], beside])
        assert (told["code"], other["code"]) == (0, 0), told["err"] + other["err"]
        assert not list(tmp_path.rglob("*.partial*"))
    [told] = forks(lines=[[*line, tmp_path / "whole"]])
    after = {path: path.stat().st_mtime_ns for path in stored.glob("*.json.gz")}
    assert len(after) == 9 and before.items() <= after.items()  # what was there was not asked again
    for out in ("killed", "beside"):
        for name in ("builtin", "small"):
            ours, theirs = (tmp_path / folder / name / "results.json" for folder in (out, "whole"))
            assert timeless(ours) == timeless(theirs)
            assert load(ours).rows == load(theirs).rows


@pytest.mark.slow
def test_a_dense_model_that_is_stored_is_not_loaded(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(artifact, cache=tmp_path / "cache")
    second = compress.run("builtin", [RTN(bits=2, group=64)], tmp_path / "other").out
    loaded: list[Path] = []
    whole = compress.load
    monkeypatch.setattr(compress, "load", lambda folder, **options: loaded.append(folder) or whole(folder, **options))
    dense, other = evaluated(second, cache=tmp_path / "cache")
    assert loaded == [second]
    assert dense.rows == first[0].rows
    assert other.vs.fidelity.kl.value > first[1].vs.fidelity.kl.value > 0


@pytest.mark.slow
def test_figures_with_and_without_a_cache_are_the_same(artifact: Path, tmp_path: Path) -> None:
    stored = evaluated(artifact, cache=tmp_path / "cache")
    direct = evaluated(artifact)
    assert [found.rows for found in stored] == [found.rows for found in direct]
    kept, whole = stored[1].vs.fidelity, direct[1].vs.fidelity
    assert (kept.kl, kept.kl_p50, kept.kl_p99, kept.top1) == (whole.kl, whole.kl_p50, whole.kl_p99, whole.top1)
    assert kept.bits_per_byte_difference == whole.bits_per_byte_difference


@pytest.mark.slow
def test_where_memory_runs_out_all_models_are_asked_at_half_and_that_is_said(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lines = asking.ask, list[str]()

    def ask(subject: Any, asked: Any, exam: Any, batch_size: int, *rest: Any) -> Any:
        if subject.name == "small" and batch_size > 8:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return whole(subject, asked, exam, batch_size, *rest)

    monkeypatch.setattr(asking, "ask", ask)
    dense, small = evaluated(artifact, only=TASKS[:1], batch_size=16, on_progress=lines.append)
    assert dense.engine.batch_size == small.engine.batch_size == 8
    assert dense.notes == small.notes == ("batch size 8, because 16 ran out of memory",)
    assert dense.notes[0] in small.vs.notes
    assert "note: out of memory; retrying with batch size 8" in lines


@pytest.mark.slow
def test_nothing_to_evaluate_is_refused() -> None:
    with pytest.raises(RecipeError, match="folders: name at least one"):
        evaluate_folders([])


@pytest.mark.slow
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(BUILTIN, hostile)
    ran = tmp_path / "ran"
    for name in ("modeling_evil", "tokenization_evil"):
        (hostile / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').write('x')\nclass Evil:\n    pass\n")
    config = json.loads((hostile / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    (hostile / "config.json").write_text(json.dumps(config))
    settings = json.loads((hostile / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (hostile / "tokenizer_config.json").write_text(json.dumps(settings))
    dense, same = evaluate_folders(
        [shutil.copytree(hostile, tmp_path / "b")], hostile, only=TASKS[:1], limit=4, text=TEXT
    )
    assert not ran.exists()
    assert dense.rows == same.rows


@pytest.mark.slow
def test_a_model_against_itself_matches_everywhere_and_a_ruined_one_fails(tmp_path: Path) -> None:
    same = shutil.copytree(BUILTIN, tmp_path / "same")
    ruined = compress.run("builtin", [Magnitude(sparsity=0.7)], tmp_path / "ruined").out
    closed = ["facts_trained", "facts_question", "facts_cloze"]
    asked = [*closed, "facts_mc", "facts_context1", "facts_copy"]  # one of each family with short prompts
    _, itself, pruned = evaluate_folders([same, ruined], "builtin", only=asked, limit=80, text=TEXT)
    assert {cell.paired.verdict for cell in itself.vs.tasks.values()} == {"matching"}
    assert sum(cell.paired.lost + cell.paired.gained for cell in itself.vs.tasks.values()) == 0
    assert (itself.vs.fidelity.kl.value, itself.vs.fidelity.top1) == (0.0, 1.0)
    assert {pruned.vs.tasks[name].paired.verdict for name in closed} == {"fails"}
    assert itself.vs.tasks.keys() == set(asked)


@pytest.mark.slow
def test_generation_is_timed_beside_dense_if_asked(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folders.GENERATED == {"prompt": 64, "new": 128, "runs": 5}
    monkeypatch.setattr(folders, "GENERATED", {"prompt": 16, "new": 32, "runs": 3})
    called = shutil.copytree(artifact, tmp_path / "dense")  # as an export may be
    _, small = evaluated(called, only=TASKS[:1], limit=4, speed=True)
    assert small.model.name == "dense"
    speed = small.vs.speed
    assert speed.dense > 0 and speed.compressed > 0
    assert speed.low <= speed.ratio <= speed.high
    assert (speed.prompt, speed.new, speed.runs) == (16, 32, 3)


def test_an_identity_is_of_weights_and_settings_and_not_of_names(tmp_path: Path) -> None:
    one, two = (shutil.copytree(BUILTIN, tmp_path / name) for name in ("one", "two"))
    assert folders.fingerprint(one) == folders.fingerprint(two) == folders.fingerprint(BUILTIN)
    settings = json.loads((two / "generation_config.json").read_text())
    (two / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.1}))
    assert folders.fingerprint(two) != folders.fingerprint(one)
    content = bytearray((one / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (one / "model.safetensors").write_bytes(content)
    assert folders.fingerprint(one) != folders.fingerprint(BUILTIN)


def test_experts_in_one_tensor_are_counted(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2,
        "layer_types": ["full_attention"], "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **small))
    model.save_pretrained(tmp_path / "dense")
    out = compress.run(tmp_path / "dense", [Magnitude(sites="*experts*1")], tmp_path / "pruned").out
    assert any(spec.get("expert") for spec in Artifact(out).specs.values())
    assert folders.describe(out)["parameters"] == sum(p.numel() for p in model.parameters())
