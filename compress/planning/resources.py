"""The memory and disk space that a run needs at its peak, by part and from shapes alone, and how much is available.

The peak is the largest of these moments: embeddings and head are loaded and the probe's logits compared; the largest
block is rewritten; a pass examines the whole model before that. What a pass without a row in costs/ needs itself is
left out, and the plan says so. Shape suffixes: none, all are numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from compress.model.anatomy import Place
from compress.model.block import TOGETHER, WIDEST
from compress.model.memory import peak_bytes, resident_bytes
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.passes.base import SitePass
from compress.planning.costs import F32, LEARNED, MEASURED, aheads, work_of
from compress.planning.costs.ahead import Ahead
from compress.planning.costs.learning import ERRORS, HIDDEN, INNER
from compress.planning.scale import Load, Sized, child_of, kept_probes, kinds_of, load_of, remembers, selects, sized
from compress.planning.sizes import SitePlan, measured_together, read_together_names
from compress.recipe import Recipe
from compress.stats import Gram

CODES, CODE = 1024, 850_000  # kernels that oneDNN caches at most, bytes of each: measured with AMX
GROUPS = Path("/sys/fs/cgroup")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")  # a control group's limit and usage
VERSION_2 = ("memory.max", "memory.current")
PROBES = 4  # the probe's states on disk: of the compressed and of the dense model, after two blocks each
STARTED = 45_000_000  # bytes that a run takes beyond what this process has by now: tokenizer, texts, matrix libraries


Parts = dict[str, int]


def memory_parts(
    walk: Walk, source: Checkpoint, recipe: Recipe, plans: Mapping[str, SitePlan], offload: bool = False
) -> Parts:
    """Bytes of memory at the peak, by part, without the process itself."""
    size, load = sized(walk, source), load_of(walk, recipe)
    moments = [before_blocks(size, load, offload), in_block(walk, source, recipe, plans, offload)]
    for ahead, governed in aheads(recipe):
        moments.append(looking_ahead(walk, size, load, plans, ahead, governed, offload))
        kept = kept_probes(plans, ahead, governed) * load.probe * size.hidden * size.itemsize
        moments.append(compared(size, load, ahead) | {"probe states of the trials": kept})
    return max(moments, key=lambda parts: sum(parts.values()))


def before_blocks(size: Sized, load: Load, offload: bool) -> Parts:
    """The parts while embeddings and head are loaded and the probe's logits are compared."""
    hidden = hidden_bytes(size, load, load.tokens * (2 if load.twins else 1), offload)
    return {"embeddings and head": size.frame, "hidden states": hidden, "logits": logits_bytes(size, load)}


def hidden_bytes(size: Sized, load: Load, tokens: int, offload: bool) -> int:
    """Bytes of the hidden states of `tokens`, or of one batch with `offload`, and of the probe in both models."""
    return ((load.batch if offload else tokens) + 2 * load.probe) * size.hidden * size.itemsize


def logits_bytes(size: Sized, load: Load) -> int:
    """Bytes of the probe's logits: two copies in the model's dtype and one in float32; three if that is the dtype."""
    return load.probe * size.vocabulary * (2 * size.itemsize + F32 if size.itemsize < F32 else 3 * F32)


def in_block(walk: Walk, source: Checkpoint, recipe: Recipe, plans: Mapping[str, SitePlan], offload: bool) -> Parts:
    """The parts while the largest block is rewritten."""
    size, load = sized(walk, source), load_of(walk, recipe)
    own = [plans[p.site] for p in walk.anatomy.of_block(size.index) if plans[p.site].steps]
    rewritten = sum(prod(p.shape) * (size.itemsize + F32 * moves(recipe, p)) + p.held for p in own)
    statistics = held_together(walk, recipe, {p.site: statistics_bytes(recipe, p) for p in own})
    solving = max((solver_bytes(recipe, p) for p in own), default=0)
    stored = sum(p.bytes for p in own)
    written = stored + max((F32 * prod(p.shape) for p in own), default=0)
    beside = stored if walk.device.type == "cuda" and recorded_beside(source, recipe, offload) else 0
    largest = max(forward_bytes(size, load), solving, written, learning_bytes(recipe, own, size, load))
    cached = 0 if offload else load.tokens * size.itemsize * kept_width(walk, recipe, plans, size)
    return {
        "one block": size.block, "rewritten weights of the block": rewritten,
        "hidden states": hidden_bytes(size, load, load.tokens * (2 if load.twins else 1), offload),
        "cached outputs of finished submodules": cached,
        "statistics": statistics,
        "largest of forward pass, solver, training and writing": largest + beside,
        "logits of the dense model": load.probe * size.vocabulary * size.itemsize if recipe.reshapes else 0,
        "kernels cached by oneDNN": sizes_bytes(walk, recipe, plans, load),
    }  # fmt: skip


