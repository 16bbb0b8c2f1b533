"""Loops of the tasks: heads trained batch by batch, samples judged one by one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...progress import track
from ..result import spread

__all__ = ["minimise", "seeded_head", "walk"]

T = TypeVar("T")
Head = TypeVar("Head", bound=nn.Module)


def seeded_head(build: Callable[[], Head], seed: int) -> Head:
    """A module whose first weights depend on the seed alone; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def minimise(
    loss_of: Callable[[list[T]], Tensor | None],
    samples: Sequence[T],
    optimizer: torch.optim.Optimizer,
    config: Any,
    generator: torch.Generator,
    caption: str,
) -> bool:
    """Step down the loss of one batch after another, in random order.

    Args:
        loss_of: loss of a batch; None where there is nothing to learn from.
        samples: all that there are.
        optimizer: of the head.
        config: says the ``epochs`` and how many samples are in a ``batch``.
        generator: of the order.
        caption: of the progress bar.

    Returns:
        Whether there was anything to learn from.
    """
    epochs = (torch.randperm(len(samples), generator=generator) for _ in range(config.epochs))
    batches = [indices.tolist() for order in epochs for indices in order.split(config.batch)]
    progress = False
    for indices in track(batches, caption, leave=False):
        loss = loss_of([samples[index] for index in indices])
        if loss is None:
            continue
        progress = True
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return progress


def walk(samples: Sequence[T], caption: str, pictures: int) -> Iterator[tuple[T, bool]]:
    """Every sample to judge, and whether it is one of the ``pictures`` to show."""
    to_show = spread(len(samples), pictures)
    for number, sample in enumerate(track(samples, caption, len(samples), leave=False)):
        yield sample, number in to_show
