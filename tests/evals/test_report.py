"""Reports contain every figure, escape hostile text, and load nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from compress.errors import ArtifactError
from compress_evals.comparison import compare
from compress_evals.leaderboard.collect import Board, Entry
from compress_evals.leaderboard.facts import facts
from compress_evals.plots import forest, place_names, scatter
from compress_evals.report import (
    calibration,
    caveats,
    cut_to_fit,
    header_line,
    html,
    ignorance,
    markdown,
    silence,
    table_rows,
)
from compress_evals.results import Metric, Results
from compress_evals.stats import detectable_effect
from compress_evals.wording import size_change

HOSTILE = "<script>alert(1)</script>\"'>&|`x`"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Tags(HTMLParser):
    """Every tag and attribute name, and whether tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def dense(make_results: Callable[..., Results]) -> Results:
    return make_results("dense", {"facts_trained": [1] * 200, "facts_copy": [1] * 200}, bytes_on_disk=8_000_000)


@pytest.fixture
def versus(dense: Results, make_results: Callable[..., Results]) -> Callable[..., Results]:
    def make(name: str, lost: int, size: int = 4_000_000, recipe: str = "passes: []") -> Results:
        scores = {"facts_trained": [0] * lost + [1] * (200 - lost), "facts_copy": [1] * 200}
        result = make_results(name, scores, bytes_on_disk=size, recipe=recipe, bits_per_weight=4.25)
        return result.model_copy(update={"vs": compare(dense, result)})

    return make


def read(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_rows_are_plain_data_with_p_over_the_whole_table(dense: Results, versus: Callable[..., Results]) -> None:
    rows = table_rows([dense, versus("one", 40), versus("two", 4)])
    assert [(row.model, row.task) for row in rows] == [
        ("one", "facts_trained"), ("one", "facts_copy"), ("two", "facts_trained"), ("two", "facts_copy"),
    ]  # fmt: skip
    assert rows[0].p == pytest.approx(4 * rows[0].paired.p)
    assert rows[2].p == pytest.approx(3 * rows[2].paired.p)
    assert (rows[0].paired.verdict, rows[0].metric.value, rows[0].dense_metric.value) == ("fails", 0.8, 1.0)


def test_the_page_shows_the_figures_and_says_the_verdict_in_words(
    dense: Results, versus: Callable[..., Results]
) -> None:
    page = html([dense, versus("small", 40)])
    read(page)
    for shown in (
        "8 MB → 4 MB (−50 %)",
        "4.25",
        "−20.0",
        "40 / 0",
        "&lt;0.001",
        "fails",
        "passes: []",
        "<svg",
        "80 % power",
    ):
        assert shown in page


def test_hostile_names_and_recipes_are_text(dense: Results, versus: Callable[..., Results]) -> None:
    page = html(
        [dense, versus(HOSTILE, 40, recipe=HOSTILE), versus("other", 1, recipe="</pre><img src=x onerror=a()>")]
    )
    tags = read(page)
    assert not {"script", "img", "iframe", "link", "object"} & set(tags.seen)
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2


def test_the_page_loads_nothing(dense: Results, versus: Callable[..., Results]) -> None:
    page = html([dense, versus("small", 40)])
    assert not re.search(r"https?://|url\(|@import|<script", page)


def test_one_model_gets_no_scatter_and_several_do(dense: Results, versus: Callable[..., Results]) -> None:
    assert "Quality against size" not in html([dense, versus("one", 40)])
    page = html([dense, versus("one", 40), versus("two", 4, size=2_000_000)])
    assert "Quality against size" in page
    assert "Side by side" in page


def test_a_dense_model_alone_has_a_report(dense: Results) -> None:
    assert "What dense can do" in html([dense])
    assert "| Title of facts\\_copy | 200 | 100.0 \\[98.1, 100.0\\] |" in markdown([dense])


def test_markdown_holds_the_table_and_escapes_names(dense: Results, versus: Callable[..., Results]) -> None:
    text = markdown([dense, versus(HOSTILE, 40, recipe="a\n```\n# not a heading")])
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.startswith("| Title of facts\\_trained |")]
    assert "| 40 / 0 | \\<0.001 | ✕ fails |" in rows[0]
    assert "````yaml\na\n```\n# not a heading\n````" in text


def test_reports_need_one_dense_result_and_comparisons_with_it(
    dense: Results, versus: Callable[..., Results], make_results: Callable[..., Results]
) -> None:
    with pytest.raises(ArtifactError, match="one dense result"):
        html([versus("one", 1)])
    with pytest.raises(ArtifactError, match="one dense result"):
        html([dense, make_results("never compared", {"facts_trained": [1]})])
    with pytest.raises(ArtifactError, match="compare them first"):
        html([dense.model_copy(update={"model": dense.model.model_copy(update={"name": "another"})}), versus("one", 1)])
    with pytest.raises(ArtifactError, match="two results are called 'one'"):
        html([dense, versus("one", 1), versus("one", 2)])


