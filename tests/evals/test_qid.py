"""The scaling law of quantization-induced degradation: the specification's table, inverses, refits, and the command."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import RecipeError
from compress.cli import main
from compress.model.source import locate
from compress.survey import survey
from compress_evals.qid import PUBLISHED, Law, Point, __main__, fit, predict, read_points, refit

# k D^beta / (N^alpha P^gamma) of the published constants, worked out by hand for the specification
GOLDEN = {
    (1e9, 3e11): (3.69, 0.398, 0.082), (7e9, 3e11): (2.38, 0.256, 0.053), (7e9, 1.5e13): (18.6, 2.00, 0.411),
    (7e10, 2e12): (3.83, 0.412, 0.085), (4.05e11, 1e14): (20, 2.2, 0.445), (12e9, 1e11): (1.18, 0.127, 0.026),
}  # fmt: skip
TOKENS_FOR = {  # of 4 and 3 bits that cost .2 nats
    1e9: (1.65e12, 81e9), 7e9: (3.8e12, 187e9), 7e10: (10.3e12, 505e9), 4.05e11: (21.8e12, 1.07e12),
}  # fmt: skip
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*line: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress", "qid", *map(str, line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return call


def grid(
    law: Law, sizes: list[float], tokens: list[float], bits: list[float], noise: float = 0.0, seed: int = 0
) -> list[Point]:
    """Points of a law, with log-normal noise."""
    rng = np.random.default_rng(seed)
    return [
        Point(parameters=n, tokens=d, bits=p, degradation=law.degradation(n, d, p) * math.exp(noise * rng.normal()))
        for n in sizes for d in tokens for p in bits
    ]  # fmt: skip


OURS = Law(log_k=math.log(0.3), beta=0.4, alpha=0.3, gamma=4.0)
THEIRS = Law(log_k=math.log(0.002), beta=0.4, alpha=0.2, gamma=1.5, curve="exponential")


# -- the law ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tokens"), GOLDEN)
def test_the_law_gives_the_table_of_the_specification(size: float, tokens: float) -> None:
    for bits, want in zip((2, 3, 4), GOLDEN[size, tokens], strict=True):
        assert PUBLISHED.degradation(size, tokens, bits) == pytest.approx(want, rel=0.02)  # of 2 digits


@pytest.mark.parametrize("size", TOKENS_FOR)
def test_the_inversion_gives_the_tokens_of_the_specification(size: float) -> None:
    for bits, want in zip((4, 3), TOKENS_FOR[size], strict=True):
        assert PUBLISHED.tokens_for(0.2, size, bits) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("law", [PUBLISHED, THEIRS], ids=["power", "exponential"])
def test_more_tokens_cost_more_and_more_parameters_or_bits_less(law: Law) -> None:
    tokens = [law.degradation(1e9, d, 3) for d in (1e9, 1e10, 1e12)]
    sizes = [law.degradation(n, 1e11, 3) for n in (1e11, 1e9, 1e7)]
    bits = [law.degradation(1e9, 1e11, p) for p in (8, 4, 3.3, 2)]
    assert all(row == sorted(set(row)) for row in (tokens, sizes, bits))


@pytest.mark.parametrize("law", [PUBLISHED, THEIRS], ids=["power", "exponential"])
def test_inverses_come_back(law: Law) -> None:
    lost = law.degradation(3e9, 7e11, 2.7)
    assert law.bits_for(lost, 3e9, 7e11) == pytest.approx(2.7)
    assert law.tokens_for(lost, 3e9, 2.7) == pytest.approx(7e11)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf])
def test_what_is_no_positive_number_is_refused(bad: float) -> None:
    with pytest.raises(RecipeError, match=r"parameters: .* is not a positive number"):
        PUBLISHED.degradation(bad, 1e9, 4)
    with pytest.raises(RecipeError, match="loss: "):
        PUBLISHED.bits_for(bad, 1e9, 1e9)
    with pytest.raises(RecipeError, match="bits: "):
        PUBLISHED.tokens_for(0.2, 1e9, bad)


def test_a_law_that_runs_the_wrong_way_has_no_inverse() -> None:
    with pytest.raises(RecipeError, match="does not fall with bits"):
        replace(OURS, gamma=-1.0).bits_for(0.2, 1e9, 1e9)
    with pytest.raises(RecipeError, match="does not grow with tokens"):
        replace(OURS, beta=0.0).tokens_for(0.2, 1e9, 4)


# -- predictions -----------------------------------------------------------------------------------


def test_a_prediction_is_clamped_where_the_model_would_guess() -> None:
    found = predict(PUBLISHED, 7e9, 1.5e13, [2, 4], vocabulary=32000, dense_loss=2.0)
    assert found.ceiling == pytest.approx(math.log(32000) - 2.0)
    assert [(row.clamped, row.degradation == found.ceiling) for row in found.rows] == [(True, True), (False, False)]


def test_a_bound_that_is_not_known_is_said() -> None:
    loose, none = predict(PUBLISHED, 7e9, 1.5e13, [2], vocabulary=32000), predict(PUBLISHED, 7e9, 1.5e13, [2])
    assert loose.ceiling == pytest.approx(math.log(32000))
    assert any("clamped at ln V" in line for line in loose.caveats)
    assert none.rows[0].degradation == pytest.approx(18.6, rel=0.01)
    assert any("not clamped" in line for line in none.caveats)


def test_extrapolation_is_flagged_by_range() -> None:
    def flagged(**asked: Any) -> list[str]:
        return [line for line in predict(PUBLISHED, **asked).caveats if "extrapolated" in line]

    assert flagged(parameters=160e6, tokens=206e9, bits=[2, 4]) == []
    assert flagged(parameters=13e9, tokens=9e8, bits=[3, 8]) == [
        "extrapolated: parameters 1.3e+10; the law was fitted on 1.6e+08 to 1.2e+10",
        "extrapolated: tokens 9e+08; the law was fitted on 1e+09 to 2.06e+11",
        "extrapolated: bits 8; the law was fitted on 2 to 4",
    ]


def test_a_model_no_better_than_guessing_is_refused() -> None:
    with pytest.raises(RecipeError, match="no better than guessing"):
        predict(PUBLISHED, 7e9, 1e12, [4], vocabulary=100, dense_loss=5.0)
    with pytest.raises(RecipeError, match="--vocabulary"):
        predict(PUBLISHED, 7e9, 1e12, [4], dense_loss=2.0)


# -- fits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [OURS, THEIRS], ids=["power", "exponential"])
def test_a_law_is_recovered_from_its_own_points(law: Law) -> None:
    found = fit(grid(law, [1e8, 1e9, 4e9], [1e10, 1e11], [2, 3, 4]), law.curve)
    assert found.free == ("beta", "alpha", "gamma")
    for name in ("log_k", "beta", "alpha", "gamma"):
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), abs=1e-8)
        assert name == "log_k" or found.intervals[name] == pytest.approx((getattr(law, name),) * 2, abs=1e-6)
    assert found.held_out == pytest.approx(0, abs=1e-9)


def test_the_right_law_predicts_what_was_held_out_better() -> None:
    compared = refit(grid(THEIRS, [1e8, 1e9], [1e10, 1e11], [2, 3, 4, 5], noise=0.05))
    assert compared.exponential is not None
    assert compared.exponential.held_out is not None and compared.power.held_out is not None
    assert compared.exponential.held_out < 0.1 < compared.power.held_out


def test_held_out_errors_are_those_of_refits_without_the_point() -> None:
    points = grid(OURS, [1e8, 1e9, 4e9], [1e10, 1e11], [2, 3, 4], noise=0.3)
    errors = []
    for i, point in enumerate(points):
        law = fit(points[:i] + points[i + 1 :], iters=1).law
        predicted = law.degradation(point.parameters, point.tokens, point.bits)
        errors.append(math.log(predicted / point.degradation))
    assert fit(points, iters=1).held_out == pytest.approx(math.sqrt(np.mean(np.square(errors))))


def test_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    fits = [fit(grid(OURS, [1e8, 1e9], [1e10, 1e11], [2, 3, 4] * 4, 0.2, seed=i), iters=400) for i in range(60)]
    held = [low < getattr(OURS, name) < high for found in fits for name, (low, high) in found.intervals.items()]
    assert len(held) == 180
    assert 0.88 < np.mean(held) < 1  # .95 +- .05: three standard errors, and that 48 points make them a little narrow


def test_intervals_shrink_with_points() -> None:
    few, many = (fit(grid(OURS, [1e8, 1e9], [1e10, 1e11], [2, 3, 4] * n, noise=0.2)).intervals for n in (1, 16))
    assert all(many[name][1] - many[name][0] < (few[name][1] - few[name][0]) / 2 for name in few)


def test_one_point_moves_the_factor_alone() -> None:
    found = fit([Point(parameters=8e9, tokens=1.5e13, bits=4, degradation=0.1)])
    assert (found.free, found.intervals, found.held_out) == ((), {}, None)
    assert replace(found.law, log_k=PUBLISHED.log_k, ranges=PUBLISHED.ranges) == PUBLISHED
    assert found.law.degradation(8e9, 1.5e13, 4) == pytest.approx(0.1)


def test_one_model_identifies_the_bits_only() -> None:
    found = fit(grid(OURS, [1e8], [1e10], [2, 3, 4]))
    assert found.free == ("gamma",)
    assert (found.law.beta, found.law.alpha) == (PUBLISHED.beta, PUBLISHED.alpha)
    assert found.law.gamma == pytest.approx(OURS.gamma)
    assert found.law.degradation(1e8, 1e10, 2.5) == pytest.approx(OURS.degradation(1e8, 1e10, 2.5))


def test_noise_and_saturation_are_dropped() -> None:
    outside = [Point(parameters=1e8, tokens=1e10, bits=p, degradation=q) for p, q in ((8, 0.0029), (1, 2.1), (6, -1))]
    clean = grid(OURS, [1e8], [1e10], [2, 3, 4])
    found = fit([*outside, *clean])
    assert (found.used, found.dropped) == (3, 3)
    assert found.law == fit(clean).law


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([], "no point between"),
        ([Point(parameters=1, tokens=1, bits=8, degradation=0.0)], "no point between"),
        (grid(OURS, [1e8], [1e10], [2, 3]), "2 usable points for k and 1 exponents, as bits vary; need 3"),
        (grid(OURS, [1e8, 1e9], [1e10, 1e11], [2, 3, 4])[:7], "need 8"),
        ([p for n in (1e8, 1e9) for p in grid(OURS, [n], [20 * n], [2, 3, 4, 5])], "are collinear"),
        (grid(replace(OURS, log_k=-9.0, gamma=-2.0), [1e8], [1e10], [2, 3, 4]), "does not fall with bits"),
    ],
)
def test_what_the_points_do_not_identify_is_refused(points: list[Point], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        fit(points)


def test_without_bits_that_vary_there_is_no_exponential_law() -> None:
    compared = refit(grid(OURS, [1e8], [1e10, 1e11, 1e12], [3]))
    assert compared.power.free == ("beta",)
    assert compared.exponential is None


# -- files -----------------------------------------------------------------------------------------


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_a_file_may_say_losses_in_three_ways(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "rows.jsonl",
        {"bits": 4, "parameters": 2e8, "tokens": 3e9, "degradation": 0.5, "method": "x"},
        {"bits": 4, "loss": 3.5, "dense_loss": 3.0},
        {"bits": 4, "loss": [8.0, 7.0], "dense_loss": [7.0, 6.0], "tokens": 4},
    )
    points, key = read_points(path, 1e8, 1e9)
    assert key == "bits"
    assert [p.degradation for p in points] == [0.5, 0.5, 0.5]
    assert [(p.parameters, p.tokens) for p in points] == [(2e8, 3e9), (1e8, 1e9), (1e8, 1e9)]


def test_bits_a_weight_are_used_only_if_every_line_has_them(tmp_path: Path) -> None:
    row = {"bits": 4, "bits_per_weight": 4.3, "degradation": 0.1}
    both, one = lines(tmp_path / "a", row, row), lines(tmp_path / "b", row, {"bits": 4, "degradation": 0.1})
    assert [(read_points(p, 1e8, 1e9)[0][0].bits, read_points(p, 1e8, 1e9)[1]) for p in (both, one)] == [
        (4.3, "bits_per_weight"), (4, "bits"),
    ]  # fmt: skip


BAD = {
    "not JSON": ("{", ":1: not JSON"),
    "a list": ("[1]", ":1: not a JSON object"),
    "nothing": ("\n", "holds no line"),
    "no bits": ('{"degradation": 0.1}', "needs `bits_per_weight`"),
    "no loss": ('{"bits": 4}', ":1: no `degradation`"),
    "NaN": ('{"bits": 4, "degradation": NaN}', ":1: no `degradation`"),
    "zero bits": ('{"bits": 0, "degradation": 0.1, "parameters": 1e9, "tokens": 1e9}', ":1: no positive bits"),
    "no tokens": ('{"bits": 4, "degradation": 0.1, "parameters": 1e9}', ":1: no positive tokens"),
    "sums without tokens": ('{"bits": 4, "loss": [1], "dense_loss": [0]}', ":1: no `degradation`"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_one_line_of_error(name: str, cli: Cli, tmp_path: Path) -> None:
    text, reason = BAD[name]
    (tmp_path / "rows.jsonl").write_text(text)
    code, out, err = cli("--fit", tmp_path / "rows.jsonl")
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert reason in err


# -- the command -----------------------------------------------------------------------------------


def test_the_command_predicts_for_a_folder(cli: Cli) -> None:
    code, out, _ = cli("builtin", "--tokens", 1e7, "--json")
    found = json.loads(out)
    per_block = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 768 * 256 + 2 * 256  # attention, keys and values, inner, norms
    assert code == 0
    assert found["parameters"] == 4 * per_block + 256
    assert found["ceiling"] == pytest.approx(math.log(4096))
    assert [row["bits"] for row in found["rows"]] == [2, 3, 4, 8]


def test_the_command_prints_a_table_and_its_doubts(cli: Cli) -> None:
    code, out, _ = cli("--params", 7e9, "--tokens", 1.5e13, "--bits", "2,4", "--vocabulary", 32000, "--dense-loss", 2)
    assert code == 0
    assert "8.37 (clamped)" in out  # ln 32000 - 2
    assert "0.2 nats need 4.56 bits: 5" in out  # (.017 D^beta / (.2 N^alpha))^(1/gamma)
    assert "extrapolated: tokens 1.5e+13" in out
    assert "group size" in out


def test_the_command_refits_and_predicts_by_the_new_law(cli: Cli, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"bits": 4, "degradation": 0.1, "parameters": 7e9, "tokens": 1.5e13})
    code, out, _ = cli("--fit", path, "--params", 7e9, "--tokens", 1.5e13, "--bits", "4", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["rows"][0]["degradation"] == pytest.approx(0.1)
    assert found["fit"]["power"]["free"] == []
    assert "beta not identified, kept at 0.5251" in cli("--fit", path)[1]


def test_the_command_shows_both_laws(cli: Cli, tmp_path: Path) -> None:
    points = grid(OURS, [1e8, 1e9], [1e10, 1e11], [2, 3, 4], noise=0.1)
    code, out, _ = cli("--fit", lines(tmp_path / "rows.jsonl", *(vars(p) for p in points)))
    assert code == 0
    assert "fitted on 12 points, 0 dropped; bits are read from `bits`" in out
    assert "power law: k " in out and "exponential in bits: k " in out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ((), "needs a model folder or --params, and --tokens"),
        (("--params", "7e9"), "and --tokens"),
        (("builtin", "--params", "7e9", "--tokens", "1e9"), "give only one of the two"),
        (("--params", "-1", "--tokens", "1e9"), "--params: -1.0 is not a positive number"),
        (("--params", "1e9", "--tokens", "nan"), "--tokens: nan is not"),
        (("--params", "1e9", "--tokens", "1e9", "--bits", "2,x"), "--bits: '2,x'"),
        (("--params", "1e9", "--tokens", "1e9", "--loss", "0"), "--loss: 0.0 is not"),
        (("--fit", "/nowhere"), "--fit: /nowhere cannot be read: No such file or directory\n"),
        (("/nowhere", "--tokens", "1e9"), "no model folder"),
    ],
)
def test_the_command_refuses_in_one_line(line: tuple[str, ...], reason: str, cli: Cli) -> None:
    code, out, err = cli(*line)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert reason in err


@pytest.mark.parametrize("line", [("builtin",), ("builtin", "--tokens", "1e9", "--bits", "x")])
def test_no_header_is_read_for_what_is_refused(
    line: tuple[str, ...], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.survey.survey", lambda folder: pytest.fail("the model was opened"))
    assert cli(*line)[0] == 2


def test_parameters_leave_out_embedding_and_head(tiny_llama: Path) -> None:
    found = survey(tiny_llama)
    assert found["non_embedding"] == sum(row["parameters"] for row in found["sites"]) + (2 * 2 + 1) * 48  # norms
    assert found["vocabulary"] == 211


@pytest.mark.slow
def test_the_sweep_writes_what_the_fit_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["qid", "builtin=1e7", "--bits", "2", "--groups", "64", "--out", str(tmp_path)])
    monkeypatch.setattr(__main__, "CALIBRATION", replace(__main__.CALIBRATION, samples=8))
    __main__.main()
    (point,), key = read_points(tmp_path / "rows.jsonl")
    assert (point.parameters, point.tokens, key) == (survey(locate("builtin"))["non_embedding"], 1e7, "bits_per_weight")
    assert point.bits == 2 + (16 + 2) / 64  # a scale and a zero for each 64
    assert f"{point.degradation:.4f} ({point.bits:.2f})" in capsys.readouterr().out
    assert fit([point]).law.degradation(point.parameters, point.tokens, point.bits) == pytest.approx(point.degradation)
