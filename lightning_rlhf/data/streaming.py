"""Rows that are read while they are learnt from, because there are too many of them to be kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from lightning_rlhf.data.cursor import Cursor
from lightning_rlhf.data.tokens import Tokenized

REMEMBERED = 4096
"""Batches whose digests are kept: more than any accumulation window has."""


def is_stream(source: Any) -> bool:
    """Whether rows can be read again and again, and not counted, as of an ``IterableDataset``.

    Args:
        source: What a user gave.

    Returns:
        The answer.
    """
    return isinstance(source, Iterable) and not isinstance(source, Iterator) and not hasattr(source, "__len__")


class Stream(IterableDataset[Tokenized]):
    """Rows of one rank, from the cursor on, in the order in which a source gives them.

    Row ``j`` of rank ``r`` is the one at ``j * world_size + r``, as a ``DistributedSampler`` deals them: every rank
    reads all rows, and the first ones repeat where the ranks would not come out even. A run that was cut reads again
    what it had read, and goes on only if that is the same.

    Args:
        source: Gives rows as often as it is iterated over. Its ``set_epoch`` is called before, if it has one.
        argument: What the user calls it, for errors.

    Attributes:
        batches: Of the pass, once its end has been seen; until then infinity.
    """

    def __init__(self, source: Iterable[Any], argument: str) -> None:
        self.source = source
        self.argument = argument
        self.batches = math.inf
        self._digests: dict[int, str] = {}  # of all rows before a batch
        self._expected: tuple[int, int, str | None] | None = None
        self._begun: tuple[Any, ...] = ()

    def begin(
        self,
        tokenized: Callable[[Iterable[Any]], Iterator[Tokenized]],
        cursor: Cursor,
        batch_size: int,
        world_size: int,
        rank: int,
    ) -> None:
        """Says how rows are read.

        Args:
            tokenized: Makes tokens of the source's items, and leaves out what is not wanted.
            cursor: Shared with the DataModule, and read whenever a pass begins.
            batch_size: Rows of a batch, per process.
            world_size: Number of processes.
            rank: Of this one.
        """
        self._begun = (tokenized, cursor, batch_size, world_size, rank)

    def __iter__(self) -> Iterator[Tokenized]:
        tokenized, cursor, batch_size, world_size, rank = self._begun
        epoch, position = cursor.epoch, cursor.position
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)
        self.batches, self._digests = math.inf, {}
        said = hashlib.blake2b(digest_size=16)
        first: list[Tokenized] = []
        line: list[Tokenized] = []  # a row for every rank
        lines = 0
        for item in tokenized(self.source):
            if not line and lines % batch_size == 0:
                self._remember(epoch, lines // batch_size, said.hexdigest())
            for tokens in (item.prompt, *item.responses):
                said.update(np.asarray([len(tokens), *tokens], dtype=np.int64).tobytes())
            first += [item] if len(first) < world_size else []
            line.append(item)
            if len(line) == world_size:
                if lines >= position * batch_size:
                    yield line[rank]
                lines, line = lines + 1, []
        if not first:
            raise ValueError(f"`{self.argument}` is empty, or all its rows are left out: give at least one row.")
        if line:
            line += [first[i % len(first)] for i in range(world_size - len(line))]
            lines += 1
        self.batches = math.ceil(lines / batch_size)
        if position >= self.batches:
            self._refuse(f"it has {self.batches} batches, and {position} of them were read before")
        if line:
            yield line[rank]

    def digest(self, position: int) -> str | None:
        """Of the rows before a batch of the present pass, if it is known.

        Args:
            position: Number of the batch.

        Returns:
            128 bits.
        """
        return self._digests.get(position)

    def expect(self, epoch: int, position: int, digest: str | None) -> None:
        """Demands that the rows before a batch are those that were there before.

        Args:
            epoch: Number of the pass.
            position: Of the batch.
            digest: As :meth:`digest` gave it.
        """
        self._expected = (epoch, position, digest)

    def _remember(self, epoch: int, position: int, digest: str) -> None:
        self._digests[position] = digest
        if len(self._digests) > REMEMBERED:
            del self._digests[next(iter(self._digests))]
        if self._expected is not None and self._expected[:2] == (epoch, position):
            if self._expected[2] not in (None, digest):
                self._refuse("other rows come before the place at which the run was cut")
            self._expected = None

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"`{self.argument}`: the stream does not give the rows again that it gave before the run was cut ({why}), "
            "so that the run cannot go on exactly: give a stream whose order depends on its seed and epoch alone, the "
            "same number of processes and `batch_size`, or begin a new run without `ckpt_path`."
        )
