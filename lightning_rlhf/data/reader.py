"""From what a user has to rows in tokens: read, told apart, cut or left out, and counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_rlhf.data.formats import Row, located, located_rows
from lightning_rlhf.data.hugging_face import opened
from lightning_rlhf.data.selection import Rows, Unique, split
from lightning_rlhf.data.streaming import Stream, is_stream
from lightning_rlhf.data.token_cache import TokenCache
from lightning_rlhf.data.tokens import Tokenized

if TYPE_CHECKING:
    from lightning_rlhf.data.base import RLHFDataModule


class Reader:
    """Reads the rows of a DataModule, and makes tokens of them once.

    Args:
        data: Says what a row is, and what is wanted.
        cache_dir: Where rows in tokens are kept for later runs; None: nowhere.

    Attributes:
        dropped: By argument, how many rows were left out because of what.
        truncated: By argument, how many prompts and responses were cut.
    """

    def __init__(self, data: RLHFDataModule, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self.data = data
        self._cache = None if cache_dir is None else TokenCache(cache_dir)
        self.dropped: dict[str, Counter[str]] = {}
        self.truncated: dict[str, Counter[str]] = {}
        self._duplicates: dict[str, int] = {}
        self._made: dict[str, tuple[Any, Any, list[Any], list[Tokenized]]] = {}
        self._told: set[str] = set()

    def read(self, source: Any, argument: str, streams: bool = False) -> Rows | Stream | None:
        """Reads all rows, or says that they are read later.

        Args:
            source: What a user gave.
            argument: What the user calls it, for errors.
            streams: Whether a stream is left as it is; else it is read to its end.

        Returns:
            The rows; None where nothing was given.
        """
        unique = Unique(self.data.deduplicate)
        if source is None:
            return None
        source = opened(source, argument)
        if streams and is_stream(source):
            return Stream(source, argument)
        rows, places, count = [], [], 0
        for row, place in self._parsed(located_rows(source, argument, self.data.text_key)):
            count += 1
            if unique.is_new(self.data.texts(row)):
                rows.append(row)
                places.append(place)
        self._duplicates[argument] = count - len(rows)
        return Rows(rows, places)

    def hold_out(self, share: float, seed: int) -> None:
        """Takes a share of the DataModule's rows to validate on.

        Args:
            share: Of the rows.
            seed: Of the split.

        Raises:
            ValueError: If that cannot be, or rows to validate on are there already.
        """
        data = self.data
        if not 0.0 < share < 1.0:
            raise ValueError(f"`validation_share={share}` must be between 0 and 1.")
        if "validation" in data.held_out:
            raise ValueError(f"`validation_share={share}` and `validation` both say what is held out: leave one out.")
        if not isinstance(data.rows, Rows):
            raise ValueError(
                f"`validation_share={share}` needs all rows of `{data.argument}` at once, and they are not given, or a "
                "stream: give `validation=`."
            )
        prompts = [data.texts(row)[0] for row in data.rows]
        data.rows, data.held_out["validation"] = split(data.rows, prompts, share, seed, data.argument)

    def items(self, argument: str, rows: Rows) -> list[Tokenized]:
        """Rows in tokens; made anew only for another tokenizer or model.

        Args:
            argument: What the user calls the rows.
            rows: From :meth:`read`.

        Returns:
            Those that fit, in order.

        Raises:
            ValueError: If a row is too long, or all are left out.
        """
        data, how = self.data, (self._room(), self.data.reading)
        tokenizer, of_how, of_rows, items = self._made.get(argument, (None, None, [], []))
        if tokenizer is data.tokenizer and of_how == how and of_rows is rows:
            return items
        dropped, cut = self._begin(argument)
        items = list(self._fitted(self._whole(rows), dropped, cut))
        self._tell(argument, len(rows) + self._duplicates.get(argument, 0))
        if not items:
            raise ValueError(
                f"`{argument}`: all {len(rows)} rows are too long: raise the limits ({data.limits}), or let rows be "
                "cut, by `truncate`."
            )
        self._made[argument] = data.tokenizer, how, rows, items
        return items

    def _whole(self, rows: Rows) -> Iterable[Tokenized]:
        """Rows in tokens, however long; from the folder that keeps them, if there is one."""
        data = self.data
        if self._cache is None:
            return map(self._tokenized, rows, rows.places)
        kind = type(data)
        how = [kind.__module__, kind.__qualname__, *data.reading]
        path = self._cache.path(data.tokenizer, how, map(data.texts, rows))
        items = self._cache.read(path, rows, rows.places)
        if items is not None and any(
            _tokens(items[i]) != _tokens(self._tokenized(rows[i], rows.places[i])) for i in _some(len(items))
        ):
            rank_zero_warn(
                f"{path} in `cache_dir` holds other tokens than its rows have now, and is made anew: `tokenized` or "
                "the tokenizer has changed in what neither `texts` nor `reading` says, nor `save_pretrained` saves."
            )
            items = None
        if items is None:
            items = list(map(self._tokenized, rows, rows.places))
            self._cache.write(path, items)
        return items

    def streamed(self, source: Iterable[Any]) -> Iterator[Tokenized]:
        """A stream's rows in tokens, made while they are read.

        Args:
            source: The stream.

        Yields:
            Those that fit.
        """
        argument, count = self.data.argument, 0
        unique = Unique(self.data.deduplicate)
        dropped, cut = self._begin(argument)
        for row, place in self._parsed(located(source, argument, self.data.text_key)):
            count += 1
            if unique.is_new(self.data.texts(row)):
                yield from self._fitted([self._tokenized(row, place)], dropped, cut)
            else:
                dropped["duplicate"] += 1
        self._tell(argument, count)

    def _parsed(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[Any, str]]:
        for place, row in rows:
            for parsed in self.data.parsed(row, place):
                yield parsed, place

    def _tokenized(self, row: Any, place: str) -> Tokenized:
        return self.data.tokenized(row, place)._replace(place=place)

    def _fitted(self, items: Iterable[Tokenized], dropped: Counter[str], cut: Counter[str]) -> Iterator[Tokenized]:
        data, room = self.data, self._room()
        begin = (getattr(data.tokenizer, name, None) for name in ("bos_token_id", "cls_token_id"))
        first = next((token for token in begin if token is not None), None)
        ends = (first, getattr(data.tokenizer, "eos_token_id", None) if data.has_encoder else None)
        for whole in items:
            item, parts, excess = data.limits.fit(whole, room, ends)
            if excess is None:
                cut.update(parts)
                yield item
            elif data.limits.too_long == "drop":
                dropped[excess.part] += 1
            else:
                raise ValueError(f"{item.place} {excess}")

    def _room(self) -> dict[str, int | None]:
        """What the model has room for, part by part."""
        if self.data.has_encoder:
            return {"prompt": self.data.max_tokens, "response": self.data.max_response_tokens}
        return {"row": self.data.max_tokens}

    def _begin(self, argument: str) -> tuple[Counter[str], Counter[str]]:
        duplicates = self._duplicates.get(argument, 0)
        self.dropped[argument] = Counter({"duplicate": duplicates} if duplicates else {})
        self.truncated[argument] = Counter()
        return self.dropped[argument], self.truncated[argument]

    def _tell(self, argument: str, count: int) -> None:
        """Says once what was left out and cut."""
        dropped, cut = self.dropped[argument], self.truncated[argument]
        if argument in self._told or not (dropped or cut):
            return
        self._told.add(argument)
        said = []
        if dropped:
            reasons = [
                f"{number} that were there already"
                if reason == "duplicate"
                else f"{number} for the length of the {reason}"
                for reason, number in sorted(dropped.items())
            ]
            said.append(f"{dropped.total()} of {count} rows are left out: {', '.join(reasons)}")
        if cut:
            said.append("cut to fit: " + ", ".join(f"{number} {part}s" for part, number in sorted(cut.items())))
        rank_zero_info(f"`{argument}`: {'; '.join(said)}.")


def _tokens(item: Tokenized) -> tuple[Any, ...]:
    return item.prompt, item.responses, item.learnt


def _some(count: int) -> set[int]:
    """Numbers of a few of so many rows: the first, the last and some between."""
    return {number * (count - 1) // 4 for number in range(5)} if count else set()
