"""The tasks that upsampled features are judged by, in one table; a task is imported when it is asked for.

Every task is a function (backbone, upsampler, dataset, config) -> :class:`loftup.eval.result.Result`: the backbone is
frozen and in ``eval()`` mode, the upsampler takes its features, the dataset is of the kind that the table says, and the
config holds the protocol, None for the paper's. Importing the table loads no torch, so that the command line can show
its help at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .result import Metric, Result

__all__ = ["TASKS", "Task"]


@dataclass(frozen=True)
class Task:
    """An entry of TASKS."""

    name: str  # of the task, and of the function (backbone, upsampler, dataset, config) that does it
    help: str  # one line for the command
    module: str  # of loftup.eval.tasks, which holds the function
    config: str  # class of the protocol's settings, in that module
    # Kind of the samples, of loftup.eval.datasets.base.KINDS; empty for a task without a dataset, whose function takes
    # none.
    data: str = ""
    metrics: str = "METRICS"  # table of the numbers by name, in that module
    # For a first look, some minutes of a laptop: settings in place of the paper's, and greatest number of samples of
    # each split.
    quick: Mapping[str, Any] = field(default_factory=dict)
    most: int = 0

    def load(self) -> "tuple[Callable[..., Result], Any, dict[str, Metric]]":
        """The function, the class of its config and its metrics."""
        module = import_module(f".tasks.{self.module}", __package__)
        return getattr(module, self.name), getattr(module, self.config), getattr(module, self.metrics)


_LINEAR = {"head": "linear", "output": 0.5, "seeds": 1}
_ENTRIES = (
    Task(
        "segmentation",
        "semantic segmentation with a linear probe",
        "segmentation",
        "SegmentationConfig",
        data="labels",
        quick={"training": "samples", "output": 0.5, "seeds": 1, "probes": ["upsampled", "lowres"]},
        most=300,
    ),
    Task("depth", "monocular depth", "geometry", "GeometryConfig", "geometry", "DEPTH_METRICS", _LINEAR, 300),
    Task("normals", "surface normals", "geometry", "GeometryConfig", "geometry", "NORMALS_METRICS", _LINEAR, 300),
    Task("video", "video object segmentation by label propagation", "video", "VideoConfig", data="sequences", most=2),
    Task(
        "open_vocabulary",
        "segmentation by texts, with a CLIP and the features as its proxy",
        "open_vocabulary",
        "OpenVocabularyConfig",
        data="labels",
        most=100,
    ),
    Task(
        "interactive",
        "selecting an object by a click",
        "interactive",
        "InteractiveConfig",
        data="objects",
        quick={"head": "similarity", "output": 0.5, "seeds": 1, "objects": 100},
        most=100,
    ),
    Task(
        "correspondence",
        "points of a picture found in another of the same kind of object",
        "correspondence",
        "CorrespondenceConfig",
        data="pairs",
        quick={"size": 224},
        most=100,
    ),
    Task("efficiency", "parameters, time and memory; needs no dataset", "efficiency", "EfficiencyConfig"),
)
TASKS = {task.name: task for task in _ENTRIES}
