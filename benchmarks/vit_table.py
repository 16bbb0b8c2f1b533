r"""One table of upsamplers on one backbone: segmentation of three sets, depth, normals, video and clicks.

    python benchmarks/vit_table.py --data FOLDER -o FOLDER [--anyup WEIGHTS@CODE] [--jafar WEIGHTS@CODE] [--quick N] \
        --backbone dinov2_vits14 --backbone-weights FILE --layer 10

Every part is a `loftup eval` command with a folder of its own below the output; all options that are not named here go
to it (``--dry`` prints the commands). A stopped run goes on with the same command, and upsamplers that are added later
join those that are there. ``table.md`` and ``table.csv`` are written anew after each part.

FOLDER of ``--data`` holds ``camvid``, ``voc2012``, ``nyuv2``, ``davis2016`` and ``grabcut`` in the layouts that
docs/evaluation.md names; ``--parts`` chooses some. Clicks are judged by likeness to the clicked pixel, with a threshold
that is learned on objects of VOC: a head of convolutions would take hours for each of the slower upsamplers.
``--quick N`` takes every Nth sample and so is a test of the machinery, not a result; ``--thin video=8,clicks=4`` does
so for the parts that take hours, and the table's first line says which.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gains

from loftup.cli import main as loftup
from loftup.eval.catalogue import TASKS
from loftup.eval.table import read_file
from loftup.files import MADE_BY, refuse_others, write_atomically

GRID = {"size": [224, 224], "output": 0.5}
PROBES = {**GRID, "training": "samples", "probes": ["upsampled", "lowres"]}
# With the default of 1e-4 a head learns 60 pictures by heart. Of 1e-4 to 10 this gave bilinear the best depth, learned
# on three quarters of NYU's training split and judged on the rest, and "any" the best of 1e-4 to 0.1.
LINEAR = {**GRID, "head": "linear", "ridge": 0.1}
UPSAMPLERS = (
    "bilinear,large_input2=large_input:2,joint_bilateral,any=loftup:any,views4=views:4:bilinear,"
    "views4_any=views:4:loftup:any"
)


@dataclass(frozen=True)
class Part:
    """A task on a dataset, and which of its numbers the table shows as they are."""

    task: str
    dataset: str  # reader and folder below --data
    heading: str
    shown: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: bool = True

    def command(self, data: Path, upsamplers: str, seeds: int, quick: int, rest: Sequence[str]) -> list[str]:
        """The words of `loftup` that do it."""
        reader, _, folder = self.dataset.partition(":")
        settings = dict(self.settings)
        if "train" in settings:
            other, _, place = settings["train"].partition(":")
            settings["train"] = f"{other}:{data / place}"
        if "objects" in settings:
            settings["objects"] = max(1, settings["objects"] // quick)
        words = ["eval", self.task, "--dataset", f"{reader}:{data / folder}", "--upsampler", upsamplers]
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={_json(value)}")]
        words += ["--seeds", str(seeds)] if self.seeds else []
        words += ["--every", str(quick)] if quick > 1 else []
        return [*words, *rest]


PARTS = {
    "camvid": Part("segmentation", "camvid:camvid", "CamVid", ("miou", "boundary_miou"), PROBES),
    "voc": Part("segmentation", "voc:voc2012", "VOC", ("miou", "boundary_miou"), PROBES),
    "nyu": Part("segmentation", "nyuv2:nyuv2", "NYU", ("miou", "boundary_miou"), PROBES),
    "depth": Part("depth", "nyuv2:nyuv2", "NYU depth", ("rmse", "delta_1"), LINEAR),
    "normals": Part("normals", "nyuv2:nyuv2", "NYU normals", ("mean", "recall_11"), LINEAR),
    "video": Part("video", "davis2016:davis2016", "DAVIS", ("j_and_f", "j", "f"), seeds=False),
    "clicks": Part(
        "interactive",
        "grabcut:grabcut",
        "GrabCut",
        ("iou_at_1",),
        {**GRID, "head": "similarity", "train": "voc:voc2012", "objects": 200},
    ),
}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _thin(given: str) -> dict[str, int]:
    pairs = dict(part.partition("=")[::2] for part in given.split(","))
    if unknown := [name for name, count in pairs.items() if name not in PARTS or not count.isdecimal() or count == "0"]:
        raise argparse.ArgumentTypeError(f"expected PART=N,... of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return {name: int(count) for name, count in pairs.items()}


def write_table(folder: Path) -> None:
    """Join what there is of all parts in a folder as ``table.md`` and ``table.csv``."""
    results = {name: read_file(file) for name in PARTS if (file := folder / name / "results.json").is_file()}
    if not results:
        return
    labelled = {PARTS[name].heading: each for name, each in results.items() if PARTS[name].task == "segmentation"}
    over_bilinear, as_they_are = gains.gains(labelled), []
    for name, each in results.items():
        part = PARTS[name]
        as_they_are += gains.plain(part.heading, each, TASKS[part.task].load()[2], part.shown)
    columns = [*over_bilinear, *as_they_are]
    labels = gains.labels_of(columns)
    text = f"Backbone and sizes: {_conditions(results)}\n\n"
    if over_bilinear:
        text += "Gains over bilinear, in points; kept: the same of a probe trained on low-resolution features.\n\n"
        text += gains.markdown(over_bilinear, labels) + "\n"
    text += f"Numbers as they are; ± is the spread over the seeds.\n\n{gains.markdown(as_they_are, labels)}"
    text += f"\n<!-- {MADE_BY} -->\n"
    refuse_others([folder / "table.md"])
    write_atomically(folder / "table.md", text.encode())
    write_atomically(folder / "table.csv", gains.comma_separated(columns, labels).encode())


def _conditions(results: dict[str, dict[str, Any]]) -> str:
    """Backbone, datasets, seeds and machine, in a sentence."""
    first = next(iter(results.values()))
    backbone = ", ".join(f"{key} {value}" for key, value in first["backbone"].items() if value is not None)
    data = "; ".join(f"{each['task']} on {each['dataset']}" for each in results.values())
    environment = first["environment"]
    commits = sorted({commit for each in results.values() if (commit := each["environment"].get("commit"))})
    machine = f"{environment['device']}, torch {environment['torch']}, loftup {environment['loftup']}"
    machine += f" (commit {', '.join(commits)})" if commits else ""
    return f"{backbone}; {data}; {machine}."


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing and write the table; returns 1 where an upsampler failed, 2 for a wrong command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="with a folder for every dataset")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for all results and the table")
    add("--upsampler", default=UPSAMPLERS, metavar="U[,U...]", help="instead of %(default)s")
    add("--add", default="", metavar="U[,U...]", help="further ones, such as mine=loftup:FOLDER")
    add("--anyup", metavar="WEIGHTS@CODE", help="AnyUp's weights and a folder with its code, which is run")
    add("--jafar", metavar="WEIGHTS@CODE", help="the same of JAFAR, whose weights are for one backbone")
    add("--parts", default=",".join(PARTS), metavar="P[,P...]", help="some of %(default)s")
    add("--seeds", type=int, default=3, metavar="N", help="heads that are trained (default: %(default)s)")
    add("--quick", type=int, default=1, metavar="N", help="take every Nth sample, to try it out")
    add("--thin", type=_thin, default={}, metavar="P=N,...", help="take every Nth sample of some parts")
    add("--dry", action="store_true", help="print the commands and stop")
    given, rest = parser.parse_known_args(words)
    unknown = [name for name in given.parts.split(",") if name not in PARTS]
    if unknown or given.seeds < 1 or given.quick < 1:
        parser.error(f"unknown parts {', '.join(unknown)}" if unknown else "--seeds and --quick must be 1 or more")
    rivals = [f"{name}:{value}" for name in ("anyup", "jafar") if (value := getattr(given, name))]
    upsamplers = ",".join(filter(None, [given.upsampler, given.add, *rivals]))
    if rivals:
        rest = [*rest, "--trust-remote-code"]
    failed = 0
    for name in given.parts.split(","):
        place = given.output / name
        every = given.thin.get(name, given.quick)
        command = PARTS[name].command(given.data, upsamplers, given.seeds, every, [*rest, "-o", str(place)])
        print(shlex.join(["loftup", *command]), file=sys.stderr, flush=True)
        if given.dry:
            continue
        sys.argv = ["loftup", *command]  # what the results name as their command
        status = loftup(command)
        if status > 1:
            return status
        failed |= status
        write_table(given.output)
    return failed


if __name__ == "__main__":
    sys.exit(main())
