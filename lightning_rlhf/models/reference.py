"""The frozen model that a policy must not stray from."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.models.offloading import fetched
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.weights import load_whole_state, whole, whole_state


class Reference:
    """A frozen policy, out of sight of whatever looks for modules to train, save or shard.

    Args:
        network: All that it has of its own; frozen here.
        is_named: Whether a name or folder says where its weights come from; if not, they are part of its state.

    Attributes:
        waits: Whether it is in host memory while it is not asked.
    """

    def __init__(self, network: nn.Module, is_named: bool) -> None:
        self.network = network.requires_grad_(False).eval()
        self.is_named = is_named
        self.waits = False
        self._fingerprint: str | None = None  # of weights that do not change, and may take minutes to read
        self._expected: str | None = None  # what a checkpoint said

    @classmethod
    def copied_from(cls, policy: Policy, is_named: bool) -> Reference:
        """A reference that is a full copy of the policy as it is now, without the value head.

        Args:
            policy: Left as it is.
            is_named: As above.

        Returns:
            The reference.
        """
        decoder = copy.deepcopy(policy.decoder)
        decoder.trunk, decoder.is_compiled = None, False  # all of it runs, and a copy is not compiled
        return cls(Policy(decoder, policy.temperature), is_named)

    @property
    def reader(self) -> Policy:
        """Whose forward pass it is."""
        assert isinstance(self.network, Policy)
        return self.network

    def in_place(self) -> AbstractContextManager[None]:
        """For as long as it reads, the weights are its own."""
        return nullcontext()

    def logprobs(
        self, rollouts: Rollouts, size: int, tokens: int | None = None, most: Callable[[int], int] = int
    ) -> Float[Tensor, "batch response"]:
        """Log-probs of responses under the reference, at the policy's temperature.

        Args:
            rollouts: What was written.
            size: As in :meth:`Policy.scored`.
            tokens: Likewise.
            most: Likewise.

        Returns:
            In single precision or more, 0 in the padding.
        """
        here = fetched(self.network, rollouts.response_mask.device) if self.waits else nullcontext()
        with here, self.in_place():
            return self.reader.scored(rollouts, size, tokens, most)

    def weights(self) -> Mapping[str, Tensor]:
        """All that it has of its own, by name."""
        return self.network.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: a fingerprint, and the weights where they could not be had again."""
        self._fingerprint = self._fingerprint or fingerprint(self.weights())
        state: dict[str, Any] = {"fingerprint": self._fingerprint}
        if not self.is_named:
            state["weights"] = whole_state(self.network)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes saved weights back; :meth:`check` then says whether they are what was saved.

        Args:
            state: From :meth:`state_dict`.
        """
        if "weights" in state:
            load_whole_state(self.network, state["weights"])
        self._fingerprint, self._expected = None, state["fingerprint"]

    def check(self) -> None:
        """Makes sure that a resumed run has the reference that it began with.

        To be called when the weights have the type in which they are used, since that is how they were saved.

        Raises:
            ValueError: If it has another.
        """
        if self._expected is None:
            return
        self._fingerprint = fingerprint(self.weights())
        if self._fingerprint != self._expected:
            raise ValueError(
                "`reference` is not the one that the checkpoint was trained against: its weights differ. Resume with "
                "the model that the run began with."
            )
        self._expected = None


@torch.no_grad()
def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """A short name for weights: equal for equal ones, on any device, sharded or not; then a collective.

    Args:
        weights: By name, or a module's.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
