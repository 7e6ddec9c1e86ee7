"""Which rows are kept, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Deduplicate = Literal["exact", "normalized"]
"""Rows are the same if their texts are equal; or equal but for case, white space and forms of characters."""


class Rows(list[Any]):
    """Rows, and where each is from.

    Args:
        rows: In any form.
        places: The words for each, for errors.
    """

    def __init__(self, rows: Sequence[Any], places: Sequence[str]) -> None:
        super().__init__(rows)
        self.places = list(places)

    def select(self, numbers: Sequence[int]) -> Rows:
        """Some of the rows, in the order given."""
        return Rows([self[i] for i in numbers], [self.places[i] for i in numbers])


class Unique:
    """Tells rows that have been there before.

    Args:
        how: When two rows are the same; None: never.
    """

    def __init__(self, how: Deduplicate | None) -> None:
        if how not in (None, "exact", "normalized"):
            raise ValueError(f"`deduplicate={how!r}` must be 'exact' or 'normalized', or None to keep every row.")
        self.how = how
        self.seen: set[bytes] = set()

    def is_new(self, texts: Sequence[Any]) -> bool:
        """Whether a row is the first of its kind.

        Args:
            texts: What it consists of.

        Returns:
            The answer; the row is remembered.
        """
        if self.how is None:
            return True
        key = digest(normalized(texts) if self.how == "normalized" else texts)
        is_new = key not in self.seen
        self.seen.add(key)
        return is_new


def digest(texts: Any, seed: int = 0) -> bytes:
    """A number that differs between rows that differ.

    Args:
        texts: Strings, numbers, lists and mappings of them.
        seed: Another one gives other numbers.

    Returns:
        128 bits.
    """
    written = json.dumps([seed, texts], sort_keys=True, default=str)
    return hashlib.blake2b(written.encode(), digest_size=16).digest()


def normalized(value: Any) -> Any:
    r"""The same without differences of case, white space, and forms of characters.

    Compatibility decomposition and case folding are those of the `Unicode Standard
    <https://www.unicode.org/versions/latest/core-spec/chapter-3/>`_, section 3.13.

    Args:
        value: A string, or a list or mapping that holds some.

    Returns:
        The same with every string normalised.

    Example:
        >>> normalized(["Stra\u00dfe  42", {"text": "\uff21\n"}])
        ['strasse 42', {'text': 'a'}]
    """
    if isinstance(value, str):
        folded = unicodedata.normalize("NFKC", value).casefold()
        return " ".join(unicodedata.normalize("NFKC", folded).split())
    if isinstance(value, Mapping):
        return {key: normalized(item) for key, item in value.items()}
    return [normalized(item) for item in value] if isinstance(value, list | tuple) else value


def split(rows: Rows, prompts: Sequence[Any], share: float, seed: int, argument: str) -> tuple[Rows, Rows]:
    """Holds out a share of the rows, every row of a prompt on one side.

    Which prompts are held out depends on the seed and their text: not on their order, and hardly on what other rows
    there are.

    Args:
        rows: To be split.
        prompts: Of each.
        share: Of the rows, that the last prompt which is held out may exceed.
        seed: Of the split.
        argument: What the user calls the rows, for errors.

    Returns:
        What is learnt from, and what is held out, in their order.

    Raises:
        ValueError: If nothing is left on one side.
    """
    keys = [digest(prompt, seed) for prompt in prompts]
    sizes = Counter(keys)
    held_out: set[bytes] = set()
    count, wanted = 0, round(share * len(rows))
    for key in sorted(sizes):
        if count >= wanted:
            break
        held_out.add(key)
        count += sizes[key]
    if not 0 < count < len(rows):
        raise ValueError(
            f"`validation_share={share}` holds out {count} of {len(rows)} rows of `{argument}`, which have "
            f"{len(sizes)} different prompts, all rows of which stay together: give `validation=` or another share."
        )
    kept = [i for i, key in enumerate(keys) if key not in held_out]
    return rows.select(kept), rows.select([i for i, key in enumerate(keys) if key in held_out])
