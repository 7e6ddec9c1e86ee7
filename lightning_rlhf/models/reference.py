"""The frozen model that a policy must not stray from."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.weights import load_whole_state, whole, whole_state


class Reference:
    """A frozen policy, out of sight of whatever looks for modules to train, save or shard.

    Args:
        network: All that it has of its own; frozen here.
        is_named: Whether a name or folder says where its weights come from; if not, they are part of its state.
    """

    def __init__(self, network: nn.Module, is_named: bool) -> None:
        self.network = network.requires_grad_(False).eval()
        self.is_named = is_named
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
        decoder = Decoder(copy.deepcopy(policy.decoder.model))
        for name in ("pads", "caches", "chooses", "is_plain", "unpads", "shares", "blocks"):
            setattr(decoder, name, getattr(policy.decoder, name))
        return cls(Policy(decoder, policy.temperature), is_named)

    def read(self, batch: Rollouts) -> Tensor:
        """Log-probs of responses, in one forward pass.

        Args:
            batch: What was written.

        Returns:
            (batch, response), anything in the padding.
        """
        return self.network(batch).logprobs

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, batch_size: int, most: int = 0) -> Float[Tensor, "batch response"]:
        """Log-probs of responses under the reference.

        Args:
            rollouts: What was written.
            batch_size: Rows of a forward pass; rows of alike length go together.
            most: Rows of the process that has most: where weights are sharded, all must make as many passes.

        Returns:
            At the policy's temperature, 0 in the padding.
        """
        logprobs = torch.zeros_like(rollouts.old_logprobs)
        pieces = list(rollouts.response_mask.sum(1).argsort(stable=True).split(batch_size))
        pieces += pieces[:1] * (-(-most // batch_size) - len(pieces))
        for rows in pieces:
            piece = rollouts.select(rows).trimmed()
            logprobs[rows, : piece.response_mask.shape[1]] = self.read(piece).float()
        return torch.where(rollouts.response_mask, logprobs, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: a fingerprint, and the weights where they could not be had again."""
        self._fingerprint = self._fingerprint or fingerprint(self.network)
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
        self._fingerprint = fingerprint(self.network)
        if self._fingerprint != self._expected:
            raise ValueError(
                "`reference` is not the one that the checkpoint was trained against: its weights differ. Resume with "
                "the model that the run began with."
            )
        self._expected = None


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A short name for a module's weights: equal for equal weights, on any device, sharded or not; then a collective.

    Args:
        module: Any module.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
