"""The geometry of a feature map, measured: which cells of the map change when cells of the picture do.

Declarations lie: strides, token orders and sizes differ between models of one name. A check changes six cells of a
picture of noise, one after the other, and looks where the features change: tokens in the very cell, maps of
convolutions within two cells, since their fields of view overlap and their grids lie up to half a cell off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LoftUpError, one_line

__all__ = [
    "NEAR",
    "SMALLEST",
    "SQUARES",
    "Geometry",
    "Maps",
    "changes",
    "grids_of",
    "in_place",
    "of_one_size",
    "pad",
    "parts",
    "pictures",
    "settle",
    "spots",
    "strongest",
]

Maps = list[Tensor]
SMALLEST = 4  # cells on a side, under which nothing can be told
CONCENTRATED = 1.5  # by which the cell that changed moves more than others, for anything to be told
MIXING = 0.1  # of the features' spread, by which a picture's may differ with company (half precision rounds)
NEEDED = 4  # of the six cells
NEAR = 2  # cells by which a map of convolutions may be off
SQUARES = (224, 256, 384, 448, 512, 518, 1024)  # sizes of models that take one alone
MOST_PIXELS = 2**20  # of the pictures run at once: seven of 1024x1024 would take many GB of attention
COARSE = 32  # pixels, of which nearly every network takes multiples
FINE = 4  # pixels, under which a stride is finer than what a network sees
GRIDS = ((7, 9, 1), (6, 10, 2), (4, 12, 4), (8, 24, 8))  # rows and columns of cells, and what divides both


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model's pictures and maps.

    Args:
        channels: C of each map.
        strides: of each map in pixels.
        multiple: pixels; the model takes pictures whose sides are multiples of it.
        fixed: (H, W), the only size that the model takes; None for any.
        border: pixels, on both sides together, by which pictures are continued by reflection.
        notes: what was found, a sentence each.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    multiple: int
    fixed: tuple[int, int] | None = None
    border: int = 0
    notes: tuple[str, ...] = ()


def spots(h: int, w: int) -> list[tuple[int, int]]:
    """Six cells (row, column) of a grid, no two in the places of each other's mirror image or transpose."""
    return [(1, w - 2), (h - 2, 1), (h // 3, w // 2), (0, w // 3), (h - 1, 2 * w // 3), (h // 2, w - 1)]


def pictures(size: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Tensor:
    """A picture of noise, and one more for each spot in which that cell is another: (7, 3, H, W) float32."""
    (height, width), (h, w) = size, grid
    generator = torch.Generator("cpu").manual_seed(0)  # whatever the default device is
    changed = spots(h, w)
    images = (
        torch.randn(1, 3, height, width, generator=generator, device="cpu").mul(0.5).repeat(1 + len(changed), 1, 1, 1)
    )
    for image, (row, column) in zip(images[1:], changed, strict=True):
        rows = slice(row * height // h, (row + 1) * height // h)
        columns = slice(column * width // w, (column + 1) * width // w)
        part = image[:, rows, columns]
        part.copy_(torch.randn(part.shape, generator=generator, device="cpu") * 2)
    return images.to(device)


def parts(images: Tensor) -> tuple[Tensor, ...]:
    """The pictures that are run at once: all while they are small."""
    return torch.split(images, max(1, MOST_PIXELS // (images.shape[2] * images.shape[3])))


def changes(features: Tensor) -> Tensor | None:
    """How much each cell of a map of :func:`pictures` (7, C, h, w) changed for each spot, (6, h, w) float64.

    None if the map is on the meta device or not finite, or one of the changes moved nothing beyond rounding.
    """
    if features.is_meta:
        return None
    x = features.cpu().double()  # where every device has float64
    change = (x[1:] - x[:1]).norm(dim=1)
    rounding = 16 * torch.finfo(features.dtype).eps * x[0].norm(dim=0).median()
    if not change.isfinite().all() or (change.amax((1, 2)) <= rounding).any():
        return None
    return change  # type: ignore[no-any-return]


def strongest(change: Tensor) -> list[tuple[int, int]]:
    """The cell (row, column) that changed most, for each spot."""
    return [divmod(int(each.argmax()), each.shape[1]) for each in change]


def in_place(change: Tensor | None, grid: tuple[int, int], exact: bool) -> bool | None:
    """Tell whether the cells of a map that changed are those of the picture; None where nothing can be told.

    Attention may carry a change to a cell that it moves more, so that two of the six may be elsewhere. Where fields of
    view cover most of the picture, each spot must at least be moved more by its own change than by the others.

    Args:
        change: from :func:`changes`.
        grid: of the spots, (h, w); a map may have several cells for each.
        exact: as in :func:`settle`.
    """
    if change is None:
        return None
    h, w = change.shape[1:]
    finer = (h / grid[0], w / grid[1])
    # Some cells move whatever changes; by their own measure they do not stand out.
    for measure in (change, change / change.mean(0).clamp(min=1e-30)):
        hits = 0
        for spot, cell in zip(spots(*grid), strongest(measure), strict=True):
            # Distance to the block of cells that the spot covers.
            away = max(
                max(start * scale - place, place - ((start + 1) * scale - 1), 0)
                for start, scale, place in zip(spot, finer, cell, strict=True)
            )
            hits += away <= (0 if exact else NEAR)
        if hits >= (NEEDED if exact else len(change) - 1):
            return True
    if not exact:
        around = F.avg_pool2d(change[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
        places = [
            (min(h - 1, int((r + 0.5) * finer[0])), min(w - 1, int((c + 0.5) * finer[1]))) for r, c in spots(*grid)
        ]
        matrix = torch.stack([around[:, row, column] for row, column in places])  # what each spot shows of each change
        matrix = matrix / matrix.mean(0)
        matrix = matrix / matrix.mean(1, keepdim=True).clamp(min=1e-30)
        own = (matrix.argmax(1) == torch.arange(len(matrix), device=matrix.device)).sum()
        if int(own) >= len(matrix) - 1:
            return True
    spread = change.flatten(1).amax(1) / change.flatten(1).median(1).values.clamp(min=1e-30)
    return None if float(spread.median()) < CONCENTRATED else False


def settle(
    run: Callable[[Tensor], Maps],
    name: str,
    strides: Sequence[int],
    device: torch.device,
    native: tuple[int, int] | None = None,
    fixed: bool = False,
    exact: bool = False,
    remeasure: bool = True,
) -> Geometry:
    """Measure a model's geometry, in a forward of seven small pictures and one of one where it is as declared.

    Args:
        run: pictures (B, 3, H, W) to maps (B, C, h, w), one for each layer.
        name: for messages.
        strides: declared, of each map.
        device: of the model.
        native: (H, W) that the model was built for, tried where it takes no other.
        fixed: whether only the native size is tried.
        exact: whether a change must show in the very cell, as for tokens.
        remeasure: whether strides that are others than declared are taken as they are.

    Raises:
        LoftUpError: the maps are not what their stride says, or do not change where the picture does.
    """
    coarsest = max(strides)
    failure: Exception | None = None
    seen: list[tuple[tuple[int, int], list[tuple[int, int]]]] = []  # sizes, and grids that their strides do not make
    tries = [((h, w), (h * coarsest, w * coarsest), divisor * coarsest) for h, w, divisor in GRIDS]
    if COARSE % coarsest == 0:  # networks that go down far and come up again, whose cells are fine
        tries.append((GRIDS[0][:2], (GRIDS[0][0] * COARSE, GRIDS[0][1] * COARSE), COARSE))
    for grid, size, multiple in () if fixed and native else tries:
        images = pictures(size, grid, device)
        try:
            maps = run(images)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # models fail in their own ways at sizes that they do not take
            failure = failure or error
            continue
        got = grids_of(maps, name)
        if got == [(size[0] // stride, size[1] // stride) for stride in strides]:
            try:
                notes = _located(maps, name, grid, exact)
            except LoftUpError:
                if coarsest >= FINE or size == tries[-1][1]:
                    raise
                continue  # the cells of a fine map may be no finer than those that it was made from
            notes += _alone(run, images, maps, name)
            if multiple > coarsest:
                notes = (*notes, f"takes multiples of {multiple} pixels")
            return Geometry(tuple(each.shape[1] for each in maps), tuple(strides), multiple, notes=notes)
        measured = [_stride(size, each) for each in got]
        if remeasure and None not in measured:
            return settle(run, name, [s for s in measured if s], device, native, fixed, exact, remeasure=False)
        if seen and got == seen[0][1]:
            continue  # the same grid for all sizes
        seen.append((size, got))
    if len(seen) > 1 and (padded := _padded(run, name, coarsest, seen[0], device)):
        return padded
    if native is None and seen:
        (size, got), *_ = seen
        raise LoftUpError(
            f"{name} gave a grid of {_by(got)} cells for an image of {_by([size])}, where a stride of {coarsest} makes "
            f"{_by([(size[0] // coarsest, size[1] // coarsest)])}; write the function from image (B, 3, H, W) to "
            "features (B, C, h, w) yourself, or choose another layer"
        )
    for size in [native] if native else [(side, side) for side in SQUARES]:
        try:
            return _fixed(run, name, size, coarsest, exact, device)
        except (torch.cuda.OutOfMemoryError, LoftUpError):
            raise
        except Exception as error:
            failure = failure if native is None else error
    assert failure is not None
    raise LoftUpError(
        f"{name} failed on every picture that it was given to check its grid: {one_line(failure)[:200]}; pass "
        "check=False if it takes pictures of another size"
    ) from failure


def _alone(run: Callable[[Tensor], Maps], images: Tensor, maps: Maps, name: str) -> tuple[str, ...]:
    """A note where features differ from call to call; LoftUpError where they depend on the pictures beside."""
    alone = run(images[1:2])
    for index, each in enumerate(maps):
        spread, rounding = float(each.float().std()), 1e-3 * float(each.abs().max())  # some are all but constant
        difference = float((alone[index] - each[1:2]).abs().max())
        if difference <= max(MIXING * spread, rounding):
            continue
        if float((run(images[1:2])[index] - alone[index]).abs().max()) > 0.1 * difference:
            return ("its features differ from call to call, by random numbers",)
        raise LoftUpError(
            f"the features that {name} gives for a picture depend on the pictures beside it in the batch: by up to "
            f"{difference:.2g}, where they spread by {spread:.2g}. Does it normalise over the batch? Wrap a model that "
            "does not, or pass check=False"
        )
    return ()


def grids_of(maps: Maps, name: str) -> list[tuple[int, int]]:
    """Rows and columns of maps; LoftUpError where one is not (B, C, h, w)."""
    for each in maps:
        if not isinstance(each, Tensor) or each.ndim != 4:
            got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise LoftUpError(f"{name} gave features of shape {got}, expected (B, C, h, w)")
    return [(each.shape[2], each.shape[3]) for each in maps]


def pad(image: Tensor, total: int) -> Tensor:
    """Reflect an image's border, ``total`` pixels on both sides together."""
    before = total // 2
    return F.pad(image, (before, total - before) * 2, mode="reflect") if total else image


def _padded(
    run: Callable[[Tensor], Maps],
    name: str,
    stride: int,
    seen: tuple[tuple[int, int], list[tuple[int, int]]],
    device: torch.device,
) -> Geometry | None:
    """The geometry of a network without padding (Inception), whose grid ends before the picture does.

    The least border that completes the grid is also the one that brings its cells to their places.
    """
    size, (got, *others) = seen
    wanted = (size[0] // stride, size[1] // stride)
    missing = wanted[0] - got[0]
    if others or missing < 1 or missing != wanted[1] - got[1] or missing * stride >= min(size):
        return None
    low, high = (missing - 1) * stride, missing * stride  # the border is above low, and high is enough
    while high - low > 1:
        middle = (low + high) // 2
        enough = grids_of(run(pad(pictures(size, wanted, device)[:1], middle)), name) == [wanted]
        low, high = (low, middle) if enough else (middle, high)
    maps = run(pad(pictures(size, wanted, device), high))
    if grids_of(maps, name) != [wanted]:
        return None
    notes = (*_located(maps, name, wanted, False), f"has no padding of its own: pictures get a border of {high} pixels")
    return Geometry((maps[0].shape[1],), (stride,), stride, border=high, notes=notes)


def _fixed(
    run: Callable[[Tensor], Maps],
    name: str,
    size: tuple[int, int],
    stride: int,
    exact: bool,
    device: torch.device,
) -> Geometry:
    """The geometry of a model that takes pictures of one size."""
    declared = (size[0] // stride, size[1] // stride)
    maps = run(pictures(size, declared, device))
    grids = grids_of(maps, name)
    coarsest = min(grids)
    if min(coarsest) < SMALLEST:
        raise LoftUpError(
            f"{name} has a grid of {_by([coarsest])} cells at {_by([size])}, the only size that it takes; at least "
            f"{SMALLEST}x{SMALLEST} are needed to tell where features lie. Choose an earlier layer"
        )
    if coarsest != declared:  # the cells are others than the declared stride makes
        maps = run(pictures(size, coarsest, device))
    return of_one_size(maps, size, _located(maps, name, coarsest, exact))


def of_one_size(maps: Maps, size: tuple[int, int], notes: tuple[str, ...]) -> Geometry:
    """The geometry of a model whose maps are of the only size (H, W) that it takes."""
    grids = [(each.shape[2], each.shape[3]) for each in maps]
    strides = tuple(max(1, round(size[0] / h)) for h, _ in grids)
    why = f"takes {_by([size])} alone: other pictures are resized to it, whatever their shape, the grid is {_by(grids)}"
    return Geometry(tuple(each.shape[1] for each in maps), strides, max(strides), size, notes=(*notes, why))


def _located(maps: Maps, name: str, grid: tuple[int, int], exact: bool) -> tuple[str, ...]:
    """Notes on maps whose cells change where the picture did; LoftUpError where they do not."""
    unknown = ""
    for each in maps:
        change = changes(each)
        found = in_place(change, grid, exact)
        if found is False:
            assert change is not None
            shape = (each.shape[2], each.shape[3])
            raise LoftUpError(
                f"the feature map of {name} is not in the picture's order: changes of the picture in the cells "
                f"{spots(*grid)} of {_by([grid])} showed most in {strongest(change)} of {_by([shape])}. Write the "
                "function from image (B, 3, H, W) to features (B, C, h, w) yourself, or pass check=False if you know "
                "better"
            )
        if found is None:
            unknown = (
                "a change of one cell moves all cells alike"
                if change is not None
                else (
                    "its features of noise are not finite"
                    if not each.isfinite().all()
                    else "its features are the same for other pictures"
                )
            )
    return (f"not checked: {unknown}",) if unknown else ("checked: features change where the picture does",)


def _stride(size: tuple[int, int], grid: tuple[int, int]) -> int | None:
    """The stride that makes a grid of a size, None if there is none."""
    strides = {side // cells for side, cells in zip(size, grid, strict=True) if cells and side % cells == 0}
    exact = all(cells and side % cells == 0 for side, cells in zip(size, grid, strict=True))
    return strides.pop() if exact and len(strides) == 1 else None


def _by(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{h}x{w}" for h, w in sizes)
