"""Softmax of rows whose logits come part by part."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

READ_AT_ONCE = 2**19
"""Logits that are looked at at once, which a processor's own cache holds."""


class RunningSoftmax:
    r"""Log-probs of chosen entries, and entropies, of rows that are never there as a whole.

    With :math:`m` the largest logit so far, :math:`d = \sum e^{l - m}` and :math:`i = \sum (l - m) e^{l - m}` are
    corrected whenever a larger one comes (`Milakov and Gimelshein, 2018 <https://arxiv.org/abs/1805.02867>`_, algorithm
    3, of which :math:`i` is the same for the entropy).

    Args:
        chosen: Which entry of every row is asked for.
        temperature: What logits are divided by.
        dtype: To compute in.
    """

    def __init__(self, chosen: Int[Tensor, " rows"], temperature: float, dtype: torch.dtype) -> None:
        self.chosen, self.temperature, self.dtype = chosen, temperature, dtype
        self.lowest = torch.finfo(dtype).min
        self.top = torch.full(chosen.shape, self.lowest, dtype=dtype, device=chosen.device)
        self._mass, self._inner, self._logit = (torch.zeros_like(self.top) for _ in range(3))

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
        top = torch.maximum(self.top, logits.amax(-1).to(self.dtype) / self.temperature)
        rows = max(1, READ_AT_ONCE // logits.shape[1])
        for begin in range(0, len(logits), rows):
            self._look_at(logits, top, slice(begin, begin + rows), masses)
        self.top = top

    def _look_at(self, logits: Tensor, top: Tensor, part: slice, masses: Tensor | None) -> None:
        some = logits[part].to(self.dtype)
        shifted = (some if self.temperature == 1.0 else some / self.temperature) - top[part, None]
        # 0 log 0 is 0: what cannot be drawn adds nothing, although its logit is minus infinity.
        shifted.clamp_(min=self.lowest)
        mass = torch.exp(shifted, out=None if masses is None else masses[part])
        fall = self.top[part] - top[part]
        shrunk = fall.exp()
        inner = shifted.mul_(mass).sum(-1)
        self._inner[part] = shrunk * (self._inner[part] + fall * self._mass[part]) + inner
        self._mass[part] = shrunk * self._mass[part] + mass.sum(-1)

    @property
    def log_mass(self) -> Float[Tensor, " rows"]:
        """The logarithm of what exponentials of logits over the temperature are divided by."""
        return self.top + self._mass.log()

    @property
    def logprobs(self) -> Float[Tensor, " rows"]:
        """Of the chosen entries, in nats, once all logits were read."""
        return self._logit - self.top - self._mass.log()

    @property
    def entropy(self) -> Float[Tensor, " rows"]:
        """Of the rows, in nats, once all logits were read."""
        return self._mass.log() - self._inner / self._mass
