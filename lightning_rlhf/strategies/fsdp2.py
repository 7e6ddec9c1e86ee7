"""FSDP2 for modules that hold several models."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.distributed.constants import default_pg_timeout

from lightning_rlhf.strategies.checkpoint_io import replace_folder

NAME = "rlhf_fsdp2"
"""What the Trainer knows the strategy by."""


class RLHFStrategy(ModelParallelStrategy):
    """FSDP2 over all processes: ``Trainer(strategy="rlhf_fsdp2")``.

    Policy, reference and reward models are sharded block by block. Runs on GPUs with NCCL and on CPUs with gloo alike.

    Args:
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each process writes its shards; if not,
            process 0 puts one file together, for which it needs memory of twice the size.
        process_group_backend: As in Lightning.
        timeout: As in Lightning.
        hold_weights: Whether the policy is whole on every process while it writes, so that none waits for another at
            every token. If not, it needs no more memory than it does in training, and is gathered for every token.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        hold_weights: bool = True,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.hold_weights = hold_weights

    def setup_environment(self) -> None:
        """Starts the processes' group, with all of them side by side."""
        self._data_parallel_size = self.num_nodes * self.num_processes  # by default it would be the number of nodes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a folder beside its target and renames it; a file goes the way of all files."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        target = Path(self.broadcast(filepath))
        unfinished = target.with_name(target.name + ".tmp")
        if self.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, unfinished, storage_options)
        except BaseException:
            if self.is_global_zero:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self.barrier()
        if self.is_global_zero:
            replace_folder(unfinished, target)
        self.barrier()


def check_strategy(trainer: L.Trainer) -> None:
    """Refuses strategies that cannot train these modules, and sets what sharded weights need.

    Args:
        trainer: Before it sets anything up.

    Raises:
        ValueError: If its strategy is FSDP1, or tensor parallel.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"`Trainer(strategy='fsdp')` is FSDP1, which cannot train these modules: use `strategy={NAME!r}`, which is "
            "FSDP2."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if not isinstance(strategy, RLHFStrategy) and strategy._tensor_parallel_size != 1:
        raise ValueError(
            f"`Trainer(strategy=ModelParallelStrategy(tensor_parallel_size={strategy._tensor_parallel_size!r}))` would "
            f"split layers, which is not supported: use `strategy={NAME!r}`, which shards over all processes."
        )
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False  # what is gathered in inference mode can never be trained


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, RLHFStrategy, description="FSDP2 for the modules of lightning_rlhf")
