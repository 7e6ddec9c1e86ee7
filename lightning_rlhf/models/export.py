"""Models as others read them: without adapters, and in full precision."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_rlhf.models.quantization import dequantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_model(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A second model of the same config without adapters, none of whose layers is quantised.

    Args:
        model: With or without either.
        weights: All of its weights.

    Returns:
        The model, on the CPU, with weights of its own.
    """
    from accelerate import init_empty_weights
    from transformers.pytorch_utils import Conv1D

    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        second = type(model)(config)
    wanted = second.state_dict()
    state = {}
    for name, weight in weights.items():
        plain = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)
        if plain not in wanted:
            continue
        path, _, leaf = name.rpartition(".")
        full = dequantized(model.get_submodule(path)) if leaf == "weight" else None
        if full is not None:
            weight = full.t() if isinstance(second.get_submodule(plain.rpartition(".")[0]), Conv1D) else full
            weight = weight.to(model.get_input_embeddings().weight.dtype)
        state[plain] = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
    second.load_state_dict(state, assign=True)
    second.tie_weights()
    if hasattr(model, "generation_config"):
        second.generation_config = copy.deepcopy(model.generation_config)
    return second.requires_grad_(False).eval()
