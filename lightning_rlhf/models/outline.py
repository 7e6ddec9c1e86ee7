"""Networks without weights: what a config alone says of their structure.

They are made on torch's meta device, where a tensor is a shape and a type. To be run they are taken into a
``FakeTensorMode``, in which such tensors pass for those of a processor.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_rlhf.models.adapter_configs import adapter_config, begun_at_nothing
from lightning_rlhf.models.adapters import Adapters
from lightning_rlhf.models.headed import HeadedModel
from lightning_rlhf.models.loading import ModelSpec, _auto_class, check_folder
from lightning_rlhf.models.quantization import quantization_config, quantized_bytes
from lightning_rlhf.models.scorer_loading import stored

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def outlined(spec: ModelSpec, argument: str = "policy", scores: bool = False) -> Any:
    """A model without weights.

    Args:
        spec: Of the model.
        argument: What the user calls it, for errors.
        scores: Whether it is a sequence classifier, rather than a language model.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If its config cannot be read.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    config = config_of(spec, argument)
    if not scores:
        return _from_config(_auto_class(config), config, spec)
    if stored(config).get("head"):
        return HeadedModel(config, _from_config(AutoModel, config, spec)).eval()
    return _from_config(AutoModelForSequenceClassification, config, spec)


def config_of(spec: ModelSpec, argument: str = "policy") -> PretrainedConfig:
    """The config of a model, of which nothing else is read.

    Args:
        spec: Of the model.
        argument: What the user calls it, for errors.

    Returns:
        A config of its own.

    Raises:
        ValueError: If it cannot be read.
    """
    from transformers import AutoConfig, PretrainedConfig

    if not spec.is_named:
        model: Any = spec.model
        return copy.deepcopy(model if isinstance(model, PretrainedConfig) else model.config)
    name = os.fspath(spec.model)
    check_folder(name, argument)
    try:
        return AutoConfig.from_pretrained(name, **spec._source())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{argument}={name!r}` has no config that can be read: name a folder with a `config.json`, or a config "
            f"by its class, as in `class_path: transformers.LlamaConfig`. {str(error).strip().splitlines()[0]}"
        ) from error


def _from_config(cls: Any, config: PretrainedConfig, spec: ModelSpec) -> PreTrainedModel:
    options: dict[str, Any] = (
        {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}
    )
    options |= {"dtype": spec.torch_dtype(), "trust_remote_code": spec.trust_remote_code}
    with torch.device("meta"):
        return cls.from_config(config, **options).eval()


def rounded_weights(spec: ModelSpec, scores: bool = False) -> dict[str, int]:
    """What the weights take that are held in fewer bits.

    Args:
        spec: Of the model, and how they are held.
        scores: As for :func:`outlined`.

    Returns:
        Bytes by the name of the weight; none where nothing is quantised.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    if spec.quantization is None:
        return {}
    config = quantization_config(spec.quantization, spec.torch_dtype())
    model = outlined(spec, scores=scores)
    before = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    plain = {name: type(module) for name, module in model.named_modules()}
    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(model, device_map=None)
    replaced = [name for name, module in model.named_modules() if type(module) is not plain[name]]
    return {f"{name}.weight": quantized_bytes(before[f"{name}.weight"], config) for name in replaced}


def adapted(model: PreTrainedModel, spec: ModelSpec) -> Adapters | None:
    """Puts the adapter, if there is one, into a model without weights; of one that was trained, the config alone.

    Args:
        model: Changed in place.
        spec: Of the model.

    Returns:
        The adapters, or None.
    """
    adapter = spec.adapter
    if adapter is None:
        return None
    was_trained = isinstance(adapter, str | os.PathLike)
    if isinstance(adapter, str | os.PathLike):
        check_folder(os.fspath(adapter), "adapter")
        adapter = begun_at_nothing(adapter_config(adapter))
    with torch.device("meta"):
        adapters = Adapters(model, adapter)
    adapters.was_trained = was_trained
    return adapters


def runnable(model: nn.Module, mode: FakeTensorMode) -> dict[int, Tensor]:
    """Takes a network into a mode in which it can be run.

    Args:
        model: Changed in place.
        mode: Of the caller's.

    Returns:
        Its new parameters and buffers, by the ``id`` of those that they stand for.
    """
    made: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in made:
                        made[id(tensor)] = tensor, _like(tensor)
                    tensors[name] = None if tensor is None else made[id(tensor)][1]
    return {number: new for number, (_, new) in made.items()}


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
