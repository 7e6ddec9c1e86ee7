"""Predictions as a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_rlhf.modules.ranks import gather_objects
from lightning_rlhf.strategies.checkpoint_io import replace_synced


class ResponseWriter(Callback):
    """Writes what ``Trainer.predict`` gives to a JSONL file: an object per row with its prompt, metadata and response.

    Rows of all processes come in the order of the data. The file is written beside its place and renamed, when all is
    there; what was of that name is replaced.

    Args:
        path: Of the file; its folder is made if it is missing.

    Example:
        >>> ResponseWriter("out/responses.jsonl").path.name
        'responses.jsonl'
    """

    def __init__(self, path: str | os.PathLike[str] = "responses.jsonl") -> None:
        self.path = Path(path)
        self._rows: list[tuple[int, int, str]] = []  # loader, row, line

    def on_predict_start(self, trainer: L.Trainer, module: Any) -> None:
        """Nothing is there yet."""
        self._rows = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps the rows of a batch."""
        for row in outputs:
            rest = {key: value for key, value in row.items() if key != "row"}
            self._rows.append((dataloader_idx, row["row"], json.dumps(rest, ensure_ascii=False, default=str)))

    def on_predict_end(self, trainer: L.Trainer, module: Any) -> None:
        """Writes those of all processes."""
        rows = sorted(row for rows in gather_objects(self._rows) for row in rows)
        self._rows = []
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(f".{self.path.name}.tmp")
            beside.write_text("".join(f"{line}\n" for *_, line in rows), encoding="utf-8")
            replace_synced(beside, self.path)
