"""The numbers of a fit as a table, and its model card."""

from collections.abc import Mapping

from ...networks.config import UniversalConfig
from ..config import TrainConfig
from ..run.card import training_card
from .criteria import CRITERIA, Errors, gains

__all__ = ["fit_card", "table"]

COLUMNS = ("bilinear", "any", "fitted")


def table(errors: Mapping[str, Errors]) -> str:
    """The errors of bilinear interpolation, ``any`` and what was fitted, and the gain over ``any``, as lines of text.

    Args:
        errors: by upsampler; as shares of bilinear interpolation's in the table.
    """
    rows = _rows(errors)
    width = max(map(len, CRITERIA.values()))
    lines = [f"{'error, as a share of bilinear interpolation':{width}}  {'any':>7}  {'fitted':>7}  {'gain':>7}"]
    lines += [f"{CRITERIA[name]:{width}}  {row[1]:>7}  {row[2]:>7}  {row[3]:>7}" for name, row in rows.items()]
    return "\n".join(lines)


def _rows(errors: Mapping[str, Errors]) -> dict[str, tuple[str, str, str, str]]:
    gain = gains(errors["fitted"], errors["any"])
    rows = {}
    for name, base in errors["bilinear"].items():
        bilinear, start, fitted = (f"{errors[column][name] / max(base, 1e-12):.4f}" for column in COLUMNS)
        rows[name] = (bilinear, start, fitted, f"{100 * gain[name]:+.2f} %")
    return rows


def fit_card(
    config: TrainConfig,
    up: UniversalConfig,
    facts: Mapping[str, str],
    errors: Mapping[str, Mapping[str, Errors]],
    chosen: str,
) -> str:
    """README.md of a fit: what was trained and judged on what, and what it gained.

    Args:
        config: of the training.
        up: of the network.
        facts: rows of the first table.
        errors: by half and upsampler.
        chosen: name of the checkpoint; "" where these are the weights of ``any``.
    """
    word = f"The weights are those of `{chosen}`." if chosen else "**No gain: these are the weights of `any`.**"
    lines = [
        "## Fit",
        f"`any` as it comes with loftup, trained further on unlabelled photographs for this backbone. {word}",
        "Errors as shares of bilinear interpolation's, on photographs held out of the training: the checkpoint was "
        "chosen by one half of them, and had to gain 1 % or more in the second error, and lose nothing in the first, "
        "on both halves. They stand for no task: "
        "compare with `any` on your own.",
    ]
    for half, of_half in errors.items():
        rows = [f"| {CRITERIA[name]} | {' | '.join(row)} |" for name, row in _rows(of_half).items()]
        head = f"| {half} | bilinear | any | fitted | gain |\n|---|---|---|---|---|"
        lines.append("\n".join([head, *rows]))
    card = training_card(config, up, facts, {})
    before, heading, rest = card.partition("## Training")
    return before + "\n\n".join(lines) + f"\n\n{heading}{rest}"
