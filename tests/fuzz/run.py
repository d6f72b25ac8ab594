"""Fuzzes for a bounded time: `python tests/fuzz/run.py SECONDS [PLACE]`, which `make fuzz` calls.

It uses atheris if that is installed (the extra `fuzz`), else hypothesis. Inputs that reach new code
are kept in PLACE, in one folder per target, and the next run starts from them; a failing input is saved there as
`crash-...`.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
MEMORY = 3 << 30  # bytes that may be allocated beyond those of the process at its start
SECONDS = 20  # that one input may take


def atheris_run(name: str, seconds: int, place: Path) -> None:
    """Fuzz one target with atheris, which ends the process."""
    import atheris
    import torch  # before instrumentation, so that only this package is instrumented

    del torch
    with atheris.instrument_imports(include=["compress", "targets"]):
        import targets
    bound()
    atheris.Setup(
        [sys.argv[0], str(place), f"-max_total_time={seconds}", f"-timeout={SECONDS}", "-rss_limit_mb=6000",
            "-max_len=120",
         "-print_final_stats=1", f"-artifact_prefix={place.parent}/crash-{name}-", "-verbosity=0"],
        lambda data: targets.held(targets.TARGETS[name], data),
    )  # fmt: skip
    atheris.Fuzz()


def hypothesis_run(name: str, seconds: int, place: Path) -> None:
    """Fuzz one target with hypothesis, with new examples until the time is over; it prints what atheris would print."""
    import targets
    from hypothesis import Phase, given, seed, settings
    from hypothesis import strategies as st

    bound()
    end, done = time.monotonic() + seconds, 0

    def once(data: bytes) -> None:
        nonlocal done
        done += 1
        try:
            targets.held(targets.TARGETS[name], data)
        except BaseException:
            (place.parent / f"crash-{name}-{done}").write_bytes(data)
            raise

    round_ = 0
    while time.monotonic() < end:
        quiet = settings(max_examples=200, deadline=None, database=None, phases=[Phase.generate])
        seed(round_)(quiet(given(st.binary(max_size=120))(once)))()
        round_ += 1
    print(f"stat::number_of_executed_units: {done}")


def bound() -> None:
    """Limit the memory of this process, so that a large allocation fails from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(seconds: int, place: Path) -> int:
    """Fuzz every target in turn, each in a process of its own; returns the number of targets with a finding."""
    import targets

    engine = "atheris" if find_spec("atheris") else "hypothesis"
    share = max(1, seconds // len(targets.TARGETS))
    total = found = 0
    for name in targets.TARGETS:
        corpus = place / name
        corpus.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, __file__, engine, name, str(share), str(corpus)], capture_output=True, text=True,
                check=False
        )  # fmt: skip
        said = done.stdout + done.stderr
        (place / f"{name}.log").write_text(said, encoding="utf-8")
        counted = re.search(r"number_of_executed_units: (\d+)", said)
        executions, crashed = int(counted[1]) if counted else 0, done.returncode != 0
        kept = len(list(corpus.iterdir()))
        total, found = total + executions, found + crashed
        print(f"{name}: {executions} executions, {'a CRASH' if crashed else 'no crash'}, corpus {kept}")
        if crashed:
            print("\n".join(said.strip().splitlines()[-12:]))
    print(f"{engine}: {total} executions, {found} crashes, {share} s a target")
    return 1 if found else 0


if __name__ == "__main__":
    if sys.argv[1] in ("atheris", "hypothesis"):
        engine_run = atheris_run if sys.argv[1] == "atheris" else hypothesis_run
        engine_run(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main(int(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "out/fuzz")))
