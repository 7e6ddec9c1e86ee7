"""A network without its weights, as a module would load it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_rlhf.models.activations import fuse_activations
from lightning_rlhf.models.adapters import VALUE, Adapters
from lightning_rlhf.models.branches import ValueBranch
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.dropout import disable_dropout
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.loading import ModelSpec
from lightning_rlhf.models.outline import adapted, outlined, rounded_weights, runnable
from lightning_rlhf.models.recomputation import recompute_activations
from lightning_rlhf.planning.placement import Placement


@dataclass
class Network:
    """A language model.

    Attributes:
        decoder: Whose tensors have no numbers.
        rounded: Bytes of weights that are held in fewer bits, by ``id``; in passes they are plain ones.
        value: What says values of its states, if something does: a head, a branch of its top blocks, or a head behind
            an adapter of its own.
    """

    decoder: Decoder
    rounded: dict[int, int] = field(default_factory=dict)
    value: nn.Module | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """Its modules, which may have parameters in common."""
        return [self.decoder] if self.value is None else [self.decoder, self.value]

    @property
    def value_parameters(self) -> list[nn.Parameter]:
        """Those that only values are made with, an adapter of the critic's in the decoder's layers among them."""
        adapters = self.decoder.adapters
        own = [] if adapters is None else adapters.parameters(VALUE)
        others = {id(parameter) for parameter in self.decoder.parameters()}
        value = [] if self.value is None else self.value.parameters()
        return own + [parameter for parameter in value if id(parameter) not in others]

    @property
    def decoder_parameters(self) -> list[nn.Parameter]:
        """All others."""
        others = {id(parameter) for parameter in self.value_parameters}
        return [parameter for parameter in self.decoder.parameters() if id(parameter) not in others]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, each of them once."""
        return self.decoder_parameters + self.value_parameters

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        return [*self.parameters, *(buffer for module in self.modules for buffer in module.buffers())]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for p in self.parameters if p.requires_grad]

    @property
    def blocks(self) -> list[nn.Module]:
        """What is sharded by itself."""
        decoder = self.decoder
        names = decoder.encoder_blocks + (() if decoder.blocks is None else decoder.blocks.blocks)
        copies = self.value.copies if isinstance(self.value, ValueBranch) else ()
        return [*(decoder.model.get_submodule(name) for name in names), *copies]

    @property
    def outside(self) -> list[nn.Parameter]:
        """The parameters that lie in no block."""
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        return [p for p in self.parameters if id(p) not in inside]

    @property
    def branches(self) -> int:
        """Of how many top blocks there are copies that say values."""
        if not isinstance(self.value, ValueBranch) or self.decoder.blocks is None:
            return 0
        return len(self.decoder.blocks.blocks) - len(self.value.trunk.frozen)

    def bytes(self, placement: Placement) -> int:
        """Memory that it takes on a device, less what says values.

        Args:
            placement: Of the run.
        """
        return placement.bytes_of(self.decoder_parameters, self.rounded) + _bytes(self.decoder.buffers())

    def value_bytes(self, placement: Placement) -> int:
        """Memory that what says values takes.

        Args:
            placement: Of the run.
        """
        buffers = () if self.value is None else self.value.buffers()
        return placement.bytes_of(self.value_parameters) + _bytes(buffers)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def outline(
    mode: FakeTensorMode,
    spec: ModelSpec,
    without_dropout: bool,
    argument: str = "policy",
    beside: Callable[[Adapters | None], object] | None = None,
) -> Network:
    """A language model as a module would load it, adapter and all.

    Args:
        mode: In which it is made.
        spec: Of the model.
        without_dropout: Whether dropout is 0.
        argument: What the user calls it, for errors.
        beside: Puts more adapters beside its own.

    Returns:
        The network.
    """
    model = outlined(spec, argument)
    weights = dict(model.named_parameters())
    rounded = {id(weights[name]): size for name, size in rounded_weights(spec).items()}
    for weight in weights.values():
        weight.requires_grad_(id(weight) not in rounded)
    adapters = adapted(model, spec)
    if spec.gradient_checkpointing:
        recompute_activations(model)
    if beside is not None:
        with torch.device("meta"):
            beside(adapters)
    fuse_activations(model)
    if without_dropout:
        disable_dropout(model)
    tensors = runnable(model, mode)
    with mode, torch.no_grad():
        decoder = decoder_of(model)
        decoder.adapters = adapters
        decoder.find_blocks()
    return Network(decoder, {id(tensors[number]): size for number, size in rounded.items()})
