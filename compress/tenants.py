"""`load_tenants`: many fine-tunes of one base in one process, from their deltas and LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.adapters.lora import is_adapter
from compress.artifact import Artifact
from compress.errors import ArtifactError
from compress.model.source import locate

if TYPE_CHECKING:
    from compress.adapters.tenant import Base
    from compress.runtime.tenants import Difference, Tenants


def load_tenants(
    base: str | Path, deltas: Mapping[str, str | Path], budget: int | None = None, **options: Any
) -> Tenants:
    """The base model, loaded once, and its fine-tunes by name, each loaded from its folder when first needed.

    A folder holds a delta, or a LoRA adapter as PEFT saves it; a compressed base takes adapters only. `budget` limits
    the bytes of the deltas in memory; the least recently used are evicted. `options` are passed to `compress.load` for
    the base, whose smaller key-value cache, if it has one, is switched off: it would leave the tenants out. Raises
    ArtifactError for a delta of another base or an adapter that does not fit it, PlanError for one that alone exceeds
    the budget.
    """
    import compress
    from compress.runtime.tenants import Tenants

    folder = locate(base)
    read = reader(folder)
    found = {name: read(delta) for name, delta in deltas.items()}  # refused before the base is loaded
    return Tenants(compress.load(folder, **{"kv": None, **options}), found, budget, read)


def reader(base: Path) -> Callable[[str | Path], Difference]:
    """What reads the folders of deltas and adapters of a base."""
    from compress.adapters.tenant import Base

    adapted = Base(base)

    def read(folder: str | Path) -> Difference:
        path = Path(folder).expanduser()
        return adapted.difference(path) if is_adapter(path) else difference(folder, adapted)

    return read


def difference(folder: str | Path, base: Base) -> Difference:
    """The content of a delta folder, read one tensor at a time.

    Raises ArtifactError if `base` is not its base, or if it rewrites stacked experts, which cannot be served by tenant.
    """
    from compress.runtime.tenants import Difference

    path = locate(folder)
    artifact = Artifact(path, base.folder)
    experts = [site for site, spec in artifact.specs.items() if "expert" in spec]
    if experts:
        raise ArtifactError(f"{path}: {experts[0]} is one of a stack of experts, which cannot be served per tenant")
    sites = {base.parameter(f"{site}.weight").removesuffix(".weight"): site for site in artifact.specs}
    own = {base.parameter(name): name for name in artifact.changed()}
    return Difference(
        sites=tuple(sites),
        weight=lambda site: artifact.difference(sites[site]),
        form=lambda site: artifact.difference_form(sites[site]),
        names=tuple(own),
        shape=lambda name: artifact.stored_headers[own[name]].shape,
        tensor=lambda name: artifact.stored_tensor(own[name]),
        nbytes=sum(held.nbytes for held in artifact.stored_headers.values()),
    )
