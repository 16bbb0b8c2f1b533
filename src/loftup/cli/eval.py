"""The command ``loftup eval``: upsamplers compared by tasks, and what is done with the results."""

import argparse
import inspect
import json
import re
import textwrap
from typing import Any

from ..eval.catalogue import TASKS, Task
from .options import add_backbone_options, key_value, place, positive, word

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("eval", help="compare upsamplers on segmentation, depth, tracking and more")
    parser.set_defaults(run=_run)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK", parser_class=_TaskParser)
    for name, entry in TASKS.items():
        task = tasks.add_parser(name, help=entry.help)
        add = task.add_argument
        if entry.data:
            known = "see loftup eval list; or synthetic"
            add("--dataset", required=True, type=word, metavar="NAME:PATH", help=known)
            few = "take every Nth sample of both splits alone, for a first look"
            add("--every", type=positive, metavar="N", help=few)
        add_backbone_options(task)
        named = "[LABEL=]NAME[:ARGUMENT], see loftup eval list"
        add("--upsampler", required=True, type=word, metavar="U[,U...]", help=named)
        remote = "let upsamplers run code that is not loftup's: of GitHub at commits named in loftup, or of a folder"
        add("--trust-remote-code", action="store_true", help=remote)
        add("--seeds", type=positive, metavar="N", help="how many times heads are trained (default: the task's)")
        protocol = "a setting of the protocol, see below"
        kinds = "quick, some minutes for a first look on few samples, or paper; default: quick, where --set, --seeds "
        kinds += "and --every are left out"
        add("--protocol", choices=("quick", "paper"), help=kinds)
        add("--set", action="append", default=[], type=key_value, metavar="KEY=VALUE", help=protocol)
        made = "for results.json, tables and pictures"
        add("-o", "--output", type=place, required=True, metavar="DIR", help=made)
        add("--overwrite", action="store_true", help="forget results that are there already")
    listing = tasks.add_parser("list", help="upsamplers, tasks and datasets by name")
    listing.add_argument("--json", action="store_true", help="as JSON")
    table = tasks.add_parser("table", help="join the results of several folders")
    table.add_argument("folders", nargs="+", type=place, metavar="DIR", help="written by loftup eval TASK -o DIR")
    table.add_argument("--metrics", type=word, metavar="M[,M...]", help="which ones; default: all")
    table.add_argument("-o", "--output", type=place, metavar="FILE", help=".md or .csv; default: print Markdown")


class _TaskParser(argparse.ArgumentParser):
    """A parser whose help ends with the settings of its task, which are looked up when it is shown."""

    def format_help(self) -> str:
        """The help and the settings."""
        task = TASKS.get(self.prog.split()[-1])
        return super().format_help() + (_settings(task) if task else "")


def _settings(task: Task) -> str:
    """The settings of a task's protocol, with their defaults and what the docstrings of their classes say."""
    kind = task.load()[1]
    texts: dict[str, str] = {}
    for each in kind.__mro__:
        for name, text in re.findall(r"^    (\w+): (.+(?:\n        .+)*)", inspect.cleandoc(each.__doc__ or ""), re.M):
            texts.setdefault(name, " ".join(text.split()))
    lines = ["", "settings of the protocol, with the paper's values:"]
    for name, value in vars(kind()).items():
        lines.append(f"  --set {name}={json.dumps(value)}")
        plain = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", texts.get(name, "")).replace("``", "")
        lines += textwrap.wrap(plain, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, ""])


def _run(arguments: argparse.Namespace) -> int:
    from ..eval.command import run
    from .models import backbone_of, choose_device

    if arguments.task not in ("list", "table"):
        _join_settings(arguments)
        choose_device(arguments)
    return run(arguments, backbone_of)


def _join_settings(arguments: argparse.Namespace) -> None:
    """Take --set device=... and seeds=... as the options of these names; ValueError where they say otherwise."""
    settings = dict(arguments.set)
    for name in ("device", "seeds"):
        asked = getattr(arguments, name)
        value = settings.get(name, asked)
        if asked not in (None, value):
            raise ValueError(f"--set {name}={value} contradicts --{name} {asked}; give one of them")
        if not isinstance(value, str | None) and name == "device":
            raise ValueError(f"--set device={value}: expected cpu, cuda, cuda:1 or another device that torch has")
        setattr(arguments, name, value)
