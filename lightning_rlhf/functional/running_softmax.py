"""Softmax of rows whose logits come part by part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class RunningSoftmax:
    r"""Log-probs of chosen entries, and entropies, of rows that are never there as a whole.

    With :math:`m` the largest logit so far, :math:`d = \sum e^{l - m}` and :math:`i = \sum (l - m) e^{l - m}` are
    corrected whenever a larger one comes (`Milakov and Gimelshein, 2018 <https://arxiv.org/abs/1805.02867>`_, algorithm
    3, of which :math:`i` is the same for the entropy).

    Args:
        chosen: Which entry of every row is asked for.
        temperature: What logits are divided by.
        dtype: To compute in.
        at_once: How many logits are looked at at once, but at least those of a row.

    Attributes:
        top: :math:`m`, of every row.
        mass: :math:`d`, likewise.
    """

    def __init__(
        self, chosen: Int[Tensor, " rows"], temperature: float, dtype: torch.dtype, at_once: int = 2**19
    ) -> None:
        self.chosen, self.temperature, self.dtype, self.at_once = chosen, temperature, dtype, at_once
        self.lowest = torch.finfo(dtype).min
        self.top = torch.full(chosen.shape, self.lowest, dtype=dtype, device=chosen.device)
        self.mass, self._inner, self._logit = (torch.zeros_like(self.top) for _ in range(3))

    def add(
        self, logits: Float[Tensor, "rows entries"], start: int, masses: Float[Tensor, "rows entries"] | None = None
    ) -> None:
        """Reads the next part.

        Args:
            logits: Of entries that were not read before.
            start: Which entry is the first of them.
            masses: Filled with :math:`e^{l - m}`, where that is wanted, with ``m`` as :attr:`top` says from then on.
        """
        inside = (self.chosen >= start) & (self.chosen < start + logits.shape[1])
        found = logits.gather(1, torch.where(inside, self.chosen - start, 0)[:, None]).squeeze(1)
        self._logit = torch.where(inside, found.to(self.dtype) / self.temperature, self._logit)
        self.top = self.top.clone()  # the one before is what masses were divided by
        rows = max(1, self.at_once // logits.shape[1])
        for begin in range(0, len(logits), rows):
            part = slice(begin, begin + rows)
            self._look_at(logits[part], part, None if masses is None else masses[part])

    def _look_at(self, logits: Tensor, part: slice, masses: Tensor | None) -> None:
        some = logits.to(self.dtype)
        some = some if self.temperature == 1.0 else some / self.temperature
        top = torch.maximum(self.top[part], some.amax(-1))
        # 0 log 0 is 0: what cannot be drawn adds nothing, although its logit is minus infinity.
        shifted = (some - top[:, None]).clamp_(min=self.lowest)
        mass = torch.exp(shifted, out=masses)
        fall = self.top[part] - top
        shrunk = fall.exp()
        inner = shifted.mul_(mass).sum(-1)
        self._inner[part] = shrunk * (self._inner[part] + fall * self.mass[part]) + inner
        self.mass[part] = shrunk * self.mass[part] + mass.sum(-1)
        self.top[part] = top

    def outputs(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What all logits say, once they were read.

        Args:
            shape: Of rows.

        Returns:
            Log-probs of the chosen entries, and entropies, in nats: tensors of their own and no views, of which FSDP2
            would warn where a function returns them.
        """
        log_mass = self.mass.log()
        found = self._logit - self.top - log_mass, log_mass - self._inner / self.mass
        logprobs, entropy = (torch.empty(shape, dtype=self.dtype, device=self.top.device) for _ in found)
        logprobs.view(-1).copy_(found[0])
        entropy.view(-1).copy_(found[1])
        return logprobs, entropy


def exponentials(
    logits: Float[Tensor, "rows entries"], top: Float[Tensor, " rows"], temperature: float
) -> Float[Tensor, "rows entries"]:
    """:math:`e^{l - m}` of logits, once more.

    Args:
        logits: In the dtype to compute in; they become the result.
        top: As :class:`RunningSoftmax` has it at the end.
        temperature: What logits are divided by.

    Returns:
        The same tensor.
    """
    return logits.div_(temperature).sub_(top[:, None]).exp_()
