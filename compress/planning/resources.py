"""How much memory and disk a run needs at its largest, part by part, from shapes alone, and how much there is.

The peak is the largest of the moments that are looked at: embeddings and head with the probe's logits, the widest block
while it is rewritten, and what looks at the whole model before that. Where a pass has no row in costs/ its own part is
left out and the estimate says so. Shape suffixes: none, all are numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from compress.model.anatomy import Place
from compress.model.block import WIDEST
from compress.model.memory import peak_bytes, resident_bytes
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.passes.base import SitePass
from compress.planning.costs import F32, LEARNED, MEASURED, aheads, work_of
from compress.planning.costs.ahead import Ahead
from compress.planning.costs.learning import ERRORS, HIDDEN, INNER
from compress.planning.scale import Load, Sized, child_of, kept_probes, kinds_of, load_of, remembers, selects, sized
from compress.planning.sizes import SitePlan, read_together_names
from compress.recipe import Recipe
from compress.stats import Gram

CODES, CODE = 1024, 850_000  # products of different sizes that oneDNN remembers, bytes of each: measured with AMX
GROUPS = Path("/sys/fs/cgroup")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")  # files of a control group
VERSION_2 = ("memory.max", "memory.current")
PROBES = 4  # the probe's states on the disk: those of the model and of the dense one, of two blocks
STARTED = 45_000_000  # bytes a run takes beyond what this process has by now: tokenizer, texts, libraries of products


Parts = dict[str, int]


def memory_parts(
    walk: Walk, source: Checkpoint, recipe: Recipe, plans: Mapping[str, SitePlan], offload: bool = False
) -> Parts:
    """Bytes at the peak, by what they are; without the process itself."""
    size, load = sized(walk, source), load_of(walk, recipe)
    moments = [before_blocks(size, load, offload), in_block(walk, source, recipe, plans, offload)]
    for ahead, governed in aheads(recipe):
        moments.append(looking_ahead(walk, size, load, plans, ahead, governed, offload))
        kept = kept_probes(plans, ahead, governed) * load.probe * size.hidden * size.itemsize
        moments.append(compared(size, load, ahead) | {"probes sent on": kept})
    return max(moments, key=lambda parts: sum(parts.values()))


def before_blocks(size: Sized, load: Load, offload: bool) -> Parts:
    """While embeddings and head are loaded, and the probe's logits compared."""
    hidden = hidden_bytes(size, load, load.tokens * (2 if load.twins else 1), offload)
    return {"embeddings and head": size.frame, "hidden states": hidden, "logits": logits_bytes(size, load)}


def hidden_bytes(size: Sized, load: Load, tokens: int, offload: bool) -> int:
    """Hidden states of calibration tokens and of the probe, dense and not."""
    return ((load.batch if offload else tokens) + 2 * load.probe) * size.hidden * size.itemsize


def logits_bytes(size: Sized, load: Load) -> int:
    """Of the probe, twice as they are and once or more in float32."""
    return load.probe * size.vocabulary * (2 * size.itemsize + F32 if size.itemsize < F32 else 3 * F32)


def in_block(walk: Walk, source: Checkpoint, recipe: Recipe, plans: Mapping[str, SitePlan], offload: bool) -> Parts:
    """While the widest block is rewritten."""
    size, load = sized(walk, source), load_of(walk, recipe)
    own = [plans[p.site] for p in walk.anatomy.of_block(size.index) if plans[p.site].steps]
    rewritten = sum(prod(p.shape) * (size.itemsize + F32 * moves(recipe, p)) + p.held for p in own)
    statistics = max((statistics_bytes(recipe, p) for p in own), default=0)
    solving = max((solver_bytes(recipe, p) for p in own), default=0)
    stored = sum(p.bytes for p in own)
    written = stored + max((F32 * prod(p.shape) for p in own), default=0)
    beside = stored if walk.device.type == "cuda" and recorded_beside(source, recipe, offload) else 0
    learning = learning_bytes(recipe, own, size, load)
    return {
        "a block": size.block, "its rewritten weights": rewritten,
        "hidden states": hidden_bytes(size, load, load.tokens * (2 if load.twins else 1), offload),
        "what done parts gave": 0 if offload else load.tokens * size.itemsize * kept_width(walk, recipe, plans, size),
        "statistics": statistics,
        "a forward, a solver or writing": max(forward_bytes(size, load), solving, written, learning) + beside,
        "logits of the dense model": load.probe * size.vocabulary * size.itemsize if recipe.reshapes else 0,
        "products of many sizes": sizes_bytes(walk, recipe, plans, load),
    }  # fmt: skip


