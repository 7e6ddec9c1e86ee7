"""How processes come to the same networks."""

from __future__ import annotations

import gc
import pickle
from abc import abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_rlhf.chance import derived_seed
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.models.attention import register
from lightning_rlhf.models.classifier import Classifier
from lightning_rlhf.models.compiling import compile_blocks
from lightning_rlhf.models.critics import Critic
from lightning_rlhf.models.loading import ModelSpec
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.modules.ranks import agree, rank
from lightning_rlhf.modules.saving import SavedModule
from lightning_rlhf.strategies.forms import fill, form_of, of_form
from lightning_rlhf.strategies.sharding import check_sharded, shard


class BuiltModule(SavedModule):
    """Networks that are built once it is known how they are to be spread over processes.

    Where they are to be sharded the first process builds them whole, and tries out there what they can do. The others
    get their form; then each gets its shards of the weights. Code that comes with a model may be on one machine only:
    then all build everything.

    Attributes:
        reference: What the policy must not stray from, if anything.
        critic: What says values, where that is a model of its own.
        compile_options: What ``torch.compile`` is called with; False for not at all.
        builds_for_all: Whether the other processes are waiting for a form, and take part in nothing else.
    """

    reference: Reference | None
    critic: Critic | None
    compile_options: bool | dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.builds_for_all = False

    @abstractmethod
    def build(self) -> None:
        """Makes the networks, under a random state that depends on the seed alone."""

    @property
    def specs(self) -> list[ModelSpec]:
        """Of all networks that :meth:`build` makes."""
        return [self.spec]

    def built(self) -> dict[str, Any]:
        """What :meth:`build` made, by name."""
        return {name: getattr(self, name) for name in ("policy", "critic", "reference", "special_tokens", "_dropout")}

    def take(self, built: dict[str, Any]) -> None:
        """Takes what another process has built, its weights still to come.

        Args:
            built: From :meth:`built`.
        """
        for name, value in built.items():
            setattr(self, name, value)
        if self.policy.decoder.unpads:
            register()
        self.compile_policy()

    def compile_policy(self) -> None:
        """Compiles the blocks of what trains, if that was asked for."""
        if self.compile_options is not False:
            for decoder in (self.policy.decoder, *([] if self.critic is None else [self.critic.decoder])):
                compile_blocks(decoder, **({} if self.compile_options is True else self.compile_options))

    def shard(self, mesh: DeviceMesh) -> None:
        """Shards the networks over processes; does nothing a second time.

        Args:
            mesh: Of one dimension.
        """
        shard(self.policy, self.reference, mesh, self.trainer.precision, self.critic)

    def configure_model(self) -> None:
        """Builds the networks; the same on every rank, whatever was drawn before. Does nothing a second time."""
        strategy = getattr(self._trainer, "strategy", None)
        mesh = strategy.device_mesh["data_parallel"] if isinstance(strategy, ModelParallelStrategy) else None
        if not self.is_built:
            if mesh is None or mesh.size() == 1 or any(spec.trust_remote_code for spec in self.specs):
                self._build()
            else:
                self._build_once(mesh)
        if mesh is not None:
            self.shard(mesh)
            check_sharded(self, *networks_of(self.built()))
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, RLHFDataModule):
            data.tokenizer, data.max_tokens = self.tokenizer, self.max_prompt_tokens
            decoder = self.policy.decoder
            data.has_encoder, data.max_response_tokens = decoder.has_encoder, decoder.response_room

    @property
    def max_prompt_tokens(self) -> int | None:
        """How long a row of data may be, in tokens; None is no limit."""
        return self.policy.decoder.prompt_room(0)

    def _build(self) -> None:
        self._dropout = []  # of a network that may have been built before, and that no other process can take
        # In host memory, wherever Lightning would build: there the same seed gives the same weights on every device.
        with isolate_rng(), torch.device("cpu"):
            torch.manual_seed(derived_seed(self.seed, "build"))
            self.build()

    def _build_once(self, mesh: DeviceMesh) -> None:
        """Builds on the first process alone, and deals the weights out; a collective."""
        device = self.trainer.strategy.root_device
        whole: dict[str, Any] = {}
        form: bytes | None = None
        error: Exception | None = None
        if rank() == 0:
            self.builds_for_all = True
            try:
                self._build()
                whole = self.built()
                form = form_of(whole)
            except Exception as failure:
                cannot_leave = whole and isinstance(failure, pickle.PicklingError | AttributeError | TypeError)
                error = None if cannot_leave else failure
            self.builds_for_all = False
        agree(error, "building the networks", 0, device)
        said = [form]
        dist.broadcast_object_list(said, src=0, device=device)
        if said[0] is None:
            rank_zero_warn("A network holds what cannot leave its process (pickle): every process builds all of it.")
            self._build()
            return
        self.take(of_form(said[0]))
        self.shard(mesh)
        targets, sources = networks_of(self.built()), networks_of(whole)
        for i, network in enumerate(targets):
            fill(network, sources[i] if whole else None, device)
        whole.clear()
        sources.clear()
        gc.collect()  # networks refer to themselves, and would stay for a while


def networks_of(built: Any) -> list[nn.Module]:
    """The networks among what was built, in an order that is the same everywhere.

    Args:
        built: From :meth:`BuiltModule.built`, or a part of it.

    Returns:
        All that have weights.
    """
    if isinstance(built, dict):
        return networks_of(list(built.values()))
    if isinstance(built, list):
        return [network for value in built for network in networks_of(value)]
    network = built.network if isinstance(built, Reference | Classifier) else built
    return [network] if isinstance(network, nn.Module) else []
