"""What a run writes down: a CSV table and TensorBoard's files."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LoftUpError
from ..weights import write_atomically

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Board", "Table"]


class Table:
    """A CSV file whose rows begin with the step.

    Args:
        path: of the file; created with the first row.
        step: rows beyond this step are dropped from what is there already: they will come again.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self._columns: list[str] | None = None
        if step == 0:
            path.unlink(missing_ok=True)
        if not path.exists() or not path.stat().st_size:
            return
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            # A line that a killed run left half-written lacks cells, or is of a step beyond.
            rows = [row for row in reader if None not in row.values() and int(row["step"]) <= step]
            self._columns = list(reader.fieldnames or [])
        write_atomically(path, self._text(rows, header=True).encode())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; floats are written so that they read back the same.

        Raises:
            LoftUpError: the columns are not those of the rows before, or the file cannot be written.
        """
        new = self._columns is None
        if self._columns is None:
            self._columns = list(row)
        if list(row) != self._columns:
            raise LoftUpError(
                f"{self.path} has the columns {self._columns}, the run now gives {list(row)}; it was written with "
                "another config or version: move it away"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="", encoding="utf-8") as stream:
                stream.write(self._text([row], header=new))
        except OSError as error:
            raise LoftUpError(f"cannot write {self.path}: {error}") from error

    def _text(self, rows: list[Any], header: bool) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns or [], lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
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
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LoftUpError('training logs need tensorboard: pip install "loftup[train]"') from error
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
