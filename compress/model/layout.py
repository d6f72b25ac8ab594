"""How the tensors of a checkpoint become the parameters of a model.

A file may use other tensor names than the model, omit the model's prefix, or hold many small matrices where the model
has one stack of experts. transformers has the rules for every family and applies them when it loads a model. This
module queries those rules for each name, so that a block can be read alone and a result written back under the file's
names. If the rule is a stack or a concatenation, each tensor's place is known and a pass may rewrite it; any other
conversion is run as it is, and its tensors pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of a file's tensor in the model: a whole parameter, or rows of an expert in a stack [experts, out, in].

    A stack that is `turned` is stored in the file with its last two axes swapped.
    """

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    turned: bool = False


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion of transformers that makes `first`, and other parameters, from the tensors `sources`."""

    converter: Any
    first: str
    sources: list[tuple[str, str]]  # (pattern, tensor of the file), in order


@dataclass
class Layout:
    """The slot of every tensor of a file; tensors `unknown` to the architecture pass through unchanged.

    Without `shapes`, the tensors are the model's own, for a model that is in memory.
    """

    model: Any
    shapes: Mapping[str, Shape] | None = None
    slots: dict[str, Slot] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        state = self.model.state_dict()
        self.wanted = {name: tuple(t.shape) for name, t in state.items()}
        self.dtypes = {name: t.dtype for name, t in state.items()}
        self.parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        if self.shapes is None:
            self.shapes = self.wanted
            self.slots = {name: Slot(parameter=name) for name in self.wanted}
        else:
            self._read_rules(self.shapes)
        self.sources: dict[str, list[str]] = {}
        for name, slot in self.slots.items():
            self.sources.setdefault(slot.parameter, []).append(name)
        for conversion in self.conversions:
            for target in self._targets(conversion):
                self.sources[target] = [name for _, name in conversion.sources]

    # -- reading the rules -------------------------------------------------------------------------

    def _read_rules(self, shapes: Mapping[str, Shape]) -> None:
        """Ask transformers for the parameter of each tensor name, and record it as a slot, a conversion or unknown."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = self.model.base_model_prefix
        merged: dict[str, list[tuple[str, str]]] = {}
        for name in sorted(shapes, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.wanted)
            if target not in self.wanted and name in self.wanted:
                target, pattern = name, None
            if target not in self.wanted:
                self.unknown.append(name)
            elif pattern is None:
                self.slots[name] = Slot(parameter=target)
            else:
                merged.setdefault(target, []).append((pattern, name))
        for target, sources in merged.items():
            self._place(target, of_pattern[sources[0][0]], sources, shapes)

    def _place(self, target: str, converter: Any, sources: list[tuple[str, str]], shapes: Mapping[str, Shape]) -> None:
        """Give each source tensor of a converter its slot, or record the conversion as a whole."""
        kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        parts = {p: [name for pattern, name in sources if pattern == p] for p in converter.source_patterns}
        if kinds == [("Transpose", None)] and len(sources) == 1 and len(self.wanted[target]) == 3:
            name = sources[0][1]  # transposed unless the shapes are equal, which is how transformers decides
            self.slots[name] = Slot(parameter=target, turned=tuple(shapes[name]) != self.wanted[target])
            return
        stacked = kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
        if not stacked or not all(parts.values()):
            self.conversions.append(Conversion(converter=converter, first=target, sources=sources))
            return
        start = 0
        for names in parts.values():
            height = shapes[names[0]][0]
            rows = (start, start + height) if len(parts) > 1 else None
            for expert, name in enumerate(names):
                self.slots[name] = Slot(parameter=target, expert=expert, rows=rows)
            start += height

    def _targets(self, conversion: Conversion) -> list[str]:
        """All parameters that a conversion makes."""
        first, *others = conversion.converter.target_patterns
        return [conversion.first, *(conversion.first.replace(first, other, 1) for other in others)]

    # -- checking ----------------------------------------------------------------------------------

    def held(self, parameter: str) -> str | None:
        """The parameter under which the file holds this one: itself, or one tied to it; None if it holds neither."""
        first = self.tied.get(parameter, parameter)
        same = [parameter, first, *(name for name, of in self.tied.items() if of == first)]
        return next((name for name in same if name in self.sources), None)

    def check(self) -> None:
        """Raise ArtifactError for the first parameter that the file lacks, holds twice, or holds in another shape."""
        for name in sorted(self.parameters):
            if (held := self.held(name)) is None:
                raise ArtifactError(f"{name} is missing; the config implies {self.wanted[name]}")
            alone = [s for s in self.sources[held] if s in self.slots and self.slots[s].expert is None]
            if len(alone) > 1:
                raise ArtifactError(f"{alone[0]} and {alone[1]} both map to {held}; remove one of them")
            for source in self.sources[held]:
                expected, found = self._expected(source, self.wanted[held]), self.shape(source)
                if expected is not None and found != expected:
                    raise ArtifactError(f"{source} has shape {found}; the config implies {expected}")
            self._check_stack(held)

    def shape(self, source: str) -> Shape:
        """The shape of a tensor in the file."""
        return (self.shapes or {})[source]

    def _expected(self, source: str, shape: Shape) -> Shape | None:
        """The shape that a tensor of the file must have; None if a conversion reads it."""
        slot = self.slots.get(source)
        if slot is None:
            return None
        if slot.expert is None:
            return (*shape[:-2], shape[-1], shape[-2]) if slot.turned else shape
        return (slot.rows[1] - slot.rows[0] if slot.rows else shape[1], *shape[2:])

    def _check_stack(self, parameter: str) -> None:
        """Raise ArtifactError if the file does not hold all matrices and rows of a stack of experts."""
        slots = [self.slots[s] for s in self.sources[parameter] if s in self.slots]
        if not slots or slots[0].expert is None:
            return
        experts, height = self.wanted[parameter][:2]
        kinds: dict[tuple[int, int] | None, int] = {}
        for slot in slots:
            kinds[slot.rows] = kinds.get(slot.rows, 0) + 1
        covered = sum(rows[1] - rows[0] for rows in kinds if rows) or height
        if any(count != experts for count in kinds.values()) or covered != height:
            counts = ", ".join(str(count) for count in kinds.values())
            raise ArtifactError(
                f"{parameter}: the files hold {counts} matrices of {covered} rows in all; "
                f"the config implies {experts} experts of {height} rows"
            )

    # -- loading -----------------------------------------------------------------------------------

    def state(self, parameters: Iterable[str], read: Callable[[str, str], Tensor]) -> dict[str, Tensor]:
        """The parameters, made from the file's tensors; `read(tensor, parameter)` returns one in the parameter's dtype.

        A parameter that the file does not hold is left out.
        """
        made: dict[str, Tensor] = {}
        for parameter in parameters:
            held = self.held(parameter)
            if parameter in made or held is None:
                continue
            sources = self.sources[held]
            if sources[0] not in self.slots:
                made |= self._convert(held, read)
            elif self.slots[sources[0]].expert is None:
                whole = read(sources[0], held)
                made[parameter] = whole.mT.contiguous() if self.slots[sources[0]].turned else whole
            else:
                made[parameter] = self._stack(held, read)
        return made

    def _stack(self, parameter: str, read: Callable[[str, str], Tensor]) -> Tensor:
        """A stack of experts, filled one matrix at a time."""
        stack: Tensor | None = None
        for source in self.sources[parameter]:
            part, slot = read(source, parameter), self.slots[source]
            if stack is None:
                stack = torch.empty(self.wanted[parameter], dtype=part.dtype, device=part.device)
            view = stack[slot.expert]
            (view if slot.rows is None else view[slot.rows[0] : slot.rows[1]]).copy_(part)
        return torch.empty(self.wanted[parameter]) if stack is None else stack

    def _convert(self, parameter: str, read: Callable[[str, str], Tensor]) -> dict[str, Tensor]:
        """The parameters that the conversion which makes `parameter` gives, by name."""
        found = next(c for c in self.conversions if parameter in self._targets(c))
        converter = deepcopy(found.converter)
        for pattern, source in found.sources:
            converter.add_tensor(found.first, source, pattern, read(source, parameter))
        made = converter.convert(found.first, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
