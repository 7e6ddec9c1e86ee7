"""Small matrices beside frozen weights: adapters of PEFT, in the layers of a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rlhf.models.adapter_configs import AdapterLike, adapter_config, begun_at_nothing, changes_model, reading
from lightning_rlhf.models.export import plain_model

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

TRAINED, REFERENCE, VALUE, REWARD = "default", "reference", "value_adapter", "reward_adapter"
"""What PEFT calls adapters: the policy's, a frozen one beside it, and such as say values or (with a number) score."""


class Adapters:
    """The adapters of a model.

    PEFT puts its layers into the model in place. Its wrapper stays here, outside of the module tree: the model keeps
    its class, its forward and the names of its blocks.

    Args:
        model: Changed in place: its own weights are frozen, and the adapter trains.
        adapter: A config of PEFT, its fields, or the folder or name of an adapter that was trained before.

    Attributes:
        was_trained: Whether it was trained before.
        on: Name of the one that is on; None for the model alone.
        updates: That were made with a rank that is being reduced (AdaLoRA).
    """

    def __init__(self, model: PreTrainedModel, adapter: AdapterLike) -> None:
        from peft import PeftModel, get_peft_model

        from lightning_rlhf.models.lora import fuse_adapters  # imports peft

        config = adapter_config(adapter, model.config.is_encoder_decoder)
        more = {}
        if model.get_output_embeddings() is None:  # it writes nothing, and PEFT is to leave its head alone
            config.task_type = "FEATURE_EXTRACTION"
            more = {"config": config}
        own = {id(parameter) for parameter in model.parameters()}
        self.model = model
        self.was_trained = isinstance(adapter, str | os.PathLike)
        with reading(adapter):
            if isinstance(adapter, str | os.PathLike):
                name = os.fspath(adapter)
                self.peft = PeftModel.from_pretrained(model, name, is_trainable=True, torch_device="cpu", **more)
            else:
                self.peft = get_peft_model(model, config)
        fuse_adapters(model)
        self.on: str | None = TRAINED
        self.updates = 0
        self._check(own)

    def _check(self, own: set[int]) -> None:
        """Refuses what the model could not be had back from, or would not take along."""
        kind = self.peft.peft_config[TRAINED].peft_type.value
        inside = {id(tensor) for tensor in [*self.model.parameters(), *self.model.buffers()]}
        if any(id(tensor) not in inside for tensor in [*self.peft.parameters(), *self.peft.buffers()]):
            raise ValueError(
                f"`adapter` of type {kind} keeps weights outside of the layers that it adapts, where nothing would "
                "save, move or shard them: use one that does not, such as LORA."
            )
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) in own:
                raise ValueError(
                    f"`adapter` trains `{name}`, a weight of the model itself, which could then not be had back by "
                    "switching the adapter off: set its `bias='none'`, and name whole layers in `modules_to_save`."
                )

    @property
    def config(self) -> PeftConfig:
        """Of the adapter that trains."""
        return self.peft.peft_config[TRAINED]

    @property
    def allocates(self) -> bool:
        """Whether ranks are taken away during training (AdaLoRA)."""
        return hasattr(self.peft.base_model, "rankallocator")

    # --- which one is on ----------------------------------------------------------------------------------------

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Switches to another adapter for a while, or to none.

        PEFT lets an adapter train as soon as it is on, and no other. Here what trains is the same before, meanwhile and
        afterwards, so that two adapters can learn from one loss.

        Args:
            name: Of the adapter; None for the model alone.
        """
        before = self.on
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def repeated(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a pass that begins now and of its repetition, which is to be made with the same adapter on."""
        return nullcontext(), self.using(self.on)

    def _switch(self, name: str | None) -> None:
        if name == self.on:
            return
        with self._same_flags():
            if name is None:
                self.peft.base_model.disable_adapter_layers()
            else:
                if self.on is None:
                    self.peft.base_model.enable_adapter_layers()
                self.peft.set_adapter(name)
        self.on = name

    @contextmanager
    def _same_flags(self) -> Iterator[None]:
        """Puts back whether parameters train; those that come in between do not."""
        flags = {id(parameter): parameter.requires_grad for parameter in self.model.parameters()}
        try:
            yield
        finally:
            for parameter in self.model.parameters():
                parameter.requires_grad_(flags.get(id(parameter), False))

    def hold(self, config: PeftConfig, state: Mapping[str, Tensor], name: str, source: Any = None) -> None:
        """Puts a frozen adapter beside the one that trains.

        Args:
            config: Of an adapter that exists.
            state: Its weights, under the names that PEFT saves; of another model's, an error says so.
            name: What PEFT is to know it by.
            source: The reward's folder that it is from, for errors.
        """
        with self._same_flags(), reading(source, "reward"):
            self.peft.add_adapter(name, begun_at_nothing(config, inference_mode=True))
            self._load(self.peft, state, name)
            self.peft.set_adapter(TRAINED)

    def add(self, adapter: AdapterLike, name: str, trains: bool) -> bool:
        """Puts another adapter beside the policy's.

        Args:
            adapter: Its config, fields, or folder or name.
            name: What PEFT is to know it by.
            trains: Whether it learns, or is frozen.

        Returns:
            Whether that can be: PEFT puts two in the same layers only if they are of one type, and reduces the ranks of
            one alone (AdaLoRA).

        Raises:
            ValueError: If it would train a weight of the model itself.
        """
        other = adapter_config(adapter, self.model.config.is_encoder_decoder)
        is_alike = other.peft_type == self.config.peft_type and not (trains and self.allocates)
        if not is_alike or changes_model(other) or changes_model(self.config):
            return False
        if trains and (bias := getattr(other, "bias", "none")) != "none":
            raise ValueError(
                f"`critic.adapter.bias={bias!r}` trains biases of the model, which the policy has too: set 'none'."
            )
        with self._same_flags(), reading(adapter):
            if isinstance(adapter, str | os.PathLike):
                self.peft.load_adapter(os.fspath(adapter), name, is_trainable=trains, torch_device="cpu")
            else:
                self.peft.add_adapter(name, other)
            self.peft.set_adapter(TRAINED)
        for parameter in self.parameters(name) if trains else ():
            parameter.requires_grad_(parameter.is_floating_point())
        return True

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Those of the adapter that PEFT knows by a name."""
        return [parameter for path, parameter in self.model.named_parameters() if name in path.split(".")]

    def follow(self, optimizer: Optimizer) -> None:
        """Lets AdaLoRA take ranks away after every update.

        Args:
            optimizer: Of the adapter's parameters.
        """
        if self.allocates:
            optimizer.register_step_post_hook(lambda *_: self._allocate())

    def _allocate(self) -> None:
        if any(p.grad is None for p in self.model.parameters() if p.requires_grad):
            return  # the model rests
        self.updates += 1
        self.peft.base_model.update_and_allocate(self.updates)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights; nothing but for AdaLoRA."""
        if not self.allocates:
            return {}
        allocator = self.peft.base_model.rankallocator
        moments = {name: dict(getattr(allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return {"updates": self.updates, "rank_pattern": self.config.rank_pattern, "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back.

        Args:
            state: From :meth:`state_dict`.
        """
        if not self.allocates or not state:
            return
        self.updates, self.config.rank_pattern = state["updates"], state["rank_pattern"]
        places = dict(self.model.named_parameters())
        for name, moments in state["moments"].items():
            values = {n: value.to(places[n].device) for n, value in moments.items()}
            setattr(self.peft.base_model.rankallocator, name, values)

    # --- saving -------------------------------------------------------------------------------------------------

    def state(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of the adapter that trains, under the names that PEFT saves.

        Args:
            weights: All weights of the model, where they are sharded.

        Returns:
            Copies.
        """
        from peft import get_peft_model_state_dict

        with self._whole_ranks():
            state = get_peft_model_state_dict(self.peft, _prefixed(weights), TRAINED, save_embedding_layers=False)
        return {name: weight.detach().cpu().clone() for name, weight in state.items()}

    def save(self, folder: str, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the adapter alone, as PEFT does.

        Args:
            folder: Where to.
            weights: All weights of the model, where they are sharded.
        """
        with self._whole_ranks():
            self.peft.save_pretrained(
                folder, selected_adapters=[TRAINED], state_dict=_prefixed(weights), save_embedding_layers=False
            )

    @contextmanager
    def _whole_ranks(self) -> Iterator[None]:
        """Keeps the ranks that AdaLoRA has set to 0, without which PEFT would not read the adapter again as it was."""
        config: Any = self.config
        pattern = getattr(config, "rank_pattern", None)
        if self.allocates:
            config.rank_pattern = None
        try:
            yield
        finally:
            if self.allocates:
                config.rank_pattern = pattern

    def merged(self, weights: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
        """A second model, in whose weights the adapter is; quantised layers are plain ones in it.

        Args:
            weights: All weights of the model, where they are sharded.

        Returns:
            The model, on the CPU.
        """
        from peft import get_peft_model

        second = plain_model(self.model, self.model.state_dict() if weights is None else weights)
        state = self.state(weights)
        with reading(None):
            peft = get_peft_model(second, begun_at_nothing(self.config))
            self._load(peft, state, TRAINED)
        return peft.merge_and_unload()

    @staticmethod
    def _load(peft: Any, state: Mapping[str, Tensor], name: str) -> None:
        from peft import set_peft_model_state_dict
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        result = set_peft_model_state_dict(peft, dict(state), adapter_name=name)
        kind = PEFT_TYPE_TO_PREFIX_MAPPING[peft.peft_config[name].peft_type]
        missing = (key for key in result.missing_keys if kind in key and name in key.split("."))
        if wrong := [*result.unexpected_keys, *missing]:
            raise RuntimeError(f"missing adapter keys, or unknown ones: {wrong[:3]}")


def _prefixed(weights: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """A model's weights under the names that they have in PEFT's wrapper."""
    return None if weights is None else {f"base_model.model.{name}": weight for name, weight in weights.items()}
