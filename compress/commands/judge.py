"""`compress judge`: has a language model behind an HTTP API grade a compressed model's answers."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands.output import Json, result, screen
from compress.errors import RecipeError

KEY = "JUDGE_API_KEY"


def judge(
    dense: Annotated[Path, typer.Argument(help="results folder of the dense model, with kick_vicuna or kick_mtbench")],
    compressed: Annotated[Path, typer.Argument(help="results folder of the compressed model; judge.json goes there")],
    judge_url: Annotated[str, typer.Option(help="OpenAI-compatible address such as http://localhost:8000/v1")],
    judge_model: Annotated[str, typer.Option(help="name of the judge there; the API key is read from JUDGE_API_KEY")],
    data_dir: Annotated[Path | None, typer.Option(help="folder of the questions, as for `compress eval`")] = None,
    online: Annotated[
        bool, typer.Option("--online", help="download questions from the hub if the folder has none")
    ] = False,
    repeats: Annotated[
        int,
        typer.Option(min=1, max=20, help="how often each question is asked; more than 1 measures the judge's noise"),
    ] = 1,
    max_calls: Annotated[int, typer.Option(min=1, help="refuse to start if more calls are needed")] = 2000,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds to wait for one reply")] = 60.0,
    as_json: Json = False,
) -> None:
    """Let a language model grade and compare open-ended answers, which have no answer key.

    Its verdicts do not count towards any headline score.
    """
    import compress

    compress.require_evals()
    from compress_evals import judge as judging
    from compress_evals.endpoint import Endpoint
    from compress_evals.results import RESULTS_FILE, load

    endpoint = Endpoint(url=judge_url, model=judge_model, key=os.environ.get(KEY) or None, timeout=timeout)
    before, after = load(dense), load(compressed)
    tasks = judging.pairs_of(before, after, data_dir, online)
    calls = sum(judging.calls_for(pairs, repeats) for pairs in tasks.values())
    if calls > max_calls:
        raise RecipeError(
            f"--max-calls: {calls} calls are needed, {max_calls} are allowed; raise --max-calls or lower --repeats"
        )
    folder = compressed.parent if compressed.name == RESULTS_FILE else compressed
    judging.check_place(folder)
    judged = {}
    with screen().status(f"asking {calls} times"):
        for name, pairs in tasks.items():
            judged[name] = judging.judge(pairs, endpoint, repeats=repeats)
    made = judging.Judgement(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        url=judge_url,
        judge=judge_model,
        repeats=repeats,
        dense=before.model.name,
        compressed=after.model.name,
        tasks=judged,
    )
    path = judging.save(made, folder)
    result({"out": str(path), **made.model_dump(mode="json", by_alias=True)}, as_json, table(made), failed(made))


def table(made: Any) -> Any:
    """A table of the scores and preferences of each task; names are untrusted, so no markup in them is interpreted."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(f"{made.compressed} against {made.dense}, judged by {made.judge}"))
    for name in ("task", "pairs", "dense", "compressed", "difference", "win / tie / loss", "shown first", "longer"):
        shown.add_column(name, justify="left" if name == "task" else "right")
    for name, task in made.tasks.items():
        change = "-" if task.delta is None else f"{task.delta:+.2f} ({task.low:+.2f} to {task.high:+.2f})"
        preferences = f"{task.wins} / {task.ties} / {task.losses}"
        shares = [percent(task.first_preferred), percent(task.longer_preferred)]
        shown.add_row(name, str(task.n), mark(task.dense), mark(task.compressed), change, preferences, *shares)
    return shown


def failed(made: Any) -> Any:
    """How many calls failed and why, and the noise of the scores."""
    from rich.text import Text

    lines = []
    for name, task in made.tasks.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in task.failures.items()) or "none"
        noise = "" if task.noise_sd is None else f"; a score repeats within {task.noise_sd:.2f} (sd)"
        unanswered = sum(task.failures.values())
        lines.append(
            f"{name}: {unanswered} of {task.calls} calls without an answer ({reasons}); {task.n - task.scored} pairs "
            f"not scored, {task.unjudged} without a preference{noise}"
        )
    return Text("\n".join(lines))


def mark(score: float | None) -> str:
    """A mean score, from 1 to 10, as text."""
    return "-" if score is None else f"{score:.2f}"


def percent(share: float | None) -> str:
    """A share of preferences in percent, as text."""
    return "-" if share is None else f"{100 * share:.0f} %"
