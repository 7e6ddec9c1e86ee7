"""Low-rank adapters that add what they say to what their layer says, where it lies."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class AddingLinear(Linear):
    """A linear layer of PEFT's with adapters, which takes one product to add each of them.

    PEFT makes the adapter's output, a multiple of it, and the sum: three tensors as large as the layer's output. Where
    one product does not say the same (variants such as DoRA, biases, mixed batches, other precisions), PEFT's own way
    is gone.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's.

        Args:
            x: (..., in).
            *args: Of the layer itself.
            **kwargs: Likewise, and of PEFT.

        Returns:
            (..., out).
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or not all(self._adds(x, name) for name in names):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        rows = x.reshape(-1, x.shape[-1])
        result = self.base_layer(rows)
        for name in names:
            low = self.lora_A[name](self.lora_dropout[name](rows))
            result = result.addmm_(low, self.lora_B[name].weight.t(), alpha=self.scaling[name])
        return result.view(*x.shape[:-1], result.shape[-1])

    def _adds(self, x: Tensor, name: str) -> bool:
        """Whether one product adds an adapter."""
        base: Any = self.base_layer
        weights = base.weight, self.lora_A[name].weight, self.lora_B[name].weight
        return (
            name not in self.lora_variant
            and self.lora_B[name].bias is None
            and not base._forward_hooks  # which may keep what would be changed
            and all(weight.dtype == x.dtype and not hasattr(weight, "full_tensor") for weight in weights)
            and not torch.is_autocast_enabled(x.device.type)
        )


def fuse_adapters(model: nn.Module) -> None:
    """Lets the plain low-rank layers of a model be :class:`AddingLinear`.

    Args:
        model: Changed in place; names, weights and exports stay.
    """
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = AddingLinear
