"""What callbacks share that do something every so many iterations."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback


class DueCallback(Callback):
    """Something to be done every so many iterations, from the first on.

    Args:
        every_n_iterations: How often.
    """

    def __init__(self, every_n_iterations: int = 1) -> None:
        if every_n_iterations < 1:
            raise ValueError(f"`every_n_iterations={every_n_iterations}` must be at least 1.")
        self.every_n_iterations = every_n_iterations

    def is_due(self, module: Any) -> bool:
        """Whether it is to be done in the present iteration; the same on all processes.

        Args:
            module: That is trained.
        """
        return module.iteration % self.every_n_iterations == 0
