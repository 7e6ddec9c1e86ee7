"""Which texts a reward model reads together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_rlhf.models.classifier import Classifier, Row


def in_passes(classifier: Classifier, rows: Sequence[Row], most: int) -> Iterator[list[int]]:
    """Numbers of rows of one forward pass each, the longest first, so that too little memory shows at once.

    Args:
        classifier: That reads them.
        rows: Without padding.
        most: Tokens of a pass, padding included.

    Yields:
        Numbers of rows of alike length; a longer row goes alone.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    batch: list[int] = []
    for i in [*sorted(range(len(rows)), key=lambda i: -lengths[i]), None]:
        longest = lengths[batch[0]] if batch else 0
        is_full = longest * (len(batch) + 1) > most
        if batch and (i is None or is_full or (not classifier.pads and lengths[i] != longest)):
            together = classifier.fits_one_pass([rows[j] for j in batch])
            yield from [batch] if together else [[j] for j in batch]
            batch = []
        if i is not None:
            batch.append(i)
