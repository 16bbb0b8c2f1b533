"""Models inside other modules: adapters, compilers, parallelism, averages of weights."""

from typing import Any

from torch import nn

__all__ = ["unwrap"]


def unwrap(model: Any) -> tuple[Any, tuple[str, ...]]:
    """The model inside PEFT, torch.compile, DataParallel, DDP, or an average of weights, and the wrappers' names.

    Its features are those of the wrapper: adapters are inside the model, averages are its weights.
    """
    names: list[str] = []
    while (inner := _inside(model)) is not None:
        names.append(type(model).__name__ if not hasattr(model, "_orig_mod") else "torch.compile")
        model = inner
    return model, tuple(names)


def _inside(model: Any) -> Any:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    package = type(model).__module__.split(".")[0]
    kind = type(model).__name__
    if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
        return compiled
    if package == "peft" and hasattr(model, "get_base_model"):
        return model.get_base_model()
    if kind in ("AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3"):
        inner = getattr(model, "module", None) or getattr(model, "ema", None)
        return inner if isinstance(inner, nn.Module) else None
    return None
