"""Where values come from: a head on the policy's states, a branch of its top blocks, or a model of its own."""

from __future__ import annotations

import copy
import functools
from typing import Any, get_args

from torch import Tensor, nn

from lightning_rlhf.batches import PromptBatch, Rollouts
from lightning_rlhf.models.adapter_configs import AdapterLike
from lightning_rlhf.models.adapters import VALUE, Adapters
from lightning_rlhf.models.branches import ValueAdapter, ValueBranch
from lightning_rlhf.models.critics import Critic, check_ranks, check_vocabulary, check_weights, critic_network
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.freezing import freeze, keep_frozen_blocks
from lightning_rlhf.models.heads import HEADS, LinearValueHead, ValueHeadKind
from lightning_rlhf.models.loading import ModelLike, ModelSpec
from lightning_rlhf.models.passes import in_pieces
from lightning_rlhf.models.policy import PolicyOutput
from lightning_rlhf.models.probing import state_scale
from lightning_rlhf.models.recomputation import recompute_activations
from lightning_rlhf.models.room import check_room
from lightning_rlhf.modules.online import OnlineModule


class ActorCriticModule(OnlineModule):
    """An online module that learns values beside its policy.

    Args:
        policy: The network to train: a name, folder, object, config or :class:`ModelSpec`.
        value_head: What says values of a token's state: ``"mlp"``, trlX's two layers, or ``"linear"``, one. By default
            the first; or, where ``critic`` is a sequence classifier with one label, its own linear head.
        num_value_layers_unfrozen: Values are said by trainable copies of so many of the policy's top blocks, which read
            what the policy's own read there; 0 reads the policy's last states.
        critic: Values are said by a model of its own: a name, folder, object, config or :class:`ModelSpec` of a
            language model or sequence classifier, or ``"policy"`` for a copy of the policy as it starts. Where both
            have an adapter and the same model, that is held once.
        **kwargs: Passed to :class:`OnlineModule`.
    """

    def __init__(
        self,
        policy: ModelLike,
        *,
        value_head: ValueHeadKind | None = None,
        num_value_layers_unfrozen: int = 0,
        critic: ModelLike | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        if value_head is not None and value_head not in HEADS:
            raise ValueError(
                f"`value_head={value_head!r}` must be one of {', '.join(map(repr, get_args(ValueHeadKind)))}."
            )
        if num_value_layers_unfrozen < 0:
            raise ValueError(
                f"`num_value_layers_unfrozen={num_value_layers_unfrozen}` must be a number of blocks, or 0 for a value "
                "head on the policy's own states."
            )
        if critic is not None and num_value_layers_unfrozen:
            raise ValueError(
                f"`num_value_layers_unfrozen={num_value_layers_unfrozen}` and `critic` both say where values come "
                "from: leave one of them out. How much of a critic trains is `ModelSpec(num_layers_unfrozen=...)`'s."
            )
        if self.compile_options is not False and num_value_layers_unfrozen:
            raise ValueError(
                f"`compile={self.compile_options!r}` does not go with `num_value_layers_unfrozen="
                f"{num_value_layers_unfrozen}`, which looks into a block that would be compiled: leave it out, or take "
                "`critic='policy'`."
            )
        self.value_head = value_head
        self.num_value_layers_unfrozen = num_value_layers_unfrozen
        self.copies_policy = isinstance(critic, str) and critic == "policy"
        self.critic_spec = self.spec if self.copies_policy else None if critic is None else ModelSpec.of(critic)

    # --- networks -----------------------------------------------------------------------------------------------

    @property
    def specs(self) -> list[ModelSpec]:
        """With the critic's."""
        return [*super().specs, *([] if self.critic_spec is None else [self.critic_spec])]

    @property
    def saved_specs(self) -> dict[str, ModelSpec]:
        """With the critic's, where it is a model of its own."""
        own = {} if self.critic is None or self.critic_spec is None else {"critic": self.critic_spec}
        return {**super().saved_specs, **own}

    @property
    def sampler_keeps_values(self) -> bool:
        """Whether values are read off the policy's own last states, so that the sampler has them."""
        return self.num_value_layers_unfrozen == 0 and self.critic_spec is None

    def make_critic(self) -> None:
        """Makes what says values, once the policy is there."""
        decoder = self.policy.decoder
        if self.sampler_keeps_values:
            self.policy.value_head = self._head(decoder)
        elif self.num_value_layers_unfrozen:
            recomputes = self.spec.gradient_checkpointing
            self.policy.value_branch = ValueBranch.of(
                decoder, self.num_value_layers_unfrozen, self._head(decoder), recomputes
            )
            keep_frozen_blocks(decoder, self.num_value_layers_unfrozen)
        elif self.shares_model(decoder.adapters):
            keep_frozen_blocks(decoder)
            self.policy.value_branch = ValueAdapter(self._head(decoder))
        else:
            self.critic = self._own_model().train()

    def _head(self, decoder: Decoder, score: nn.Linear | None = None) -> nn.Module:
        if score is not None:
            head: nn.Module = LinearValueHead(decoder.width, score=score)
        else:
            head = HEADS[self.value_head or "mlp"](decoder.width, state_scale(decoder))
        return head.to(decoder.model.get_output_embeddings().weight.device)

    def shares_model(self, adapters: Adapters | None, adapter: AdapterLike | None = None) -> bool:
        """Puts the critic's adapter beside the policy's, if that can be.

        Args:
            adapters: Of the policy.
            adapter: The critic's, where it is not to be read from where the spec says.

        Returns:
            Whether it could.

        Raises:
            ValueError: If policy and critic ask of the one model what it cannot do for both.
        """
        spec = self.critic_spec
        if (
            spec is None
            or adapters is None
            or spec.adapter is None
            or not (self.copies_policy or spec.has_model_of(self.spec))
        ):
            return False
        if spec.gradient_checkpointing != self.spec.gradient_checkpointing:
            raise ValueError(
                f"`critic.gradient_checkpointing={spec.gradient_checkpointing}`: policy and critic have one model, and "
                f"the policy's says {self.spec.gradient_checkpointing}. Set both alike."
            )
        if not adapters.add(spec.adapter if adapter is None else adapter, VALUE, trains=True):
            return False
        if spec.gradient_checkpointing:
            if self.compile_options is not False:
                raise ValueError(
                    f"`compile={self.compile_options!r}` does not go with `gradient_checkpointing` where policy and "
                    "critic are two adapters of one model: compiled blocks would run again with the wrong one. Leave "
                    "out one of them."
                )
            recompute_activations(adapters.model, adapters)
        return True

    def _own_model(self) -> Critic:
        spec = self.critic_spec
        assert spec is not None
        check_weights(spec)
        if self.copies_policy:
            decoder, score = copy.deepcopy(self.policy.decoder), None
        else:
            check_vocabulary(spec, self.tokenizer)
            network, score = critic_network(spec, begins_with_score=self.value_head is None)
            decoder = self.load_decoder(spec, network)
            freeze(decoder, spec.num_layers_unfrozen)
        check_ranks(decoder)
        decoder.trunk = None  # what it makes of tokens is not kept
        return Critic(decoder, self._head(decoder, score))

    @property
    def max_prompt_tokens(self) -> int | None:
        """The smaller of what policy and critic have room for."""
        rooms = [super().max_prompt_tokens]
        if self.critic is not None:
            rooms.append(self.critic.decoder.prompt_room(self.sampling.max_new_tokens))
        return min((room for room in rooms if room is not None), default=None)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Those of the policy's model and adapter, and none that only values are made with."""
        adapters = self.policy.decoder.adapters
        others = {id(parameter) for parameter in ([] if adapters is None else adapters.parameters(VALUE))}
        return [parameter for parameter in self.policy.decoder.parameters() if id(parameter) not in others]

    def parts(self) -> dict[str, nn.Module]:
        """What the optimizer tells apart: the policy, and all that says values."""
        adapters, value = self.policy.decoder.adapters, nn.ModuleList()
        for module in (self.policy.value_head, self.policy.value_branch, self.critic):
            if module is not None:
                value.append(module)
        if adapters is not None:
            value.append(nn.ParameterList(adapters.parameters(VALUE)))
        return {"policy": nn.ParameterList(self.policy_parameters()), "value": value}

    # --- values -------------------------------------------------------------------------------------------------

    def rollout(self, prompts: PromptBatch) -> Rollouts:
        """To prompts that the critic too has room for."""
        if self.critic is not None:
            check_room(self.critic.decoder, prompts.prompt_mask, self.sampling.max_new_tokens, "critic")
        return super().rollout(prompts)

    def add_values(self, rollouts: Rollouts, with_final_values: bool) -> None:
        """Reads finished rollouts for their values, where the sampler could not keep them.

        Args:
            rollouts: Changed in place.
            with_final_values: Whether to read the value after the last token of responses that were cut off.
        """
        if self.sampler_keeps_values:
            return
        network: Any = self.policy if self.critic is None else self.critic
        read = functools.partial(in_pieces, network, self.policy.values if self.critic is None else self.critic)
        if not with_final_values:
            rollouts.values = self.read_by(read, rollouts)
            return
        # A token more after those that were cut off, which nobody reads: its value is that of the state before it.
        longer = self.read_by(read, rollouts.with_next_token())
        ends = rollouts.response_mask.sum(1, keepdim=True)
        rollouts.values = longer[:, : rollouts.response_mask.shape[1]].masked_fill(~rollouts.response_mask, 0.0)
        rollouts.final_values = longer.gather(1, ends).squeeze(1)  # 0 where nothing was cut off, as in all padding

    def values(self, batch: Rollouts, output: PolicyOutput) -> Tensor:
        """Values as they are now.

        Args:
            batch: Some rows.
            output: What the policy says of them.

        Returns:
            (batch, response), with gradients.
        """
        if self.critic is not None:
            return self.critic(batch)
        assert output.values is not None
        return output.values
