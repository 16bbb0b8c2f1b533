"""Features of many pictures on one machine or many: planned, computed in parts, written once, read lazily."""

from .extract import Summary, extract
from .reader import Features, Record, open
from .settings import Settings

__all__ = ["Features", "Record", "Settings", "Summary", "extract", "open"]
