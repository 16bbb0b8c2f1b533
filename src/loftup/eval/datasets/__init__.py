"""Readers of the datasets' real layouts, by name."""

from .base import (
    CorrespondenceSample,
    Dataset,
    GeometrySample,
    InteractiveSample,
    Samples,
    SegmentationSample,
    VideoSequence,
)
from .registry import names, open_dataset, register

__all__ = [
    "CorrespondenceSample",
    "Dataset",
    "GeometrySample",
    "InteractiveSample",
    "Samples",
    "SegmentationSample",
    "VideoSequence",
    "names",
    "open_dataset",
    "register",
]