def test_the_forest_plot_is_in_scale(versus: Callable[..., Results]) -> None:
    plot = forest(versus("small", 40))
    unit = (plot.ticks[-1][0] - plot.ticks[0][0]) / (len(plot.ticks) - 1)
    step = float(plot.ticks[-1][1]) - float(plot.ticks[-2][1])
    [trained, copied] = plot.whiskers
    assert trained.x - plot.zero == pytest.approx(-20 / step * unit, abs=0.2)
    assert copied.x == plot.zero
    assert trained.low < trained.x < trained.high < plot.zero
    assert plot.left <= trained.low and copied.high <= plot.width


def test_the_scatter_needs_every_size(dense: Results, versus: Callable[..., Results]) -> None:
    drawn = scatter(dense, [versus("one", 40), versus("two", 4, size=2_000_000)])
    assert drawn is not None
    assert drawn.dots[0].dense and drawn.dots[2].x < drawn.dots[1].x < drawn.dots[0].x
    assert drawn.dots[1].worst_y > drawn.dots[1].y > drawn.dots[2].y  # down is worse
    unknown = versus("one", 40)
    unknown = unknown.model_copy(update={"model": unknown.model.model_copy(update={"bytes_on_disk": None})})
    assert scatter(dense, [unknown]) is None


def test_who_answers_more_than_dense_stays_in_the_scatter(make_results: Callable[..., Results]) -> None:
    dense = make_results("dense", {"facts_trained": [1] * 100 + [0] * 100}, bytes_on_disk=8_000_000)
    better = make_results("better", {"facts_trained": [1] * 150 + [0] * 50}, bytes_on_disk=4_000_000)
    drawn = scatter(dense, [better.model_copy(update={"vs": compare(dense, better)})])
    assert drawn is not None
    assert 20 < drawn.dots[1].y < drawn.dots[0].y and drawn.dots[1].name_y > 12  # whole, and named
    assert drawn.y_ticks[-1][1] == "150 %" and drawn.y_ticks[4][0] == drawn.dots[0].y


def test_a_dense_model_that_knows_nothing_is_said(make_results: Callable[..., Results]) -> None:
    known, unknown = [1] * 200, [0] * 200
    half = make_results("m", {"facts_a": known, "facts_b": unknown})
    assert ignorance(half) == [
        "m is no better than chance in 1 of 2 tasks: there nothing can be lost, and a verdict means nothing. `facts` "
        "asks what the built-in model was taught, --suite kick real questions of any model"
    ]
    assert ignorance(make_results("m", {"facts_a": known, "facts_b": known, "facts_c": unknown})) == []
    [other] = ignorance(make_results("m", {"kick_a": unknown}))
    assert other.endswith("a verdict means nothing")


def test_a_model_that_falls_silent_is_said_to(make_results: Callable[..., Results]) -> None:
    def measured(name: str, said: float) -> Results:
        made = make_results(name, {"facts_a": [1.0] * 20, "facts_b": [1.0] * 20})
        task = made.tasks["facts_a"]
        metrics = {**task.metrics, "valid": Metric(value=said, low=said, high=said)}
        return made.model_copy(
            update={"tasks": {**made.tasks, "facts_a": task.model_copy(update={"metrics": metrics})}}
        )

    dense = measured("dense", 0.95)
    assert caveats(dense, [measured("talks", 0.86)]) == []
    [line] = caveats(dense, [measured("talks", 0.9), measured("mute", 0.17)])
    assert line == (
        "mute often gives no answer, so its scores understate what it knows: Title of facts_a (17 % of "
        "questions, dense 95 %)"
    )
    assert silence(dense, make_results("other", {"facts_a": [1.0] * 20})) == ""


def test_the_longest_title_fits_beside_its_whisker(make_results: Callable[..., Results]) -> None:
    dense, small = (make_results(name, {"facts_a": [1.0] * 20}) for name in ("dense", "small"))
    long = "Natural Questions, with the passage, " * 2
    named = {"facts_a": dense.tasks["facts_a"].model_copy(update={"title": long})}
    dense, small = (found.model_copy(update={"tasks": named}) for found in (dense, small))
    drawn = forest(small.model_copy(update={"vs": compare(dense, small)}))
    assert drawn.left >= 6.5 * len(long) and max(x for x, _ in drawn.ticks) <= drawn.width


def test_names_of_close_points_are_not_written_over_each_other() -> None:
    placed = place_names(["int4 g64", "int4 g128"], [(300.0, 50.0), (310.0, 50.0)], 980)
    assert abs(placed[0][1] - placed[1][1]) > 12 or placed[0][2] != placed[1][2]


