"""Logs of a run: a CSV table and TensorBoard's files."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import translate
from ...files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Board", "Table"]


class Table:
    """A CSV file whose rows begin with the step.

    Args:
        path: of the file; created with the first row.
        step: rows beyond this step are dropped from what is there already: they will come again.

    Raises:
        LoftUpError: what is there is no such table.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self._columns: list[str] = []
        if step == 0:
            path.unlink(missing_ok=True)
        with translate((ValueError, KeyError, csv.Error), lambda error: f"{path} is damaged ({error!r}); remove it"):
            rows = self._read()
            if self._columns and "step" not in self._columns:
                raise KeyError("step")
            rows = [row for row in rows if int(row["step"]) <= step]
        if self._columns:
            self._rewrite(rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; floats are written so that they read back the same.

        A column that is new is added to the rows before, and one that is missing left empty, as when a run is resumed
        with other measurements.

        Raises:
            LoftUpError: the file cannot be written.
        """
        with translate(OSError, lambda error: f"cannot write {self.path}: {error}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if row.keys() - self._columns:
                rows = self._read()
                self._columns = list(dict.fromkeys([*self._columns, *row]))
                self._rewrite([*rows, row])
            else:
                with self.path.open("a", newline="", encoding="utf-8") as stream:
                    stream.write(self._text([row]))

    def _read(self) -> list[dict[str, str]]:
        """The whole rows of the file; sets the columns."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            self._columns = list(reader.fieldnames or [])
            # A line that a killed run left half-written lacks cells, or is of a step beyond.
            return [row for row in reader if None not in row.values()]

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        header = dict(zip(self._columns, self._columns, strict=True))
        write_atomically(self.path, self._text([header, *rows]).encode())

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self._columns, lineterminator="\n").writerows(rows)
        return buffer.getvalue()


class Board:
    """TensorBoard's event files.

    Args:
        folder: of the files.
        step: what is there beyond this step is hidden.

    Raises:
        LoftUpError: tensorboard is missing (extra ``train``).
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        with translate(ImportError, 'training logs need tensorboard: pip install "loftup[train]"'):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, section: str, values: Mapping[str, float], step: int) -> None:
        """Add numbers as ``section/name``."""
        for name, value in values.items():
            self._writer.add_scalar(f"{section}/{name}", value, step)

    def picture(self, name: str, picture: "Image.Image", step: int) -> None:
        """Add a picture in RGB."""
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is waiting."""
        self._writer.close()
