"""Writes the description of a merged folder: compress.json and the model card, from the same facts."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from compress import __version__
from compress.frontmatter import Said, agreed, lines, quoted
from compress.merging.inputs import Inputs, Member
from compress.merging.method import Method
from compress.merging.shares import Share
from compress.model.source import display_name


def provenance(
    inputs: Inputs,
    method: Method,
    shares: Mapping[str, Share],
    tally: Mapping[str, list[int]],
    how: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of compress.json without the hashes of the written files; `how` adds facts from the method."""
    members = {member.label: member for member in inputs.members}
    packages = {name: version(name) for name in ("torch", "safetensors")}
    return {
        "versions": {"compress": __version__, "python": platform.python_version(), **packages},
        "merge": {
            "method": method.name,
            "options": method.options(),
            "base": {"name": display_name(inputs.base.path), "sha256": inputs.sha256},
            "models": {label: of_model(members[label], shares[label], tally[label]) for label in inputs.order},
            "vocabulary": [member.label for member in inputs.growers],
            **how,
        },
        "sites": {},
        "tensors": {name: list(inputs.header(name).shape) for name in inputs.names()},
    }


def of_model(member: Member, share: Share, tally: list[int]) -> dict[str, Any]:
    """The record of one model: its name, hashes and weights, how many entries it had changed and how many were kept."""
    return {
        "name": display_name(member.source.path),
        "sha256": member.sha256,
        "decoded_from": member.source.decoded_from,
        "weights": dict(share.rules) or {"*": 1.0},
        "changed": tally[0],
        "kept": tally[1],
    }


def card(facts: Mapping[str, Any], cards: Sequence[tuple[str, Said]] = ()) -> str:
    """The model card of a merged folder, in Markdown; the front matter keeps what the cards of all inputs agree on."""
    merge, said = facts["merge"], agreed(told for _, told in cards)
    named = [merge["base"]["name"], *(model["name"] for model in merge["models"].values())]
    options = ", ".join(f"{key} {value}" for key, value in merge["options"].items())
    rows = [
        f"| {label} | {model['name']} | {weights_of(model)} | {model['changed']:,} | {model['kept']:,} |"
        for label, model in merge["models"].items()
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "base_model:",
            *(f"- {json.dumps(name)}" for name in dict.fromkeys(named)),
            'tags: ["compress", "merge"]',
            *lines(said),
            "---",
            f"# {' + '.join(merge['models'])}, merged",
            "",
            f"Merged from fine-tunes of `{named[0]}` by Compress {facts['versions']['compress']}, method "
            f"`{merge['method']}`{f' ({options})' if options else ''}. It is an ordinary model folder:",
            "`AutoModelForCausalLM.from_pretrained` loads it.",
            "",
            "| model | folder | weight | entries changed | of those merged |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *(
                f"Memory ran out while `{label}` was measured: at most {tokens['windows_at_once']} calibration windows "
                "went through it at once.\n"
                for label, tokens in merge.get("calibration", {}).items()
                if "windows_at_once" in tokens
            ),
            *([] if "license" in said else licences(cards)),
            "Nothing here says how well it works: run `compress eval` on the tasks that matter.",
            "",
        ]
    )


def licences(cards: Sequence[tuple[str, Said]]) -> list[str]:
    """A line that lists the licence of each card, for cards that do not agree; none if no card states a licence."""
    stated = ", ".join(f"`{name}` `{quoted(said['license'])}`" for name, said in cards if "license" in said)
    return [f"The cards of what was merged state different licences; each of them holds: {stated}.\n"] if stated else []


def weights_of(model: Mapping[str, Any]) -> str:
    """The weights of a model as the text of a table cell."""
    weights = model["weights"]
    return ", ".join(f"{weight:g}" if glob == "*" else f"{weight:g} in `{glob}`" for glob, weight in weights.items())
