"""Weights of frozen layers in eight or four bits, by bitsandbytes."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    QuantizationLike: TypeAlias = str | Mapping[str, Any] | BitsAndBytesConfig | None
else:
    QuantizationLike = Any

NAMES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}
"""What Lightning's own plugin calls the ways, as fields of transformers' ``BitsAndBytesConfig``."""


def quantization_config(quantization: QuantizationLike, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers reads weights with.

    Args:
        quantization: A name, fields of ``BitsAndBytesConfig``, or one of these.
        dtype: In which four-bit layers multiply, unless the fields say otherwise.

    Returns:
        The config.

    Raises:
        TypeError: If it is none of these.
        ValueError: If there is no such name, or rows of a batch would change one another.
    """
    from transformers import BitsAndBytesConfig

    if isinstance(quantization, str):
        if quantization not in NAMES:
            raise ValueError(
                f"`quantization={quantization!r}` must be one of {', '.join(map(repr, NAMES))}, or fields of "
                "transformers' `BitsAndBytesConfig`."
            )
        quantization = NAMES[quantization]
    if isinstance(quantization, Mapping):
        defaults = {"bnb_4bit_compute_dtype": dtype, "llm_int8_threshold": 0.0}
        quantization = BitsAndBytesConfig(**{**defaults, **quantization})
    if not isinstance(quantization, BitsAndBytesConfig):
        raise TypeError(
            f"`quantization={quantization!r}` must be a name ({', '.join(map(repr, NAMES))}), or transformers' "
            "`BitsAndBytesConfig` or its fields."
        )
    if quantization.load_in_8bit and quantization.llm_int8_threshold > 0:
        raise ValueError(
            f"`quantization`: with `llm_int8_threshold={quantization.llm_int8_threshold}` the columns that are "
            "multiplied in half precision depend on all rows and tokens of a batch, later ones included, so that a "
            "token's log-prob does too: set it to 0.0, as `quantization='int8'` does."
        )
    return quantization


def plain_quantization(quantization: QuantizationLike) -> str | dict[str, Any] | None:
    """The same as plain values, for checkpoints.

    Args:
        quantization: In any of its forms.

    Returns:
        A name, or fields.
    """
    if quantization is None or isinstance(quantization, str):
        return quantization
    fields = quantization if isinstance(quantization, Mapping) else quantization.to_diff_dict()
    private = {"_load_in_8bit", "_load_in_4bit", "quant_method"}
    return {name: _plain(value) for name, value in fields.items() if name not in private}


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def quantized_bytes(shape: tuple[int, ...], config: BitsAndBytesConfig) -> int:
    """Memory that a weight takes once it is rounded.

    Of eight bits there is a scale for every row, of four one for every 64 weights. Double quantisation holds these in
    eight bits, with a scale for every 256 of them (`QLoRA <https://arxiv.org/abs/2305.14314>`_, section 3).

    Args:
        shape: Of the weight.
        config: Of a quantised model.

    Returns:
        The bytes.
    """
    weights, scale = math.prod(shape), 4
    if config.load_in_8bit:
        return weights + scale * shape[0]
    scales = -(-weights // 64)
    if not config.bnb_4bit_use_double_quant:
        return -(-weights // 2) + scale * scales
    return -(-weights // 2) + scales + scale * -(-scales // 256)


def is_quantized(model: nn.Module) -> bool:
    """Whether some of a model's layers are bitsandbytes' own.

    Args:
        model: Any.

    Returns:
        The answer.
    """
    return any(_bits(module) for module in model.modules())


def copied(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a user's own model, which stays as it is.

    Args:
        model: Any.
        dtype: Of the copy.

    Returns:
        The copy.

    Raises:
        ValueError: If it is quantised: rounded weights have no other type.
    """
    if is_quantized(model):
        raise ValueError(
            f"`model={type(model).__name__}` is quantised, and cannot be copied as {dtype}: pass the folder or name "
            "that it was read from, `ModelSpec(<folder>, quantization='nf4')`."
        )
    return copy.deepcopy(model).to(dtype)


def steady(model: nn.Module) -> None:
    """Lets quantised layers compute the same when a policy writes and when it trains.

    On a CPU bitsandbytes does not: in evaluation mode eight-bit layers round what they read to eight bits too, and
    four-bit ones repack their weights for the processor, with scales of less precision, and stay so. A ratio of
    probabilities would not begin at 1, and a base not remain what it was.

    Args:
        model: Changed in place.
    """
    for module in model.modules():
        bits = _bits(module)
        if bits == 4:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        elif bits == 8:
            _steady_class(type(module), module)


def _steady_class(cls: Any, module: Any) -> None:
    """Keeps one layer in training mode, in which what it reads is not rounded; it has no other use for the mode."""
    if not cls.__name__.startswith("Steady"):

        def train(self: Any, mode: bool = True) -> Any:
            return cls.train(self, True)

        module.__class__ = type(f"Steady{cls.__name__}", (cls,), {"train": train})
    module.train()


def dequantized(module: nn.Module) -> Tensor | None:
    """The weight of a quantised layer, as its products use it.

    Args:
        module: A layer.

    Returns:
        (out, in), or None where the layer is not quantised.
    """
    bits = _bits(module)
    if bits is None:
        return None
    import bitsandbytes as bnb

    weight: Any = module.weight
    if bits == 4:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    state: Any = module.state
    scales = weight.SCB if state.SCB is None else state.SCB
    return weight.data.float() * (scales.float() / 127.0)[:, None]


def _bits(module: nn.Module) -> int | None:
    """Of a layer's weight, if bitsandbytes made it; without importing that, since then nobody did."""
    if "bitsandbytes" not in sys.modules:
        return None
    from bitsandbytes.nn import modules

    if isinstance(module, modules.Linear4bit):
        return 4
    return 8 if isinstance(module, modules.Linear8bitLt) else None
