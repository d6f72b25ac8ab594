"""One base model in memory and the differences of many fine-tunes, computed together: every row names its tenant."""

from compress.runtime.tenants.difference import Difference
from compress.runtime.tenants.tenants import Tenants

__all__ = ["Difference", "Tenants"]
