"""Serves many fine-tunes of one base model in one batch: the base is in memory once, and each row names its tenant."""

from compress.runtime.tenants.difference import Difference
from compress.runtime.tenants.tenants import Tenants

__all__ = ["Difference", "Tenants"]
