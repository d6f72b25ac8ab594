"""Checks a specification before anything is unpacked, because a few bytes can claim a matrix that no memory can hold.

Not here: whether the stored tensors fit it, which `pack.py` finds out as it reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from compress.errors import ArtifactError
from compress.weights.leaves import BOOKS
from compress.weights.masks import BY_NAME, WIDEST

Spec = dict[str, Any]
MOST = 64  # nodes of one tree; no pass makes a tenth of that
ROOM = 16  # entries that all nodes of a tree may denote together, as a multiple of those of its matrix
SMALL = 1 << 28  # or this many: a permutation of 16,384 inputs, decoded for a matrix with few outputs


def check_claims(spec: Spec, shape: tuple[int, int]) -> None:
    """Raise ArtifactError unless a specification has this shape and all its parts fit it."""
    try:
        if sum(1 for _ in nodes(spec)) > MOST:
            raise ArtifactError(f"a tree of more than {MOST} parts")
        _check(spec, shape)
        denoted = sum(prod(sides(node["shape"])) for node in nodes(spec))
        if denoted > max(ROOM * shape[0] * shape[1], SMALL):
            raise ArtifactError(
                f"its parts denote {denoted:,} entries; at most {ROOM} times those of {list(shape)} are allowed"
            )
    except KeyError as error:
        raise ArtifactError(f"the specification lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"a malformed specification: {error}") from error


def nodes(spec: Spec) -> Iterator[Spec]:
    """A specification and all those nested in it."""
    yield spec
    below = [spec[name] for name in ("left", "right", "values", "scale") if name in spec]
    for child in (*below, *spec.get("terms", ())):
        yield from nodes(child)


def _check(spec: Spec, shape: tuple[int, int]) -> None:
    rows, columns = shape
    if sides(spec["shape"]) != shape:
        raise ArtifactError(f"a {spec['kind']} of {spec['shape']} where {list(shape)} is needed")
    match spec["kind"]:
        case "sum":
            for term in spec["terms"]:
                _check(term, shape)
        case "masked":
            _check(spec["values"], shape)
            form = spec.get("mask")
            demand(0 <= whole(spec["kept"]) <= rows * columns, spec, f"{spec['kept']} entries kept")
            demand(form in (None, BY_NAME) or 1 <= whole(form) <= WIDEST, spec, f"a mask in the form {form!r}")
        case "product":
            inner = sides(spec["left"]["shape"])[1]
            demand(0 <= inner <= max(shape), spec, f"an inner size of {inner}")
            _check(spec["left"], (rows, inner))
            _check(spec["right"], (inner, columns))
        case "diagonal" | "permutation" | "hadamard":
            demand(rows == columns, spec, "two unequal sides")
        case "quantized":
            demand(1 <= whole(spec["bits"]) <= 8, spec, f"{spec['bits']} bits")
            demand(groups_fit(spec["scales"], shape), spec, f"scales of {spec['scales']}")
        case "scaled":
            demand(min(sides(spec["tile"])) >= 1, spec, f"tiles of {spec['tile']}")
        case "codebook":
            book = spec["book"]
            width = BOOKS[book].shape[1] if isinstance(book, str) else sides(book)[1]
            codes, scales = sides(spec["codes"]), sides(spec["scale"]["shape"])
            demand(codes[0] == rows and codes[1] * width == columns, spec, f"codes of {spec['codes']}")
            demand(groups_fit(scales, shape), spec, f"scales of {list(scales)}")
            _check(spec["scale"], scales)


def sides(value: Any) -> tuple[int, int]:
    """The two sides of a matrix; raises TypeError or ValueError for anything else."""
    rows, columns = (whole(n) for n in value)
    if min(rows, columns) < 0:
        raise ValueError(f"{list(value)} is not a shape")
    return rows, columns


def whole(value: Any) -> int:
    """A whole number; raises TypeError for any other type, including bool."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def groups_fit(scales: Any, shape: tuple[int, int]) -> bool:
    """Whether scales [1 or rows, groups] divide a matrix of this shape."""
    rows, groups = sides(scales)
    return rows in (1, shape[0]) and groups >= 1 and shape[1] % groups == 0


def demand(met: bool, spec: Spec, what: str) -> None:
    """Raise ArtifactError unless a condition is met."""
    if not met:
        raise ArtifactError(f"a {spec['kind']} of {spec['shape']} cannot have {what}")