def test_sizes_read_well() -> None:
    assert size_change(8_400_000, 3_600_000) == "8.4 MB → 3.6 MB (−57 %)"
    assert size_change(None, 1_500) == "1.5 kB"
    assert size_change(5, None) == ""
    assert size_change(None, 999_700) == "1 MB"  # and not 1e+03 kB


def test_the_calibration_is_named_with_a_short_hash(make_results: Callable[..., Results]) -> None:
    made = make_results(
        "a", {"t": [1]}, calibration={"name": "mixed", "sha256": "0123456789abcdef" * 4, "tokens": 32768}
    )
    assert calibration(made) == "name mixed, sha256 0123456789ab, tokens 32768"
    assert calibration(make_results("b", {"t": [1]})) == "none recorded"
    unfed = make_results("c", {"t": [1]}, calibration={"name": "none (data-free)", "sha256": "", "tokens": 0})
    assert calibration(unfed) == "name none (data-free)"


def test_what_was_skipped_cut_or_is_within_noise_is_said(make_results: Callable[..., Results]) -> None:
    from compress_evals.report import noise_line, speed_line
    from compress_evals.results import Noise, Skipped, Speed

    dense = make_results("dense", {"facts_trained": [1] * 400, "facts_mc": [1] * 400})
    task = dense.tasks["facts_mc"].model_copy(update={"truncated": 3})
    dense = dense.model_copy(
        update={
            "tasks": {**dense.tasks, "facts_mc": task},
            "skipped": {"kick_x": Skipped(title="X <b>", family="choice", reason="no data")},
            "noise": {"facts_mc": Noise(batch_size=32, n=200, flips=1)},
        }
    )
    small = make_results("small", {"facts_trained": [0] + [1] * 399, "facts_mc": [0] + [1] * 399})
    speed = Speed(prompt=64, new=128, runs=5, dense=10.0, compressed=20.0, ratio=2.0, low=1.9, high=2.1)
    small = small.model_copy(update={"vs": compare(dense, small, speed=speed)})
    lines = [
        "Not asked: X <b> (choice): no data",
        "Longer than the context of 512 tokens, so cut: Title of facts_mc (3 of 400)",
        "Indistinguishable from the dense model's own noise (1 of 200 answers change with the batch size): "
        "Title of facts_mc.",
        "Generates 20.0 tokens/s, dense 10.0: 2.00x (1.90 to 2.10 over 5 runs of 64 + 128 tokens).",
    ]
    assert [*caveats(dense, [small]), noise_line(dense, small), speed_line(small)] == lines
    page, text = html([dense, small]), markdown([dense, small])
    assert "X &lt;b&gt;" in page and "X <b>" not in page
    assert all(part in page for part in ("so cut: Title", "own noise (1 of 200", "20.0 tokens/s"))
    assert all(part in text for part in ("so cut: Title", "own noise (1 of 200", "20.0 tokens/s"))


def test_the_detectable_effect_counts_subjects(make_results: Callable[..., Results]) -> None:
    asked = make_results(
        "dense", {"facts_trained": [1] * 400, "facts_copy": [1] * 300}, clusters=[str(i // 2) for i in range(400)]
    )
    most = f"{100 * detectable_effect(200, 0.1):.1f} points (200 subjects)"
    fewest = f"{100 * detectable_effect(150, 0.1):.1f} points (150 subjects)"
    assert header_line(asked).endswith(f"those on one subject together: {most} to {fewest}.")
    clusters = {name: [row.cluster for row in rows] for name, rows in asked.rows.items()}
    assert header_line(asked.model_copy(update={"rows": {}}), clusters) == header_line(asked)


def test_scores_that_are_not_right_or_wrong_flip_no_answers(make_results: Callable[..., Results]) -> None:
    rouge = make_results("dense", {"facts_trained": [0.5] * 40, "facts_copy": [1] * 40})
    other = make_results("small", {"facts_trained": [0.4, 0.6] * 20, "facts_copy": [0] + [1] * 39}, recipe="passes: []")
    rows = table_rows([rouge, other.model_copy(update={"vs": compare(rouge, other)})])
    assert [row.flips for row in rows] == ["–", "1 / 0"]


def test_prompts_that_were_cut_are_said(dense: Results, versus: Callable[..., Results]) -> None:
    tasks = {
        name: task.model_copy(update={"truncated": 3 * (name == "facts_copy")}) for name, task in dense.tasks.items()
    }
    cut = dense.model_copy(update={"tasks": tasks})
    said = f"{tasks['facts_copy'].title}: 3 of 200 prompts"
    assert cut_to_fit(cut)[0].startswith(said)
    assert dict(
        facts(Board(dense=Entry(name="d", place="", results=cut, scores={}), compressed=(), clusters={}, margin=0.05))
    )["Cut to fit"].startswith(said)
    assert cut_to_fit(dense) == []
