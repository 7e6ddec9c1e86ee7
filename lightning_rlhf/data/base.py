"""What all DataModules share: rows, a tokenizer that the module brings, and a place that is remembered."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_rlhf.batches import Batch
from lightning_rlhf.chance import run_seed
from lightning_rlhf.data.cursor import CursorSampler
from lightning_rlhf.data.evaluation import EvaluationSampler
from lightning_rlhf.data.limits import Limits, Side, TooLong
from lightning_rlhf.data.place import PlacedDataModule
from lightning_rlhf.data.reader import Reader
from lightning_rlhf.data.selection import Deduplicate, Rows
from lightning_rlhf.data.streaming import Stream
from lightning_rlhf.data.tokens import Tokenized

_WRONG_ADVICE = (
    ".*does not have many workers",  # few are right for rows that only need padding
    "You're resuming from a checkpoint that ended before the epoch ended",  # the place is kept, if not by them
)
"""What Lightning warns of that does not hold for these loaders."""


class RLHFDataModule(PlacedDataModule, ABC):
    """Rows that become batches once a module has brought its tokenizer.

    Args:
        rows: The training data: a list, the path of a file, a data set of Hugging Face, or a stream (what can be read
            again and again and has no length); None where there is only something to evaluate.
        held_out: Rows that are not learnt from, as ``"validation"``, ``"test"`` and ``"predict"``.
        columns: The rows' own names for the keys that are read, where they differ.
        validation_share: Of the rows, that is held out to validate on instead of ``validation``. All rows of a prompt
            are on one side.
        split_seed: Says which; another one than ``seed``, so that runs with different seeds are measured on the same.
        deduplicate: Keeps the first of rows whose texts are equal (``"exact"``), or equal but for case, white space and
            forms of characters (``"normalized"``). Metadata does not count.
        max_length: How many tokens a prompt and a response may have together; by default what the model has room for.
        max_prompt_length: How many a prompt may have.
        max_response_length: How many a response may have, its EOS included.
        too_long: Whether a longer row is an ``"error"`` or is left out (``"drop"``).
        truncate: Which parts are cut to fit instead, and on which side: ``{"prompt": "left", "response": "right"}``,
            or one of these; a prompt may be cut on the right too. Where both are too long together, the prompt is cut
            first. A response that is cut ends without EOS.
        batch_size: Rows of a batch, per process, in training and evaluation.
        shuffle: Whether every epoch has an order of its own; a stream keeps its own.
        seed: Of the orders; what ``seed_everything`` set, else 0, by default.
        num_workers: Processes that collate.
        cache_dir: A folder for rows in tokens, from which later runs take them; a stream's are not kept.

    Attributes:
        dropped: Of each of the arguments that hold rows, how many were left out because of what: ``"duplicate"``, or
            the part that was too long.
        truncated: Likewise, how many prompts and responses were cut.
        tokenizer: Of the module that is trained, which sets it; or set it yourself.
        max_tokens: How long a row may be, in tokens; the module sets it, None is no limit.
        has_encoder: Whether the model reads prompts with an encoder; the module sets it. Prompts then have the special
            tokens at their end too that the tokenizer puts there, and ``max_tokens`` is theirs alone.
        max_response_tokens: How long a response may then be; the module sets it, None is no limit.
    """

    argument: str  # what the user calls the training data, for errors
    keys: tuple[str, ...]  # what is read of a row
    text_key = "prompt"  # what an item that is no dict stands for
    has_responses = True  # whether a row has any

    def __init__(
        self,
        rows: Any,
        *,
        held_out: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        validation_share: float = 0.0,
        split_seed: int = 0,
        deduplicate: Deduplicate | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        max_response_length: int | None = None,
        too_long: TooLong = "error",
        truncate: Mapping[str, Side] | None = None,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` must be at least 1.")
        self.columns = dict(columns or {})
        for key in self.columns:
            if key not in self.keys:
                raise ValueError(f"`columns` names {key!r}, which must be one of {', '.join(map(repr, self.keys))}.")
        if not self.has_responses and (max_response_length is not None or "response" in (truncate or {})):
            raise ValueError(
                f"`max_response_length` and `truncate=...` of a response are for rows that have one, and those of "
                f"{type(self).__name__} have none: leave them out."
            )
        own = {"prompt": max_prompt_length, "response": max_response_length, "row": max_length}
        self.limits = Limits(own, too_long, dict(truncate or {}))
        self.deduplicate = deduplicate
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = run_seed(seed)
        self.num_workers = num_workers
        self.tokenizer: Any = None
        self.max_tokens: int | None = None
        self.has_encoder = False
        self.max_response_tokens: int | None = None
        self._reader = Reader(self, cache_dir)
        self.rows = self._reader.read(rows, self.argument, streams=True)
        if isinstance(self.rows, Stream) and num_workers:
            raise ValueError(
                f"`num_workers={num_workers}`: `{self.argument}` is a stream, which each would read: leave it 0."
            )
        held_out = {name: self._reader.read(some, name) for name, some in (held_out or {}).items()}
        self.held_out = {name: some for name, some in held_out.items() if some is not None}
        if validation_share:
            self._reader.hold_out(validation_share, split_seed)
        kept = [some for some in (self.rows, *self.held_out.values()) if isinstance(some, Rows)]
        self.metadata_keys = sorted({key for some in kept for row in some for key in self.metadata(row)})

    @property
    def dropped(self) -> dict[str, Counter[str]]:
        """How many rows were left out because of what, by argument."""
        return self._reader.dropped

    @property
    def truncated(self) -> dict[str, Counter[str]]:
        """How many prompts and responses were cut, by argument."""
        return self._reader.truncated

    @abstractmethod
    def parsed(self, row: dict[str, Any], place: str) -> Sequence[Any]:
        """Makes of what was read what is kept; called once a row.

        Args:
            row: Its keys and values.
            place: Where it is from, for errors.

        Returns:
            The rows that it stands for, mostly one.
        """

    @abstractmethod
    def texts(self, row: Any) -> Sequence[Any]:
        """What a row consists of, for telling rows apart: all that tokens are made of.

        Args:
            row: From :meth:`parsed`.

        Returns:
            The prompt, then the rest.
        """

    def metadata(self, row: Any) -> Mapping[str, Any]:
        """What a row says beside that, which goes into batches.

        Args:
            row: From :meth:`parsed`.

        Returns:
            Nothing by default.
        """
        return {}

    @property
    def reading(self) -> tuple[Any, ...]:
        """What the tokens of a row depend on, but for the row and the tokenizer."""
        return (self.has_encoder,)

    def columns_of(self, items: Sequence[Tokenized]) -> dict[str, list[Any]]:
        """The metadata of a batch; a key that a row lacks is None.

        Args:
            items: Its rows.

        Returns:
            A list a key: all keys that any row of the data has, or of a stream those of the batch.
        """
        rows = [self.metadata(item.row) for item in items]
        keys = sorted({key for row in rows for key in row}) if isinstance(self.rows, Stream) else self.metadata_keys
        return {key: [row.get(key) for row in rows] for key in keys}

    @abstractmethod
    def tokenized(self, row: Any, what: str) -> Tokenized:
        """Turns a row into tokens; called once a row, before the first batch.

        Args:
            row: From :meth:`parsed`.
            what: Where it is from, for errors.

        Returns:
            What :meth:`collate` puts together.
        """

    @abstractmethod
    def collate(self, items: Sequence[Tokenized]) -> Batch:
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
        if isinstance(self.rows, Stream):
            self._check_tokenizer()
            self.rows.begin(self._reader.streamed, self.cursor, self.batch_size, *self._place)
            return self._loader(self.rows, None, self.batch_size, self.collate)
        items = self._items(self.argument, self.rows)
        bins = self.binned(items)
        if bins is not None:
            sampler = CursorSampler(bins, self.cursor, 1, self.shuffle, self.seed, *self._place)
            return self._loader(bins, sampler, 1, self._collate_bin)
        sampler = CursorSampler(items, self.cursor, self.batch_size, self.shuffle, self.seed, *self._place)
        return self._loader(items, sampler, self.batch_size, self.collate)

    def binned(self, items: list[Tokenized]) -> list[list[Tokenized]] | None:
        """Which rows make a batch of the training data; None where ``batch_size`` says it.

        Args:
            items: What :meth:`tokenized` returned, one a row.

        Returns:
            Batches, whose order is shuffled every epoch, or None.
        """
        return None

    def _collate_bin(self, bins: Sequence[list[Tokenized]]) -> Batch:
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

    def _items(self, argument: str, rows: Rows) -> list[Tokenized]:
        self._check_tokenizer()
        return self._reader.items(argument, rows)

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError(
                "`tokenizer` is not set: fit with an RLHF module, which brings its own, or set `datamodule.tokenizer`."
            )

    def _loader(self, items: Dataset | list[Any], sampler: Sampler | None, batch_size: int, collate: Any) -> DataLoader:
        for advice in _WRONG_ADVICE:
            warnings.filterwarnings("ignore", message=advice)
        return DataLoader(
            items,  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
        )
