"""Networks sharded block by block over processes, and whole again for as long as they write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_rlhf.models.adapter_reference import AdapterReference
from lightning_rlhf.models.branches import ValueBranch
from lightning_rlhf.models.classifier import Classifier
from lightning_rlhf.models.critics import Critic
from lightning_rlhf.models.hydra import HydraReference
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.reference import Reference

PRECISIONS = {
    "32-true": MixedPrecisionPolicy(),
    # Weights and their updates stay in single precision, so that small ones are not lost.
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}
"""What Lightning's ``precision`` means for shards."""


def shard(
    policy: Policy, reference: Reference | None, mesh: DeviceMesh, precision: str, critic: Critic | None = None
) -> None:
    """Shards a policy, its reference and its critic by FSDP2, every block by itself and the rest as one; once.

    Args:
        policy: Built whole and alike on all processes.
        reference: Of the policy.
        mesh: Of one dimension, over which to shard.
        precision: Of the Trainer.
        critic: Likewise.

    Raises:
        ValueError: If weights cannot be sharded in that precision.
    """
    if isinstance(policy, FSDPModule):
        return
    if precision not in PRECISIONS:
        raise ValueError(
            f"`Trainer(precision={precision!r})` cannot be sharded: use {' or '.join(map(repr, PRECISIONS))}."
        )
    networks = [policy, critic, None if reference is None else reference.network]
    if any(is_quantized(network) for network in networks if network is not None):
        raise ValueError(
            "`quantization` cannot be sharded, since bitsandbytes knows no shards: leave it out, or use "
            "`Trainer(strategy='ddp')`, where every process holds the whole model."
        )
    if policy.decoder.adapters is not None and policy.decoder.adapters.allocates:
        raise ValueError(
            "`adapter` of type ADALORA ranks single weights, which no process has all of when they are sharded: use "
            "LORA, or `Trainer(strategy='ddp')`."
        )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": PRECISIONS[precision]}
    if isinstance(reference, HydraReference):
        # Its copies come first: what they share with the policy is then sharded for each of them.
        for module in reference.network.copies:
            fully_shard(module, reshard_after_forward=True, **options)
    elif reference is not None and not isinstance(reference, AdapterReference):  # that has nothing of its own
        _shard(reference.network, options, reshard_root=True)
    branch = getattr(policy, "value_branch", None)
    if isinstance(branch, ValueBranch):
        for module in branch.copies:
            fully_shard(module, reshard_after_forward=True, **options)
    if critic is not None:
        _shard(critic, options, reshard_root=False)
    # What is in no block is needed to the end of a forward pass, and at once when the backward pass begins.
    _shard(policy, options, reshard_root=False)
    for method in ("begin", "next_token", "values", "measured", "last_states"):
        if hasattr(policy, method):  # a reward model writes nothing
            register_fsdp_forward_method(policy, method)


def shard_classifier(classifier: Classifier, mesh: DeviceMesh) -> None:
    """Shards a frozen classifier by FSDP2, every block by itself and the rest as one; once.

    It keeps its own type whatever precision the Trainer has.

    Args:
        classifier: Alike on all processes.
        mesh: Of one dimension, over which to shard.

    Raises:
        ValueError: If it is quantised.
    """
    if isinstance(classifier.model, FSDPModule):
        return
    if is_quantized(classifier.model):
        raise ValueError(
            f"`reward`: {type(classifier.model).__name__} is quantised and cannot be sharded, since bitsandbytes knows "
            "no shards: pass `RewardModel(..., sharded=False)`, which is whole on every process."
        )
    for name in classifier.blocks:
        fully_shard(classifier.model.get_submodule(name), mesh=mesh, reshard_after_forward=True)
    fully_shard(classifier.model, mesh=mesh, reshard_after_forward=True)


def check_sharded(module: nn.Module, *networks: nn.Module) -> None:
    """Makes sure that whatever trains is sharded, and that everything is there.

    Args:
        module: All of whose parameters that train must be.
        *networks: All of whose parameters must be.

    Raises:
        ValueError: If something of a subclass trains and is not sharded.
        RuntimeError: If something has no values: Lightning would give it some, and wipe all others out.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ValueError(
                f"`{name}` of {type(module).__name__} trains and is not sharded, so that processes would drift apart "
                "without a word: make it a part of `self.policy` in `build`, or use `Trainer(strategy='ddp')`."
            )
    for network in (module, *networks):
        for name, tensor in chain(network.named_parameters(), network.named_buffers()):
            if tensor.is_meta:
                raise RuntimeError(
                    f"`{name}` of {type(network).__name__} is on the meta device and has no values: load it in `build`."
                )
            if network is not module and isinstance(tensor, nn.Parameter) and not isinstance(tensor, DTensor):
                raise RuntimeError(f"`{name}` of {type(network).__name__} was not sharded.")


def _shard(policy: Any, options: dict[str, Any], reshard_root: bool) -> None:
    blocks = policy.decoder.blocks
    for name in policy.decoder.encoder_blocks + (() if blocks is None else blocks.blocks):
        fully_shard(policy.decoder.model.get_submodule(name), reshard_after_forward=True, **options)
    fully_shard(policy, reshard_after_forward=reshard_root, **options)


@contextmanager
def held(policy: nn.Module) -> Iterator[None]:
    """Keeps a sharded policy whole on every process, so that none waits for another while they write.

    Costs the memory of the whole policy. Does nothing to one that is not sharded.

    Args:
        policy: Sharded or not.
    """
    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    blocks = [module for module in shards if module is not policy]
    # Weights that are gathered in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        for module in blocks:
            module.set_reshard_after_forward(False, recurse=False)
        for module in shards:
            module.unshard()
        try:
            yield
        finally:
            for module in blocks:
                module.set_reshard_after_forward(True, recurse=False)
            for module in shards:
                module.reshard()