def moves(recipe: Recipe, plan: SitePlan) -> bool:
    """Whether a pass moves the target of those after it, which is kept in float32 until the block is done."""
    return any(kind.paired for kind in kinds_of(recipe, plan))


def forward_bytes(size: Sized, load: Load) -> int:
    """What a batch leaves on its way through a block, at its widest."""
    return max(load.batch, load.probe) * size.width * (3 * size.itemsize + 2 * F32)


def learning_bytes(recipe: Recipe, own: Sequence[SitePlan], size: Sized, load: Load) -> int:
    """What learning a block takes: a copy of it with gradients, targets, what is learned, and what a backward needs."""
    most = 0.0
    for i, step in enumerate(recipe.weight_passes):
        if step.name in LEARNED:
            learned = sum(LEARNED[step.name](step, p).nbytes for p in own if i in p.steps)
            token = size.itemsize * (HIDDEN * size.hidden + INNER * size.width) + F32 * ERRORS * size.hidden
            targets = load.tokens * size.hidden * size.itemsize
            most = max(most, 2 * size.block + learned + load.batch * token + targets)
    return int(most)


def looking_ahead(
    walk: Walk, size: Sized, load: Load, plans: Mapping[str, SitePlan], ahead: Ahead, governed: SitePass | None,
    offload: bool,
) -> Parts:  # fmt: skip
    """While the widest block is looked at before anything is rewritten: all of its inputs are measured at once."""
    names = [p.site for p in walk.anatomy.of_block(size.index)]
    own = [plans[n] for n in names if selects(governed, n)]
    widths = [plans[group[0]].shape[1] for group in read_together_names(names)]
    rewritten = max((prod(p.shape) * size.itemsize + p.held for p in own), default=0) if ahead.kept else 0
    solving = max((int(ahead.work(*p.shape).nbytes) for p in own), default=0)
    return {
        "a block": size.block, "its rewritten weights": rewritten,
        "hidden states": hidden_bytes(size, load, load.ahead, offload),
        "statistics": sum(kind.nbytes(width) for width in widths for kind in ahead.kinds),
        "probes sent on": kept_probes(plans, ahead, governed) * load.probe * size.hidden * size.itemsize,
        "a forward or a solver": max(forward_bytes(size, load), solving),
    }  # fmt: skip


def compared(size: Sized, load: Load, ahead: Ahead) -> Parts:
    """While the logits are found of what was tried, or of the model that was made beside the dense one."""
    again = 2 * F32 * load.probe * size.vocabulary * ahead.reshapes
    made = int(ahead.made(size.vocabulary, size.hidden).nbytes)  # before there are logits
    logits = logits_bytes(size, load) + again
    return {"embeddings and head": size.frame, "logits, or a tensor that is made": max(logits, made)}


