"""`python -m compress_evals.sweep FOLDER`: the process of one cell; it is started by a sweep, not by users."""

from __future__ import annotations

import sys
from pathlib import Path

from compress_evals.sweep.cell import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
