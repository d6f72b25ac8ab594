"""The leaderboard: a static site of all results below some folders, which needs no server and no network."""

from __future__ import annotations

from compress_evals.leaderboard.site import Published, publish

__all__ = ["Published", "publish"]
