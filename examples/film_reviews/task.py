"""The reviews, and what is made of them: texts to imitate, comparisons, prompts, a tokenizer."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rlhf.examples.film_reviews.reviews import Reviews, read

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast

OPENING = "review:"
"""With which every text begins, so that a review can be compared with any other as a response to it."""

HELD_OUT = 500
"""Reviews of each kind that no stage learns from."""

VOCABULARY = 4096
WORDS = range(4, 61)
"""How many a review has that is kept."""


class FilmReviews:
    """Reviews, dealt out to the stages.

    Args:
        reviews: All of them; by default those of :func:`read`.
        seed: Of the draws.
        held_out: How many of each kind are set apart.
    """

    def __init__(self, reviews: Reviews | None = None, seed: int = 0, held_out: int = HELD_OUT) -> None:
        draw = random.Random(seed)
        every = read() if reviews is None else reviews
        kinds = [[text for text in texts if len(text.split()) in WORDS] for texts in every]
        for texts in kinds:
            draw.shuffle(texts)
        self.learn = tuple(texts[held_out:] for texts in kinds)
        self.held_out = tuple(texts[:held_out] for texts in kinds)
        self._draw = draw

    def texts(self, held_out: bool = False) -> list[dict[str, str]]:
        """What is imitated: every review, of both kinds.

        Args:
            held_out: Those that were set apart.

        Returns:
            Rows for `ConversationDataModule`.
        """
        texts = [f"{OPENING} {text}" for texts in (self.held_out if held_out else self.learn) for text in texts]
        return [{"text": text} for text in self._draw.sample(texts, len(texts))]

    def comparisons(self, held_out: bool = False) -> list[dict[str, str]]:
        """What somebody who likes to read praise would say of two reviews.

        Args:
            held_out: Of those that were set apart.

        Returns:
            Rows for `PreferenceDataModule`, every review at most once.
        """
        pairs = zip(*(self.held_out if held_out else self.learn), strict=False)
        return [{"prompt": OPENING, "chosen": f" {good}", "rejected": f" {bad}"} for good, bad in pairs]

    def prompts(self, count: int, words: int = 3, held_out: bool = False) -> list[dict[str, str]]:
        """How reviews begin, to be gone on with.

        Args:
            count: How many.
            words: Of a review.
            held_out: Of those that were set apart.

        Returns:
            Rows for `PromptDataModule`.
        """
        texts = [text for texts in (self.held_out if held_out else self.learn) for text in texts]
        texts = self._draw.sample(texts, len(texts))
        begun = itertools.islice(itertools.cycle(texts), count)
        return [{"prompt": " ".join([OPENING, *text.split()[:words]])} for text in begun]

    def tokenizer(self, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
        """Trains a tokenizer of the reviews that may be learnt from.

        Args:
            vocabulary: Its size.

        Returns:
            Byte pairs, with `<eos>` and `<pad>`.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<eos>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((row["text"] for row in self.texts()), trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
        )


def config() -> GPT2Config:
    """A GPT-2 of 2.7 M parameters, not trained yet."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=160,
        n_embd=256,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes a JSONL file.

    Args:
        path: Its path; folders on the way are made.
        rows: Its lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """The lines of a JSONL file.

    Args:
        path: Its path.

    Yields:
        Rows.
    """
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


@functools.cache
def _lexicon():  # type: ignore[no-untyped-def]  # the package has no types
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def lexicon_score(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, list[float]]:
    """What a lexicon of feelings makes of reviews, which no stage learns from (VADER, Hutto and Gilbert 2014).

    Args:
        prompts: How they begin.
        responses: How they go on.

    Returns:
        ``"lexicon"``: from -1, unfavourable, to 1.
    """
    texts = [f"{prompt}{response}".removeprefix(OPENING) for prompt, response in zip(prompts, responses, strict=True)]
    return {"lexicon": [float(_lexicon().polarity_scores(text)["compound"]) for text in texts]}