def host_parts(walk: Walk, source: Checkpoint, recipe: Recipe, offload: bool = False) -> dict[str, int]:
    """Bytes of the host's memory where a GPU computes: pages of files on their way there, and states on theirs to disk.

    Hidden states are copied where a block is recorded while the next is computed.
    """
    size, load = sized(walk, source), load_of(walk, recipe)
    copies = 0
    if recorded_beside(source, recipe, offload) and load.batch:
        held = 1 << (load.batch * size.hidden * size.itemsize - 1).bit_length()  # page-locked memory comes so
        copies = -(-load.tokens // load.batch) * (2 if load.twins else 1) * held
    return {"a block": size.block, "embeddings and head": size.frame, "copies of hidden states": copies}


def recorded_beside(source: Checkpoint, recipe: Recipe, offload: bool) -> bool:
    """Whether a block is written while the next is computed, where a GPU does that; see `Job.beside_what`."""
    return type(source) is Checkpoint and not offload and recipe.delta is None


def sizes_bytes(walk: Walk, recipe: Recipe, plans: Mapping[str, SitePlan], load: Load) -> int:
    """What oneDNN keeps of products on a CPU: code for each number of rows, and each expert gets another in each batch.

    In float32 others compute, who keep nothing.
    """
    if walk.device.type != "cpu" or walk.dtype.itemsize >= F32:
        return 0
    routed = [p for i in range(len(walk.blocks)) for p in walk.anatomy.of_block(i) if p.routed]
    grams = {key_of(p) for p in routed if Gram in kinds_of(recipe, plans[p.site])}
    batches = -(-load.tokens // load.batch) if load.batch else 1  # at least the probe
    return CODE * min(CODES, batches * (len({key_of(p) for p in routed}) + len(grams)))


def key_of(place: Place) -> tuple[str, str, int | None]:
    """The product that a site is in, alone or as a part of one."""
    return place.module, place.parameter, place.expert


def disk_parts(walk: Walk, source: Checkpoint, recipe: Recipe, most: int, offload: bool) -> dict[str, int]:
    """Bytes that a run has on the disk at its largest: its tensors, at most, and what it needs to go on after a kill.

    Hidden states are written behind each block but the last, and those before them removed once they are safe.
    Offloaded ones lie there from the start.
    """
    load, blocks = load_of(walk, recipe), len(walk.blocks)
    times = min(2, max(blocks - 1, int(offload)))
    states = times * load.tokens * (2 if load.twins else 1) + PROBES * load.probe
    return {"tensors": most, "hidden states": states * sized(walk, source).hidden * walk.dtype.itemsize}


def kept_width(walk: Walk, recipe: Recipe, plans: Mapping[str, SitePlan], size: Sized) -> int:
    """Values a token that are kept of a block at most: what done children gave, and what the tail of the next reads."""
    if not remembers(recipe):
        return 0
    groups = read_together_names([p.site for p in walk.anatomy.of_block(size.index)])
    last = {child_of(walk, group[0]): plans[group[0]] for group in groups}
    reads = [plan.shape[1] if kinds_of(recipe, plan) else 0 for plan in last.values()]
    kept = [width if width <= WIDEST * size.hidden else 0 for width in reads]
    return max((i * size.hidden + width for i, width in enumerate(kept)), default=0)


def statistics_bytes(recipe: Recipe, plan: SitePlan) -> int:
    """Of the one input of a site."""
    return sum(kind.nbytes(plan.shape[1]) for kind in kinds_of(recipe, plan))


def solver_bytes(recipe: Recipe, plan: SitePlan) -> int:
    """What the passes on a site take beside its weight and statistics, and then what measuring its error does."""
    works = (work_of(recipe.weight_passes[i], plan.shape) for i in plan.steps)
    return max([MEASURED * prod(plan.shape), *(int(work.nbytes) for work in works)])


def process_bytes() -> int:
    """The size of this process now, and of what a run loads beside."""
    return resident() + STARTED


def resident() -> int:
    """Resident bytes of this process; the largest so far where the system does not say."""
    return resident_bytes() or peak_bytes()


def free_memory() -> int | None:
    """Bytes of memory that a new process can have, within all limits; None where nobody says."""
    found = [value for value in (available(), within_group(), within_limit()) if value is not None]
    return min(found) if found else None


def within_limit() -> int | None:
    """What `ulimit -v` leaves, which counts all that is mapped, used or not; None if there is no such limit."""
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    try:
        return most - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return most


def available() -> int | None:
    """What Linux counts as available."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    told = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.split()}
    return int(told["MemAvailable"]) * 1024 if "MemAvailable" in told else None


def within_group(root: Path = GROUPS, told: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the control groups leave that this process is in, each within the next; None where none has a limit."""
    try:
        lines = told.read_text().splitlines()
    except OSError:
        return None
    left = []
    for _, kinds, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if kinds and "memory" not in kinds.split(","):
            continue
        top, names = (root, VERSION_2) if not kinds else (root / "memory", VERSION_1)
        group = top / path.lstrip("/")
        left += [unused(folder, *names) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return min((room for room in left if room is not None), default=None)


def unused(group: Path, limit: str, used: str) -> int | None:
    """What a control group leaves; None if it has no limit."""
    try:
        most, now = (group / limit).read_text().strip(), (group / used).read_text().strip()
    except OSError:
        return None
    return int(most) - int(now) if most.isdigit() and int(most) < 1 << 60 else None


def video_memory(device: str) -> tuple[int, str] | None:
    """(free bytes, name) of a GPU; None for the CPU."""
    kind = torch.device(device)
    if kind.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(kind)
    return int(free), str(torch.cuda.get_device_name(kind))
