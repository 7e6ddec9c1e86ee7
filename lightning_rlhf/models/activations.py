"""Activations and norms that take one operator instead of several, where they are the same function."""

from __future__ import annotations

import inspect
import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call


def fuse_activations(model: nn.Module) -> None:
    """Puts torch's own GELU, in its tanh form, in the place of those that transformers writes out in single operators.

    Which of them are the same function is tried on numbers, not looked up by name. Written out (GPT-2, GPT-J, GPT-Neo,
    OpenAI GPT), they take eight passes over what is the largest tensor of a block.

    Args:
        model: Changed in place; its config, and so its export, stays.
    """
    fused = nn.GELU(approximate="tanh")
    numbers = torch.linspace(-12.0, 12.0, 4801, dtype=torch.float64)
    expected = fused(numbers)
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module).__module__ == "transformers.activations" and not list(module.parameters()):
                values = module(numbers)
                if values.shape == expected.shape and torch.allclose(values, expected, rtol=0.0, atol=1e-9):
                    setattr(parent, name, fused)


class RMSNorm(nn.Module):
    """Root mean square norm: one operator on a GPU, and elsewhere what transformers writes out in six.

    Args:
        weight: (width,).
        eps: Added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = self.variance_epsilon = eps

    def forward(self, states: Tensor) -> Tensor:
        """Returns states of the root mean square 1, times the weight.

        Args:
            states: (..., width).
        """
        if states.is_cuda:
            dtype = torch.promote_types(states.dtype, self.weight.dtype)
            return nn.functional.rms_norm(states.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        wide = states.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(states.dtype)


def fuse_norms(model: nn.Module) -> None:
    """Puts :class:`RMSNorm` in the place of norms that say the same, to the last bit where there is no GPU.

    Which they are is tried on numbers, not looked up by name. Written out (LLaMA, Qwen3, Mistral ...), they take
    six passes over the states and keep several copies of them for the gradient.

    Args:
        model: Changed in place; its weights keep their names.
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            weights = dict(module.named_parameters())
            weight = weights.get("weight")
            is_alone = weight is not None and len(weights) == 1 and not list(module.buffers())
            if not is_alone or not isinstance(eps, float) or list(module.children()):
                continue
            if len(inspect.signature(module.forward).parameters) != 1:  # a gate besides, as Mamba 2 has
                continue
            if type(weight) is nn.Parameter and weight.dim() == 1 and not weight.is_meta and _is_rms(module, eps):
                fused = RMSNorm(weight, eps)
                fused.training = module.training
                setattr(parent, name, fused)


@torch.no_grad()
def _is_rms(module: nn.Module, eps: float) -> bool:
    """Whether it says what :class:`RMSNorm` says of numbers and a weight that are not its own."""
    draw = torch.Generator().manual_seed(0)
    width = module.get_parameter("weight").shape[0]
    for dtypes in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        states, weight = (
            torch.randn(*shape, width, generator=draw).to(dtype)
            for shape, dtype in zip(((3, 5), ()), dtypes, strict=True)
        )
        expected = RMSNorm(nn.Parameter(weight), eps)(states)
        try:
            found = functional_call(module, {"weight": weight}, (states,))
        except Exception:  # whatever a forward of another kind stumbles over
            return False
        if not (isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)):
            return False
    return True
