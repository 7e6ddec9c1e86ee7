"""Rows in tokens, kept on disk: made once for all runs on the same rows."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.data.selection import digest
from lightning_rlhf.data.tokens import Tokenized

VERSION = 1
"""Of what lies in the files, and of how texts become tokens."""


class TokenCache:
    """A folder of files, one for each set of rows and way to make tokens of them.

    Files are written beside their place and renamed, so that processes which make the same one do not disturb each
    other; what belongs to other rows, or to a tokenizer that has changed, stays until somebody deletes it.

    Args:
        folder: Made when it is needed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`cache_dir={str(folder)!r}` is a file, and must be a folder, or not be there yet.")

    def path(self, tokenizer: Any, how: Any, texts: Iterable[Any]) -> Path:
        """Where the tokens of rows are, or are to be.

        Args:
            tokenizer: Makes them.
            how: All on which they depend besides, as plain values.
            texts: Of each row, all that tokens are made of.

        Returns:
            A file's path, of which everything is a part: other rows or another tokenizer give another one.

        Raises:
            ValueError: If the tokenizer cannot be told from others.
        """
        said = hashlib.blake2b(digest_size=16)
        versions = [version(name) for name in ("transformers", "tokenizers")]
        said.update(digest([VERSION, versions, how]))
        said.update(_tokenizer_digest(tokenizer))
        for row in texts:
            said.update(digest(row))
        return self.folder / f"{said.hexdigest()}.safetensors"

    def read(self, path: Path, rows: Sequence[Any], places: Sequence[str]) -> list[Tokenized] | None:
        """What was written there.

        Args:
            path: From :meth:`path`.
            rows: Of which the tokens were made.
            places: Where each is from.

        Returns:
            The rows in tokens, in order; None if there is no such file, or it cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if not path.is_file():
            return None
        try:
            found = load_file(path)
            prompts = _apart(found["prompts"], found["prompt_lengths"])
            responses = iter(_apart(found["responses"], found["response_lengths"]))
            learnt = iter(_apart(found["learnt"], found["learnt_lengths"]))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            rank_zero_warn(f"{path} in `cache_dir` cannot be read ({error}), and is made anew.")
            return None
        counts, has_learnt = found["response_counts"].tolist(), found["has_learnt"].tolist()
        return [
            Tokenized(
                prompt,
                list(itertools.islice(responses, count)),
                row,
                [bool(flag) for flag in next(learnt)] if is_partly else None,
                place,
            )
            for prompt, count, is_partly, row, place in zip(prompts, counts, has_learnt, rows, places, strict=True)
        ]

    def write(self, path: Path, items: Sequence[Tokenized]) -> None:
        """Keeps tokens, or warns if they cannot be kept.

        Args:
            path: From :meth:`path`.
            items: Rows in tokens.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        responses = [response for item in items for response in item.responses]
        learnt = [item.learnt for item in items if item.learnt is not None]
        arrays = {
            "response_counts": np.asarray([len(item.responses) for item in items], dtype=np.int64),
            "has_learnt": np.asarray([item.learnt is not None for item in items], dtype=np.bool_),
            **_together("prompt", [item.prompt for item in items], np.int32),
            **_together("response", responses, np.int32),
            "learnt": np.asarray([flag for flags in learnt for flag in flags], dtype=np.bool_),
            "learnt_lengths": np.asarray([len(flags) for flags in learnt], dtype=np.int64),
        }
        beside = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # machines that share the folder count processes alike
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(arrays, beside)
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            rank_zero_warn(
                f"`cache_dir={str(self.folder)!r}` cannot be written to ({error}), and the next run makes the same "
                "tokens again: name a folder with room, or leave it out."
            )


def _together(name: str, lists: Sequence[Sequence[int]], dtype: Any) -> dict[str, np.ndarray]:
    return {
        f"{name}s": np.asarray([number for numbers in lists for number in numbers], dtype=dtype),
        f"{name}_lengths": np.asarray([len(numbers) for numbers in lists], dtype=np.int64),
    }


def _apart(numbers: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    if numbers.size != lengths.sum():
        raise ValueError(f"{numbers.size} numbers where {lengths.sum()} belong")
    return [part.tolist() for part in np.split(numbers, np.cumsum(lengths)[:-1])] if lengths.size else []


def _tokenizer_digest(tokenizer: Any) -> bytes:
    """Of all that it saves (vocabulary, merges, special tokens, chat template), and of how it treats special ones."""
    if not hasattr(tokenizer, "save_pretrained"):
        raise ValueError(
            f"`cache_dir` needs a tokenizer with `save_pretrained`, which {type(tokenizer).__name__} has not: its "
            "tokens could not be told from those of another one. Leave `cache_dir` out."
        )
    said = hashlib.blake2b(type(tokenizer).__qualname__.encode(), digest_size=16)
    said.update(digest(bool(getattr(tokenizer, "split_special_tokens", False))))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                said.update(file.name.encode())
                said.update(file.read_bytes())
    return said.digest()
