"""Sequence classifiers as rewards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import PurePath
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlhf.models.adapter_configs import has_adapter_only
from lightning_rlhf.models.classifier import Classifier, Row, is_classifier_object, load_classifier
from lightning_rlhf.models.loading import ModelLike, ModelSpec, load_tokenizer
from lightning_rlhf.models.offloading import HOST, fetched
from lightning_rlhf.rewards.dense import Split, split_of
from lightning_rlhf.rewards.passes import in_passes
from lightning_rlhf.rewards.steps import reader_of
from lightning_rlhf.rewards.stored import StoredReward
from lightning_rlhf.rewards.texts import READS

OUTPUTS = ("logit", "probability", None)

_GIVEN_UP = 2**40
"""More forward passes than there ever are."""


class RewardModel(StoredReward):
    """A trained sequence classifier of transformers that scores responses, or an export of :class:`RewardModule`.

    An export of :class:`ProcessRewardModule` is a dense reward: the score of every step lies on the policy's token that
    completes it. A step that ended before what a text lost (see below) has 0.

    It is frozen, in evaluation mode, in no checkpoint of the policy's, and keeps its own type whatever ``precision``
    the Trainer has. Texts are tokenised anew by its own tokenizer. The score is read where transformers reads it: of
    decoder-only models at the last token, whatever PAD is; so it does not depend on what is scored beside. An export's
    logits have mean and standard deviation taken off that are in its config.

    A text that is too long loses its beginning (a BOS or CLS stays): what was written, and where the score is read, is
    at its end. The first time it happens a warning says how many texts it were.

    Args:
        model: A name, folder or :class:`ModelSpec` of a trained classifier; or one that is there already, perhaps
            quantised, which is used as it is, frozen and moved, and not copied.
        label: Whose output is the score, by its name in the config or its number; a model with one output needs none.
        output: ``"logit"``, or ``"probability"`` of the label: softmax over all labels, or the sigmoid where the
            config says that several can hold (``multi_label_classification``). By default what its export says, else
            ``"logit"``.
        reads: ``"both"``: the prompt and, right after it, the response; chat messages go with the response through its
            tokenizer's chat template. ``"pair"``: as two segments, for models trained so. ``"response"``: that alone.
            ``"apart"``: the prompt, then the response with an EOS, each tokenised by itself, as :class:`RewardModule`
            does. By default what its export says, else ``"both"``.
        split: How a response is taken apart where an export of :class:`ProcessRewardModule` scores its steps: as for
            :class:`DenseReward`. By default at the separator that the export names.
        append_eos: Whether every text is ended with EOS, as for models that were trained so; those that were cut off
            too.
        tokenizer: Its own; by default the one beside its weights. An object, name or folder.
        max_tokens: How long a text may be; by default what the tokenizer or the config allows.
        batch_tokens: Tokens of a forward pass, padding included; texts of alike length go together. It changes time
            and memory, never a score.
        device: Where it stays, such as ``"cpu"``; by default it goes where the policy goes.
        sharded: Whether it is sharded where the policy is, unless a ``device`` holds it. All processes then score in
            step; a small one may as well be whole on each.
        name: Under which it is logged; the last part of its folder or hub name by default.

    Attributes:
        shards: Whether it is to be sharded.
        most: Says, of the passes that this process needs, how many all make: where it is sharded, the most of all.
        waits: Whether it is in host memory while it is not asked.

    Example:
        >>> RewardModel("org/polite-classifier", label="polite", output="probability").name
        'polite-classifier'
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        label: str | int | None = None,
        output: Literal["logit", "probability"] | None = None,
        reads: Literal["both", "pair", "response", "apart"] | None = None,
        split: Split | None = None,
        append_eos: bool = False,
        tokenizer: Any = None,
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
        device: str | None = None,
        sharded: bool = True,
        name: str | None = None,
    ) -> None:
        self._given = {
            "label": label,
            "output": output,
            "reads": reads,
            "split": split,
            "append_eos": append_eos,
            "tokenizer": tokenizer,
            "max_tokens": max_tokens,
            "batch_tokens": batch_tokens,
            "device": device,
            "sharded": sharded,
            "name": name,
        }
        self.spec = ModelSpec.of(model)
        self._given = {**self._given, "model": self.spec}
        if not self.spec.is_named and (isinstance(model, ModelSpec) or not is_classifier_object(model)):
            raise TypeError(
                f"`model={type(self.spec.model).__name__}` must be a trained classifier: a hub name, a folder, or the "
                "object itself."
            )
        for argument, value, known in (("output", output, OUTPUTS), ("reads", reads, (*READS, None))):
            if value not in known:
                raise ValueError(f"`{argument}={value!r}` must be one of {', '.join(map(repr, known))}.")
        for argument, number in {"max_tokens": max_tokens, "batch_tokens": batch_tokens}.items():
            if number is not None and number < 1:
                raise ValueError(f"`{argument}={number}` must be at least 1.")
        self.label = label
        self.output = output
        self.reads = reads
        self.split = None if split is None else split_of(split)
        self.append_eos = append_eos
        self.max_tokens = max_tokens
        self.batch_tokens = batch_tokens
        self.device = None if device is None else torch.device(device)
        self.shards = sharded and device is None
        self.most: Callable[[int], int] = int
        self.waits = False
        self._place: torch.device | None = None  # where it is asked
        own = PurePath(os.fspath(self.spec.model)).name if self.spec.is_named else type(self.spec.model).__name__
        self.name = name or own
        self.classifier: Classifier | None = None
        self._tokenizer = tokenizer
        self._has_warned = False

    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        response_tokens: Sequence[Tensor] | None = None,
        tokenizer: Any = None,
    ) -> list[Any]:
        """Scores responses.

        Args:
            prompts: Strings or chat messages.
            responses: What was written to them.
            response_tokens: As the policy wrote them; with them the space between prompt and response is kept that some
                tokenizers take off what is decoded alone.
            tokenizer: Of the policy.

        Returns:
            A number each; of one that scores steps, a list each, one number for every token.
        """
        classifier = self.load()
        try:
            written = self._reader.rows(prompts, responses, response_tokens, tokenizer) if responses else []
            rows = self._cut(written)
            batches = list(in_passes(classifier, rows, self.batch_tokens))
        except Exception:  # whatever it is: it is raised again when nobody waits any more
            self.give_up()
            raise
        passes = self.most(len(batches))
        scores: list[list[float]] = [[] for _ in rows]
        if passes >= _GIVEN_UP:
            return [0.0] * len(rows)  # which nobody reads
        with fetched(classifier.model, self._place) if self._place is not None else nullcontext():
            for batch in batches:
                logits = self._reader.logits(classifier, [rows[i] for i in batch])
                for i, of_row in zip(batch, logits, strict=True):
                    scores[i] = self._scores(of_row).tolist()
            for _ in range(passes - len(batches)):
                classifier.logits([rows[i] for i in batches[0]] if batches else [{"input_ids": [0, 0]}])
        return self._reader.answers(scores, responses, response_tokens, tokenizer)

    def give_up(self) -> None:
        """Lets processes that wait for this one know that it will not be called: something has failed."""
        self.most(_GIVEN_UP)

    def load(self, classifier: Classifier | None = None) -> Classifier:
        """Reads and tries out the model; does nothing a second time.

        Args:
            classifier: The model where another process has done so.

        Returns:
            The classifier.

        Raises:
            ValueError: If model, tokenizer and label do not go together.
        """
        if classifier is not None or self.classifier is None:
            self.classifier = classifier or self._read()
            self.classifier.check_label(self.label, self.output, self.name)
            export = self.classifier.stored
            self._reader = reader_of(export, self.tokenizer, self.reads, self.append_eos, self.split, self.name)
            home = HOST if self.waits else self.device
            if home is not None:
                self._move(home)
        return self.classifier

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter on a policy's model, of which it then holds no copy."""
        return self.spec.is_named and has_adapter_only(os.fspath(self.spec.model))

    def _read(self) -> Classifier:
        if self.is_adapter:
            raise ValueError(
                f"`reward={self.name!r}` is an adapter, which scores within an online module whose policy has its "
                "model: for one that stands alone export it whole, by `save_pretrained(folder)`."
            )
        network: Any = load_classifier(self.spec, "reward") if self.spec.is_named else self.spec.model
        tokens, rows = len(self.tokenizer), int(network.get_input_embeddings().weight.shape[0])
        if tokens > rows:
            raise ValueError(
                f"`tokenizer` of the reward model {self.name!r} has {tokens} tokens, and the model {rows} rows: it "
                "is another model's. Pass its own."
            )
        return Classifier(network, self.tokenizer.pad_token_id)

    def to(self, device: torch.device) -> None:
        """Goes where the policy is, unless it was told where to stay.

        Args:
            device: Of the policy.
        """
        if self.waits:
            self._place = device
        elif self.classifier is not None and self.device is None:
            self._move(device)

    @property
    def tokenizer(self) -> Any:
        """Its own; loaded when it is first asked for."""
        if self._tokenizer is None or isinstance(self._tokenizer, str | os.PathLike):
            source = getattr(self.spec.model, "name_or_path", "")
            if self._tokenizer is None and not self.spec.is_named and source:
                self._tokenizer = source
            elif self._tokenizer is None and not self.spec.is_named:
                raise ValueError(
                    "`tokenizer=None` must be given where a reward model is an object that came from no folder: pass "
                    "`RewardModel(model, tokenizer=...)`."
                )
            self._tokenizer = load_tokenizer(self._tokenizer, self.spec)
        return self._tokenizer

    def _cut(self, rows: list[Row]) -> list[Row]:
        """Rows that fit the model; of one that did not, the end."""
        limit = self.token_limit
        if limit is None:
            return rows
        too_long = [len(row["input_ids"]) for row in rows if len(row["input_ids"]) > limit]
        if too_long and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{len(too_long)} of {len(rows)} texts have more than the {limit} tokens that the reward model "
                f"{self.name!r} reads (up to {max(too_long)}): their beginnings are cut off."
            )
        return [self._reader.end_of(row, limit) for row in rows]

    @property
    def token_limit(self) -> int | None:
        """How long a text may be, in tokens; None is no limit."""
        limits = [self.max_tokens, self.load().max_positions, self.tokenizer.model_max_length]
        return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)

    def _scores(self, logits: Tensor) -> Tensor:
        assert self.classifier is not None
        number, export = self.classifier.label_number(self.label), self.classifier.stored
        if (self.output or export.get("output", "logit")) == "logit":
            return (logits[:, number] - export.get("mean", 0.0)) / export.get("std", 1.0)
        problem = self.classifier.model.config.problem_type
        is_single = self.classifier.labels == 1 or problem == "multi_label_classification"
        return (logits.sigmoid() if is_single else logits.softmax(1))[:, number]

    def _move(self, device: torch.device) -> None:
        assert self.classifier is not None
        if self.classifier.device != device:
            self.classifier.model.to(device)
