"""Two packages that are one library: ``lightning``, which this one uses, and ``pytorch_lightning``."""

from __future__ import annotations

import sys

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

_OTHER = "pytorch_lightning"


def warn_of_the_other(module: str) -> None:
    """Warns where ``pytorch_lightning`` is imported too: its Trainer takes our modules for no LightningModules.

    Args:
        module: The name of the class that is made.
    """
    if _OTHER in sys.modules:
        rank_zero_warn(
            f"`{_OTHER}` is imported, whose Trainer refuses {module} as no `LightningModule`: write `import "
            "lightning.pytorch as pl` instead, in this project and for its DataModules and callbacks."
        )


def check_datamodule(trainer: L.Trainer) -> None:
    """Refuses a DataModule of the other package before Lightning stumbles over it.

    Args:
        trainer: That it was given to.

    Raises:
        TypeError: If it is one.
    """
    data = getattr(trainer, "datamodule", None)
    if data is not None and any(base.__module__.startswith(_OTHER) for base in type(data).__mro__):
        raise TypeError(
            f"`datamodule={type(data).__name__}` is a DataModule of `{_OTHER}`, and the Trainer is one of `lightning`: "
            "write `import lightning.pytorch as pl` where it is defined."
        )
