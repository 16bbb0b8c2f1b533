"""timm's convolutions with "same" padding as ones of a fixed padding, for graphs that hold for any size."""

import copy
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["with_fixed_padding"]

Model = TypeVar("Model", bound=nn.Module)


class _Padded(nn.Module):
    """A convolution behind the padding that "same" means where its stride divides the input.

    Images whose sides are multiples of a model's stride are such everywhere inside it.
    """

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.convolution = convolution
        sides = zip(convolution.kernel_size, convolution.dilation, convolution.stride, strict=True)
        rows, columns = (max((kernel - 1) * dilation + 1 - stride, 0) for kernel, dilation, stride in sides)
        self.padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution does it."""
        own = self.convolution
        return F.conv2d(F.pad(x, self.padding), own.weight, own.bias, own.stride, 0, own.dilation, own.groups)


def with_fixed_padding(model: Model) -> Model:
    """The module itself, or a copy of it in which the padding does not depend on the input's size."""
    from timm.layers.conv2d_same import Conv2dSame

    if not any(isinstance(module, Conv2dSame) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv2dSame):
                setattr(module, name, _Padded(child))
    return model
