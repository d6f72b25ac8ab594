"""Silences libraries that print to the terminal among this package's own output."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages of lm-eval and transformers below errors, and everything that is written to stderr.

    lm-eval's progress bars can only be silenced by redirecting stderr. One of the warnings of transformers is about a
    prompt that is longer than the model's context: lm-eval then cuts it, and `answers.truncated` counts it.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
