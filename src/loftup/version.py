"""The version, which metadata and the Hub are told."""

__version__ = "0.1.0"
