"""Progress of long work, on a terminal and elsewhere."""

import io
import sys

from loftup.progress import tell, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_elsewhere_a_line_every_half_minute(capsys):
    seconds = iter([0, 10, 20, 40, 50, 80])
    assert list(track("abcdef", "photos", 6, unit="images", clock=lambda: next(seconds))) == list("abcdef")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "photos: 3 of 6 images, 0.075 a second, 1 min left",
        "photos: 5 of 6 images, 0.0625 a second, 0 min left",
    ]


def test_without_a_total_nothing_is_said_of_what_is_left(capsys):
    seconds = iter([0, 40])
    assert list(track(iter("ab"), "frames", clock=lambda: next(seconds))) == ["a", "b"]
    assert capsys.readouterr().err == "frames: 1, 0.025 a second\n"


def test_on_a_terminal_a_bar_and_lines_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in track("ab", "photos", 2, unit="images"):
        tell("a line")
    assert "photos: 100%" in terminal.getvalue()
    assert "a line\n" in terminal.getvalue()
