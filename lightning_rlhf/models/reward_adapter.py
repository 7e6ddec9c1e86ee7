"""Reward models that are an adapter beside a policy's, on the model of both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_rlhf.models.adapter_configs import changes_model
from lightning_rlhf.models.adapters import REWARD, Adapters
from lightning_rlhf.models.classifier import Classifier, Row
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.loading import ModelSpec
from lightning_rlhf.models.outputs import same_logits
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.reward_folder import RewardAdapter, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AdapterClassifier(Classifier):
    """A reward model that is a frozen adapter in a policy's layers, and a head of its own.

    Its adapter is on while it scores; it computes in the policy's type.

    Args:
        policy: Whose model it shares.
        name: What PEFT knows the adapter by.
        head: As :class:`RewardAdapter` has it.
        how: Likewise.
    """

    def __init__(self, policy: Policy, name: str, head: dict[str, Tensor], how: dict[str, Any]) -> None:
        self.policy = policy
        self.name = name
        self.head = head
        self.how = how
        self.model = policy.decoder.model
        self.pad, self.labels, self.pools_by_pad = 0, 1, False
        self.pads = policy.decoder.pads
        self.rows = int(self.model.get_input_embeddings().weight.shape[0])
        self._kept: list[Tensor] = []

    @property
    def stored(self) -> dict[str, Any]:
        """How its scores are to be read."""
        return self.how

    @property
    def network(self) -> nn.Module:
        """Nothing: the adapter is the policy's to move, shard and deal out, and the head is no parameter."""
        return nn.Module()

    def keep(self) -> None:
        """Remembers the adapter's weights, of sharded ones this process's."""
        self._kept = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def put_back(self) -> None:
        """Gives the adapter the weights again that were remembered, if any were."""
        for weight, kept in zip(self._weights, self._kept, strict=bool(self._kept)):
            weight.copy_(kept)

    @property
    def _weights(self) -> list[nn.Parameter]:
        adapters = self.policy.decoder.adapters
        assert adapters is not None
        return adapters.parameters(self.name)

    @torch.no_grad()
    def _run(self, rows: Sequence[Row], pad: int | None) -> Tensor:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        width = int(lengths.max())
        tokens = torch.tensor([[0] * (width - len(row["input_ids"])) + row["input_ids"] for row in rows])
        mask = torch.arange(width) >= width - lengths[:, None]
        adapters, was_training = self.policy.decoder.adapters, self.policy.training
        assert adapters is not None
        self.policy.eval()
        try:
            with torch.autocast(self.device.type, enabled=False), adapters.using(self.name):
                states = self.policy.last_states(tokens.to(self.device), mask.to(self.device))
        finally:
            self.policy.train(was_training)
        head = {name: weight.to(states.device) for name, weight in self.head.items()}
        return nn.functional.linear(states.to(head["weight"].dtype), **head).float().cpu()


def on_the_policy(
    policy: Policy, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, folder: str, its: Any, number: int
) -> AdapterClassifier:
    """Puts a reward model's adapter, frozen, beside the policy's.

    Args:
        policy: Whose model it is to share.
        spec: From which the policy was loaded.
        tokenizer: Of the policy.
        folder: That holds the adapter.
        its: The reward model's own tokenizer.
        number: Of the adapter, among those that are rewards.

    Returns:
        What scores with it.

    Raises:
        ValueError: If the policy's model is not the one that the adapter was trained on, or cannot bear it.
    """
    instead = "or export the reward model whole (`save_pretrained(folder)`), which is then a model of its own."
    decoder = policy.decoder
    if decoder.has_encoder:
        raise ValueError(
            f"`reward={folder!r}` is an adapter, which shares the policy's model, and {type(decoder.model).__name__} "
            f"has an encoder, whose policy and reward model read differently: use a decoder-only policy, {instead}"
        )
    if decoder.adapters is None:
        raise ValueError(
            f"`reward={folder!r}` is an adapter, which shares the policy's model, and that is about to be trained: "
            f"give the policy an `adapter` too, {instead}"
        )
    read = RewardAdapter.read(folder)
    mine = source_of(spec)
    for field, value in read.source.items():
        if value is not None and not _same(field, value, mine[field]):
            raise ValueError(
                f"`reward={folder!r}` is an adapter of a model with {field}={value!r}, and the policy's has "
                f"{mine[field]!r}: give the policy that model, {instead}"
            )
    _check_tokens(folder, its, tokenizer, instead)
    _check_type(decoder.adapters, read.config, folder, instead)
    name = f"{REWARD}_{number}"
    decoder.adapters.hold(read.config, read.state, name, folder)
    classifier = AdapterClassifier(policy, name, read.head, read.how)
    if read.head["weight"].shape[1] != decoder.width or not _reads_last_states(decoder, policy):
        raise ValueError(
            f"`reward={folder!r}` reads other states than those that {type(decoder.model).__name__} writes from: use "
            f"another model, {instead}"
        )
    return classifier


def _same(field: str, its: Any, mine: Any) -> bool:
    both_are_folders = field == "model" and all(
        mine_or_its and Path(mine_or_its).is_dir() for mine_or_its in (its, mine)
    )
    return os.path.samefile(its, mine) if both_are_folders else its == mine


def _check_tokens(folder: str, its: Any, tokenizer: PreTrainedTokenizerBase, instead: str) -> None:
    """Refuses texts cut into tokens that the one model would not know; a PAD is never read."""
    mine = tokenizer.get_vocab()
    for token, number in sorted(its.get_vocab().items()):
        if mine.get(token) != number and token != its.pad_token:
            raise ValueError(
                f"`reward={folder!r}` is an adapter, which shares the policy's model, and has another tokenizer: "
                f"{token!r} is its token {number}, and the policy's {mine.get(token)}. Train both with one tokenizer, "
                f"{instead}"
            )


def _check_type(adapters: Adapters, its: Any, folder: str, instead: str) -> None:
    """Refuses an adapter that PEFT could not hold beside the policy's, or that was made for changed weights."""
    mine = adapters.config
    if its.peft_type != mine.peft_type or getattr(its, "bias", "none") != "none":
        raise ValueError(
            f"`reward={folder!r}` is an adapter of type {its.peft_type.value} with "
            f"`bias={getattr(its, 'bias', 'none')!r}`, and PEFT holds only such as the policy's beside it, which is "
            f"{mine.peft_type.value} with `bias='none'`: train both alike, {instead}"
        )
    for whose, config in (("The policy's adapter", mine), (f"`reward={folder!r}`", its)):
        if changes_model(config):
            raise ValueError(
                f"{whose} began with `init_lora_weights={config.init_lora_weights!r}`, which takes something off the "
                f"model's weights, so that they cannot be shared: begin at nothing, {instead}"
            )


@torch.no_grad()
def _reads_last_states(decoder: Decoder, policy: Policy) -> bool:
    """Whether the model's head reads what a classifier's would, the last states of the backbone."""
    tokens, mask = decoder.sample()
    was_training = policy.training
    policy.eval()
    try:
        expected = decoder.model.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[:, -1]
        return same_logits(policy.last_states(tokens, mask), expected, spread=1.0)
    finally:
        policy.train(was_training)
