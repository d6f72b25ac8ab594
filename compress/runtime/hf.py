"""Registers the quantization method `compress` with transformers, which lets it load and save artifacts.

Importing this module registers nothing and does not import transformers. `register_when_needed` registers at once if
transformers' quantizers are already loaded, and otherwise right after they have been imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

HOOKED = "transformers.quantizers.auto"


def register() -> None:
    """Register the method with transformers; calling it again has no effect."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from compress.artifact import METHOD

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        import compress.runtime.quantizer  # noqa: F401  registers on import


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import hook that runs `register` right after any code has imported `HOOKED`."""

    def __init__(self) -> None:
        self.real: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != HOOKED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self.real, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.real.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        register()


def register_when_needed() -> None:
    """Register now if transformers' quantizers are loaded, otherwise as soon as they are."""
    if HOOKED in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
