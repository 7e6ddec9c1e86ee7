"""The project's training script."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_rlhf.examples.existing_project.project import Imitator, Sums, build_network, build_tokenizer


def main(folder: str = "outputs/existing_project", max_epochs: int = 20, **flags: Any) -> L.Trainer:
    """Trains.

    Args:
        folder: For logs and checkpoints.
        max_epochs: Passes over the sums.
        **flags: Of the Trainer.

    Returns:
        The trainer, when it is done.
    """
    L.seed_everything(0)
    module = Imitator(build_network(), build_tokenizer())
    trainer = L.Trainer(
        max_epochs=max_epochs,
        logger=CSVLogger(folder),
        callbacks=[ModelCheckpoint(monitor="val_loss", mode="min"), LearningRateMonitor("step")],
        log_every_n_steps=1,
        **flags,
    )
    trainer.fit(module, datamodule=Sums())
    return trainer


if __name__ == "__main__":
    main()