def held_together(walk: Walk, recipe: Recipe, bytes_of: Mapping[str, int]) -> int:
    """The most bytes of statistics held at once: of one input, of independent experts, or of a block's inputs."""
    stages = [
        [max(bytes_of[name] for name in group) for group in stage] for stage in measured_together(walk, list(bytes_of))
    ]
    if recipe.ordering != "site":
        return sum(map(sum, stages))
    return max((min(sum(stage), max(TOGETHER, *stage)) for stage in stages), default=0)


def moves(recipe: Recipe, plan: SitePlan) -> bool:
    """Whether a pass on this site replaces the target of later ones, which stays in float32 until the block is done."""
    return any(kind.paired for kind in kinds_of(recipe, plan))


def forward_bytes(size: Sized, load: Load) -> int:
    """Bytes of the activations of one batch inside a block, where they are widest."""
    return max(load.batch, load.probe) * size.width * (3 * size.itemsize + 2 * F32)


def learning_bytes(recipe: Recipe, own: Sequence[SitePlan], size: Sized, load: Load) -> int:
    """Bytes that learning a block takes: a copy with gradients, targets, what is learned, activations kept."""
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
    """The parts while a pass examines the largest block before the walk, with statistics of all its inputs at once."""
    names = [p.site for p in walk.anatomy.of_block(size.index)]
    own = [plans[n] for n in names if selects(governed, n)]
    widths = [plans[group[0]].shape[1] for group in read_together_names(names)]
    rewritten = max((prod(p.shape) * size.itemsize + p.held for p in own), default=0) if ahead.kept else 0
    solving = max((int(ahead.work(*p.shape).nbytes) for p in own), default=0)
    return {
        "one block": size.block, "rewritten weights of the block": rewritten,
        "hidden states": hidden_bytes(size, load, load.ahead, offload),
        "statistics": sum(kind.nbytes(width) for width in widths for kind in ahead.kinds),
        "probe states of the trials": kept_probes(plans, ahead, governed) * load.probe * size.hidden * size.itemsize,
        "larger of forward pass and solver": max(forward_bytes(size, load), solving),
    }  # fmt: skip


def compared(size: Sized, load: Load, ahead: Ahead) -> Parts:
    """The parts while logits are computed: of each trial, or of a reshaped model beside those of the dense one."""
    again = 2 * F32 * load.probe * size.vocabulary * ahead.reshapes
    made = int(ahead.made(size.vocabulary, size.hidden).nbytes)  # at another time than the logits
    logits = logits_bytes(size, load) + again
    return {"embeddings and head": size.frame, "larger of logits and one reshaped tensor": max(logits, made)}


