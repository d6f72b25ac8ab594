"""The model card of an artifact: plain Markdown generated from its provenance, so that the two cannot disagree.

Only licence, language and use come from elsewhere: they are those that the source's card states.

Names in it may come from untrusted files. They are escaped so that none is read as Markdown, HTML or front matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from compress.errors import visible
from compress.frontmatter import Said, lines
from compress.ledger import notes
from compress.model.anatomy import by_reason

TEMPLATE = """\
---
library_name: transformers
base_model: {{ (base.name if base else source.name) | tojson }}
tags: {{ tags | tojson }}
{% for line in said -%}
{{ line }}
{% endfor -%}
---
# {{ source.name }}, compressed

Made from `{{ source.name }}` by Compress {{ versions.compress }}.
{% if base %}
It is a delta: the difference of `{{ source.name }}` from its base `{{ base.name }}`, whose tensors together have the
fingerprint `{{ base.sha256 }}`. It cannot be used without that base; any other base is refused.
Errors below are relative to the difference.
{% endif -%}
{% for step in reshaped -%}
It is {{ step.change }} ({{ step.step }}).
{% endfor -%}
All linear layers of its blocks together take {{ "%.2f" | format(sizes.bits_per_weight) }} bits per weight;
all tensors together {{ "{:,}".format(sizes.bytes) }} bytes instead of {{ "{:,}".format(sizes.source_bytes) }}.

{% if probe.tokens -%}
Calibration: {{ calibration.name }}. On {{ probe.tokens }} probe tokens the mean KL divergence to the dense model is
{{ "%.4g" | format(probe.kl) }} nats. That is not a measure of knowledge: run `compress eval` for what was lost.
{% elif adapter and not base -%}
The LoRA adapter `{{ adapter.name }}` was made part of it afterwards. Errors below and the recipe are from before; what
the adapter has regained was not measured here: run `compress eval`.
{% else -%}
Nothing was lost: its factors are stored as they were trained.
{% endif -%}

{% if calibration.windows_at_once is defined -%}
Memory ran out during the run: from then on, at most {{ calibration.windows_at_once }} calibration windows went through
a block at once, which changes rounding only.

{% endif -%}
{% if base -%}
```python
import compress

model = compress.load("this folder", base={{ ("the folder of " ~ base.name) | tojson }})
```
{% elif sites -%}
```python
import compress

model = compress.load("this folder")   # or AutoModelForCausalLM.from_pretrained after `import compress`
```
{% else -%}
It is an ordinary model folder: `AutoModelForCausalLM.from_pretrained` loads it.
{% endif %}
## Recipe

{{ recipe | fenced }}

{% if sites -%}
## Sites

{% if picture -%}
![Error and size of the sites over depth]({{ picture }})

{% endif -%}
| site | weight | bytes | weight error | output error | tokens | notes |
|---|---|---|---|---|---|---|
{% endif -%}
{% for site, row in sites.items() -%}
| {{ site }} | {{ row.weight }} | {{ "{:,}".format(row.bytes) }} | {{ "%.4f" | format(row.weight_error) }} | \
{{ "%.4f" | format(row.output_error) if row.output_error is not none else "-" }} | {{ "{:,}".format(row.tokens) }} | \
{{ row | notes | join("; ") }} |
{% endfor %}
Untouched: {{ kept }}.
{% if starved %}
Too few calibration tokens reached {{ starved }} of the experts' matrices; they were treated without statistics.
{% endif -%}
"""

EXPORTED = """\
---
{% if library -%}
library_name: {{ library }}
{% endif -%}
base_model: {{ (base.name if difference else source.name) | tojson }}
tags: {{ ["compress", format] | tojson }}
{% for line in said -%}
{{ line }}
{% endfor -%}
---
# {{ source.name }}, compressed, in the format {{ format }}

Made from `{{ source.name }}` by Compress {{ versions.compress }}, by the recipe below, and written in this format:
{{ note }}.
{% if difference %}
It is the difference of `{{ source.name }}` from its base `{{ base.name }}`, and is used beside that base.
{% elif base %}
What was compressed is its difference from `{{ base.name }}`, to which it is added again here.
{% endif %}
Nothing here says how well it works: `compress eval` on the folder it was exported from says what was lost.

## Recipe

{{ recipe | fenced }}
"""

SPECIAL = {ord(c): f"&#{ord(c)};" for c in "&<>`|[]"}


def literal(value: Any) -> Any:
    """A string escaped so that Markdown and HTML show it literally, on one line; Markup stays as it is."""
    return visible(value).translate(SPECIAL) if isinstance(value, str) and not isinstance(value, Markup) else value


def fenced(text: str) -> Markup:
    """A fenced block of YAML, whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}yaml\n{text}{fence}")


def filled(template: str, **values: Any) -> str:
    """Render a template with these values; a missing value is an error."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=literal)
    environment.filters["fenced"] = fenced
    environment.filters["notes"] = notes
    return environment.from_string(template).render(**values)


def card(provenance: Mapping[str, Any], picture: str = "", said: Said | None = None) -> str:
    """The model card of an artifact; `picture` is the name of its image file, `said` what the source's card stated.

    The card does not depend on where the artifact is stored.
    """
    weights = sorted({row["weight"].split("·")[0].split(" ")[0] for row in provenance["sites"].values()})
    reshaped = provenance.get("reshaped", [])
    tags = ["compress", *(step["step"] for step in reshaped), *weights]
    reasons = by_reason(provenance["untouched"].values())
    kept = ", ".join(f"{size:,} parameters ({reason})" for reason, size in reasons.items()) or "nothing"
    starved = sum(bool(row.get("starved")) for row in provenance["sites"].values())
    return filled(
        TEMPLATE,
        **{**provenance, "reshaped": reshaped, "base": provenance.get("base"), "adapter": provenance.get("adapter")},
        tags=tags,
        kept=kept,
        starved=starved,
        picture=picture,
        said=list(map(Markup, lines(said or {}))),
    )


def export_card(provenance: Mapping[str, Any], form: str, note: str, said: Said) -> str:
    """The model card of an artifact exported to the format `form`; `said` is what the artifact's own card stated."""
    return filled(
        EXPORTED,
        **{**provenance, "base": provenance.get("base")},
        format=form,
        difference=form == "peft",
        library={"gguf": "", "peft": "peft"}.get(form, "transformers"),
        note=note,
        said=list(map(Markup, lines(said))),
    )
