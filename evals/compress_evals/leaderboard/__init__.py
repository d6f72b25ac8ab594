"""A leaderboard: one static site of all results below some folders, readable without a server or a network."""

from __future__ import annotations

from compress_evals.leaderboard.site import Published, publish

__all__ = ["Published", "publish"]