def host_parts(walk: Walk, source: Checkpoint, recipe: Recipe, offload: bool = False) -> dict[str, int]:
    """Bytes of host memory where a GPU computes: pages of files being loaded, and hidden states on their way to disk.

    Hidden states are copied to the host only if a block is recorded while the next one is computed.
    """
    size, load = sized(walk, source), load_of(walk, recipe)
    copies = 0
    if recorded_beside(source, recipe, offload) and load.batch:
        held = 1 << (load.batch * size.hidden * size.itemsize - 1).bit_length()  # page-locked: a power of two
        copies = -(-load.tokens // load.batch) * (2 if load.twins else 1) * held
    return {"one block": size.block, "embeddings and head": size.frame, "page-locked copies of hidden states": copies}


def recorded_beside(source: Checkpoint, recipe: Recipe, offload: bool) -> bool:
    """Whether a block is written to disk while a GPU computes the next one; see `Job.beside_what`."""
    return type(source) is Checkpoint and not offload and recipe.delta is None


def sizes_bytes(walk: Walk, recipe: Recipe, plans: Mapping[str, SitePlan], load: Load) -> int:
    """Bytes of the kernels that oneDNN caches on a CPU: one for each product and number of rows.

    This counts for experts, which receive a different number of rows in each batch. Float32 products are computed by
    other libraries, which cache nothing.
    """
    if walk.device.type != "cpu" or walk.dtype.itemsize >= F32:
        return 0
    routed = [p for i in range(len(walk.blocks)) for p in walk.anatomy.of_block(i) if p.routed]
    grams = {key_of(p) for p in routed if Gram in kinds_of(recipe, plans[p.site])}
    batches = -(-load.tokens // load.batch) if load.batch else 1  # at least the probe
    return CODE * min(CODES, batches * (len({key_of(p) for p in routed}) + len(grams)))


def key_of(place: Place) -> tuple[str, str, int | None]:
    """A key of the product that computes a site; sites that are parts of one product share it."""
    return place.module, place.parameter, place.expert


def disk_parts(walk: Walk, source: Checkpoint, recipe: Recipe, most: int, offload: bool) -> dict[str, int]:
    """The most bytes that a run takes on disk: its tensors, and the hidden states from which a killed run resumes.

    Hidden states are written after every block but the last, and the previous ones are deleted once the new ones are
    safe, so two sets exist for a time. Offloaded states are on disk from the start.
    """
    load, blocks = load_of(walk, recipe), len(walk.blocks)
    times = min(2, max(blocks - 1, int(offload)))
    states = times * load.tokens * (2 if load.twins else 1) + PROBES * load.probe
    return {"tensors": most, "hidden states": states * sized(walk, source).hidden * walk.dtype.itemsize}


def kept_width(walk: Walk, recipe: Recipe, plans: Mapping[str, SitePlan], size: Sized) -> int:
    """The most values cached per token of a block: outputs of finished children, input of the next's last matrix."""
    if not remembers(recipe):
        return 0
    groups = read_together_names([p.site for p in walk.anatomy.of_block(size.index)])
    last = {child_of(walk, group[0]): plans[group[0]] for group in groups}
    reads = [plan.shape[1] if kinds_of(recipe, plan) else 0 for plan in last.values()]
    kept = [width if width <= WIDEST * size.hidden else 0 for width in reads]
    return max((i * size.hidden + width for i, width in enumerate(kept)), default=0)


def statistics_bytes(recipe: Recipe, plan: SitePlan) -> int:
    """Bytes of the statistics of a site's input."""
    return sum(kind.nbytes(plan.shape[1]) for kind in kinds_of(recipe, plan))


def solver_bytes(recipe: Recipe, plan: SitePlan) -> int:
    """Bytes beside its weight and statistics that the passes on a site, or measuring its error, take at most."""
    works = (work_of(recipe.weight_passes[i], plan.shape) for i in plan.steps)
    return max([MEASURED * prod(plan.shape), *(int(work.nbytes) for work in works)])


def process_bytes() -> int:
    """Resident bytes of this process now, plus what a run loads in addition."""
    return resident() + STARTED


def resident() -> int:
    """Resident bytes of this process; their peak so far if the system does not report the current number."""
    return resident_bytes() or peak_bytes()


def free_memory() -> int | None:
    """Bytes of memory that a new process can get within all limits; None if no source reports any."""
    found = [value for value in (available(), within_group(), within_limit()) if value is not None]
    return min(found) if found else None


def within_limit() -> int | None:
    """Bytes left of `ulimit -v`, which counts all mapped memory, used or not; None if there is no such limit."""
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    try:
        return most - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return most


def available() -> int | None:
    """Bytes that Linux reports as available; None if it does not."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    told = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.split()}
    return int(told["MemAvailable"]) * 1024 if "MemAvailable" in told else None


def within_group(root: Path = GROUPS, told: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left in the nested control groups of this process, the least of all; None if none has a limit."""
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
    """Bytes left in a control group, those of cached files included, which the kernel gives back; None: no limit."""
    try:
        most, now = (group / limit).read_text().strip(), (group / used).read_text().strip()
    except OSError:
        return None
    return int(most) - max(0, int(now) - cached(group)) if most.isdigit() and int(most) < 1 << 60 else None


def cached(group: Path) -> int:
    """Bytes of files in the page cache that a control group is charged for; 0 if it does not report them."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
    total = "total_" if "total_inactive_file" in counts else ""  # version 1 counts the groups below apart
    return sum(counts.get(f"{total}{kind}_file", 0) for kind in ("inactive", "active"))


def video_memory(device: str) -> tuple[int, str] | None:
    """(free bytes, name) of a GPU; None for the CPU."""
    kind = torch.device(device)
    if kind.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(kind)
    return int(free), str(torch.cuda.get_device_name(kind))
