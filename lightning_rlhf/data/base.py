"""What all DataModules share: rows, a tokenizer that the module brings, and a place that is remembered."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Sampler

from lightning_rlhf.batches import Batch
from lightning_rlhf.data.cursor import Cursor, CursorSampler
from lightning_rlhf.data.evaluation import EvaluationSampler
from lightning_rlhf.data.settled import settled_batches

_WRONG_ADVICE = (
    ".*does not have many workers",  # few are right for rows that only need padding
    "You're resuming from a checkpoint that ended before the epoch ended",  # the place is kept, if not by them
)
"""What Lightning warns of that does not hold for these loaders."""


def run_seed(seed: int | None) -> int:
    """A seed as given, or what ``seed_everything`` set, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


class RLHFDataModule(L.LightningDataModule, ABC):
    """Rows that become batches once a module has brought its tokenizer.

    Args:
        rows: The training data; None where there is only something to evaluate.
        batch_size: Rows of a batch, per process, in training and evaluation.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the orders; what ``seed_everything`` set, else 0, by default.
        num_workers: Processes that collate.
        held_out: Rows that are not learnt from, as ``"validation"``, ``"test"`` and ``"predict"``.

    Attributes:
        tokenizer: Of the module that is trained, which sets it; or set it yourself.
        max_tokens: How long a row may be, in tokens; the module sets it, None is no limit.
        has_encoder: Whether the model reads prompts with an encoder; the module sets it. Prompts then have the special
            tokens at their end too that the tokenizer puts there, and ``max_tokens`` is theirs alone.
        max_response_tokens: How long a response may then be; the module sets it, None is no limit.
    """

    argument: str  # what the user calls the training data, for errors

    def __init__(
        self,
        rows: Sequence[Any] | None,
        *,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
        held_out: Mapping[str, Sequence[Any] | None] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` must be at least 1.")
        self.rows = rows
        self.held_out = {name: some for name, some in (held_out or {}).items() if some is not None}
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = run_seed(seed)
        self.num_workers = num_workers
        self.tokenizer: Any = None
        self.max_tokens: int | None = None
        self.has_encoder = False
        self.max_response_tokens: int | None = None
        self.cursor = Cursor()
        self._settled = Cursor()  # the place behind which everything is in the weights
        self._due = 0  # batches that training has finished once the last one that was read is

    @abstractmethod
    def tokenized(self, row: Any, what: str) -> Any:
        """Turns a row into tokens; called once a row, before the first batch.

        Args:
            row: As the user gave it.
            what: The row, for errors.

        Returns:
            What :meth:`collate` puts together.
        """

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> Batch:
        """Puts what :meth:`tokenized` returned side by side.

        Args:
            items: One a row.

        Returns:
            The batch.
        """

    def train_dataloader(self) -> DataLoader:
        """A plain loader over the rows, from the cursor on."""
        if self.rows is None:
            raise ValueError(
                f"`{self.argument}` is not given to {type(self).__name__}: there is nothing to learn from."
            )
        self._due = 0
        items = self._items(self.argument, self.rows)
        bins = self.binned(items)
        if bins is not None:
            sampler = CursorSampler(bins, self.cursor, 1, self.shuffle, self.seed, *self._place)
            return self._loader(bins, sampler, 1, self._collate_bin)
        sampler = CursorSampler(items, self.cursor, self.batch_size, self.shuffle, self.seed, *self._place)
        return self._loader(items, sampler, self.batch_size, self.collate)

    def binned(self, items: list[Any]) -> list[list[Any]] | None:
        """Which rows make a batch of the training data; None where ``batch_size`` says it.

        Args:
            items: What :meth:`tokenized` returned, one a row.

        Returns:
            Batches, whose order is shuffled every epoch, or None.
        """
        return None

    def _collate_bin(self, bins: Sequence[list[Any]]) -> Batch:
        return self.collate(bins[0])

    @property
    def val_dataloader(self) -> Callable[[], Any]:
        """A plain loader over ``validation``, in order; Lightning's own method, which it takes for none, without."""
        if "validation" not in self.held_out:
            return super().val_dataloader
        return functools.partial(self._held_out_loader, "validation", "validate")

    def setup(self, stage: str) -> None:
        """Misses the validation data, as the other loaders do theirs, unless a subclass has its own."""
        has_own = type(self).val_dataloader is not RLHFDataModule.val_dataloader
        if stage == "validate" and "validation" not in self.held_out and not has_own:
            self._held_out_loader("validation", "validate")

    def test_dataloader(self) -> DataLoader:
        """A plain loader over ``test``, in order."""
        return self._held_out_loader("test", "test")

    def predict_dataloader(self) -> DataLoader:
        """A plain loader over ``predict``, in order."""
        return self._held_out_loader("predict", "predict")

    def _held_out_loader(self, name: str, verb: str) -> DataLoader:
        if name not in self.held_out:
            takes = name in inspect.signature(type(self)).parameters
            remedy = f"pass `{name}=`" if takes else f"PromptDataModule takes `{name}=`"
            raise ValueError(f"`{name}` is not given to {type(self).__name__}, and `{verb}` needs rows: {remedy}.")
        items = self._items(name, self.held_out[name])
        return self._loader(items, EvaluationSampler(items, *self._place), self.batch_size, self.collate)

    @property
    def _place(self) -> tuple[int, int]:
        """Number of processes, and of this one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _items(self, argument: str, rows: Sequence[Any]) -> list[Any]:
        if self.tokenizer is None:
            raise ValueError(
                "`tokenizer` is not set: fit with an RLHF module, which brings its own, or set `datamodule.tokenizer`."
            )
        return [self.tokenized(row, f"`{argument}[{number}]`") for number, row in enumerate(rows)]

    def _loader(self, items: list[Any], sampler: Sampler, batch_size: int, collate: Any) -> DataLoader:
        for advice in _WRONG_ADVICE:
            warnings.filterwarnings("ignore", message=advice)
        return DataLoader(
            items,  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Moves the cursor: fires once for every batch that training consumes, before its step."""
        if self.trainer is not None and self.trainer.training:
            if self._is_settled():
                self._settled = replace(self.cursor)
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
            self._due = progress.total.processed + 1
            self.cursor.advance(int(self.trainer.num_training_batches))
        return batch

    def _is_settled(self) -> bool:
        """Whether what was read is in the weights, and not a batch that is under way."""
        if self.trainer is None:
            return True
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.processed >= self._due and settled_batches(self.trainer) == progress.current.ready

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, up to which everything is in the weights."""
        place = self.cursor if self._is_settled() else self._settled
        return {"epoch": place.epoch, "position": place.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to a saved place."""
        self.cursor.epoch, self.cursor.position = state_dict["epoch"], state_dict["position"]

    def check_length(self, prompt: int, response: int, what: str) -> None:
        """Refuses a row that the model cannot read.

        Args:
            prompt: Its tokens.
            response: Likewise; 0 where there is none yet.
            what: The row, for the error.

        Raises:
            ValueError: If it is too long.
        """
        parts = [(prompt + response, self.max_tokens, "tokens")]
        if self.has_encoder:
            parts = [(prompt, self.max_tokens, "tokens"), (response, self.max_response_tokens, "tokens of response")]
        for length, room, tokens in parts:
            if room is not None and length > room:
                raise ValueError(
                    f"{what} has {length} {tokens}, and the model has room for {room}: shorten it or leave it out."
                )
