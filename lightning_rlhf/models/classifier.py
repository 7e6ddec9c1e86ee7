"""Sequence classifiers of transformers: loaded, tried out, and asked for logits."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_rlhf.models.attention import attention_kernels
from lightning_rlhf.models.blocks import find_stacks
from lightning_rlhf.models.headed import HeadedModel
from lightning_rlhf.models.loading import ModelSpec, check_folder
from lightning_rlhf.models.outputs import same_logits
from lightning_rlhf.models.quantization import quantization_config, steady
from lightning_rlhf.models.scorer_loading import stored

Row = dict[str, list[int]]
"""What a tokenizer makes of a text: ``input_ids``, and ``token_type_ids`` where the model reads them."""

READ = ("model", "dtype", "attn_implementation", "revision", "trust_remote_code", "quantization")
"""Fields of a spec that mean something for a classifier."""


def load_classifier(spec: ModelSpec, argument: str) -> Any:
    """Reads a trained sequence classifier.

    Args:
        spec: Names it; what only a policy has must be left out.
        argument: What the user calls it, for errors.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such model, it has no trained head, or the spec asks for more.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from lightning_rlhf.models.linear import speed_up_linears

    for field in fields(spec):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(spec, field.name)
        if field.name not in READ and value != default:
            raise ValueError(
                f"`{argument}.{field.name}={value!r}` is a policy's, and a reward model reads none of it: leave it out."
            )
    name = os.fspath(spec.model)
    check_folder(name)
    options: dict[str, Any] = {}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization is not None:
        options["quantization_config"] = quantization_config(spec.quantization, spec.torch_dtype())
    source = {"revision": spec.revision or "main", "trust_remote_code": spec.trust_remote_code}
    options |= {"dtype": spec.torch_dtype(), **source}
    found: dict[str, Any] = {"missing_keys": ()}
    try:
        config = AutoConfig.from_pretrained(name, **source)
        if stored(config).get("head"):
            model: Any = HeadedModel.from_pretrained(name, config, True, **options)
        else:
            auto = AutoModelForSequenceClassification
            model, found = auto.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{argument}={name!r}` cannot be read as a sequence classifier of transformers (for a function, write its "
            f"module too, as in 'my_reward.score'): {error}"
        ) from error
    if found["missing_keys"]:
        raise ValueError(
            f"`{argument}={name!r}` has no weights for {sorted(found['missing_keys'])}: it was never trained to score. "
            "Name the folder of a trained classifier."
        )
    steady(model)
    speed_up_linears(model)
    return model


class Classifier:
    """A frozen classifier of sequences, out of sight of whatever looks for modules to train or save.

    transformers' decoder-only classifiers read their score at the last token that is not PAD *by its id*: where the
    tokenizer's PAD is its EOS, before the EOS; before a PAD that a text happens to end with, likewise. So rows are
    filled up with an id that none of them holds, and the config says so during the call. Whether a model does that is
    tried, not looked up, and so is whether it can be padded on the right at all.

    Args:
        model: A sequence classifier; frozen here, and in evaluation mode, which is where its dropout ends.
        pad: PAD of its tokenizer, if there is one: what encoders are filled up with.

    Attributes:
        labels: How many logits it gives.
        pools_by_pad: Whether it looks for its last token by the id of PAD.
        pads: Whether a row's logits are the same beside longer ones.
        blocks: Names of its blocks, as far as they were found.
    """

    def __init__(self, model: Any, pad: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.pad = pad
        self.rows = int(model.get_input_embeddings().weight.shape[0])
        accepted = inspect.signature(model.forward).parameters
        self._more = {"use_cache": False} if "use_cache" in accepted else {}
        self.reads_types = "token_type_ids" in accepted and getattr(self.config, "type_vocab_size", 0) > 1
        self.labels, self.pools_by_pad, self.pads = self._probe()

    @property
    def config(self) -> Any:
        """Where transformers looks for PAD."""
        return self.model.config.get_text_config()

    @property
    def stored(self) -> dict[str, Any]:
        """How its scores are to be read, where its export says that."""
        return stored(self.model.config)

    @property
    def network(self) -> nn.Module:
        """All that it has of its own."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    @property
    def max_positions(self) -> int | None:
        """How many tokens a row may have; None if the config names no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return None if limit is None or limit < 0 else limit

    def logits(self, rows: Sequence[Row]) -> Float[Tensor, "batch labels"]:
        """The logits of texts, in one forward pass.

        Args:
            rows: Without padding.

        Returns:
            In single precision, on the CPU.
        """
        return torch.cat([self._run(part, pad) for part, pad in self._passes(rows)])

    def token_logits(self, rows: Sequence[Row], layer: str) -> list[Float[Tensor, "tokens labels"]]:
        """The logits at every token of texts, in one forward pass.

        Args:
            rows: Without padding.
            layer: Of the model, that makes logits of the state at a token.

        Returns:
            In single precision, on the CPU, one for each row.
        """
        seen: list[Tensor] = []
        handle = self.model.get_submodule(layer).register_forward_hook(lambda _, inputs, logits: seen.append(logits))
        try:
            for part, pad in self._passes(rows):
                self._run(part, pad)
        finally:
            handle.remove()
        logits = [row for made in seen for row in made.float().cpu()]
        return [of_row[: len(row["input_ids"])] for of_row, row in zip(logits, rows, strict=True)]

    def fits_one_pass(self, rows: Sequence[Row]) -> bool:
        """Whether :meth:`logits` makes one forward pass of rows, and not one of each.

        Args:
            rows: Without padding.

        Returns:
            The answer.
        """
        return len(self._passes(rows)) == 1

    def _passes(self, rows: Sequence[Row]) -> list[tuple[Sequence[Row], int | None]]:
        """Rows that go together, and what they are filled up with."""
        if not self.pools_by_pad and self.pad is not None:
            return [(rows, self.pad)]
        held = {token for row in rows for token in row["input_ids"]}
        unused = next((token for token in range(self.rows) if token not in held), None)
        return [(rows, unused)] if unused is not None else [([row], None) for row in rows]

    @property
    def label_names(self) -> list[str]:
        """Of its outputs, in order; numbers where the config has none."""
        return [self.model.config.id2label.get(i, str(i)) for i in range(self.labels)]

    def label_number(self, label: str | int | None) -> int:
        """Which output belongs to a label.

        Args:
            label: Its name or number; None for the only one.

        Returns:
            The number.
        """
        return self.label_names.index(label) if isinstance(label, str) else label or 0

    def check_label(self, label: str | int | None, output: str | None, name: str) -> None:
        """Refuses to read what it does not say.

        Args:
            label: Name or number of the output that is to be read.
            output: ``"logit"``, ``"probability"``, or None for what its export says.
            name: Of the reward model, for errors.

        Raises:
            ValueError: If there is no such output, or it is no probability.
        """
        names = self.label_names
        fits = label in range(self.labels) if isinstance(label, int) else label in names
        if label is None and self.labels > 1 or label is not None and not fits:
            raise ValueError(
                f"`label={label!r}` of the reward model {name!r} must be one of {', '.join(map(repr, names))}."
            )
        if self.labels == 1 and output == "probability" and self.stored.get("output") != output:
            raise ValueError(
                f"`output='probability'`: the reward model {name!r} has one output, which is a score and no "
                "probability. Use `output='logit'`."
            )

    @torch.no_grad()
    def _run(self, rows: Sequence[Row], pad: int | None) -> Tensor:
        width = max(len(row["input_ids"]) for row in rows)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        fill = {"input_ids": pad or 0, "token_type_ids": 0}
        tokens = {
            name: torch.tensor([row[name] + [fill[name]] * (width - len(row[name])) for row in rows]).to(self.device)
            for name in fill
            if name in rows[0] and (name == "input_ids" or self.reads_types)
        }
        mask = (torch.arange(width) < lengths[:, None]).long().to(self.device)
        # The precision of what trains does not reach into a frozen model of its own type.
        alone = torch.autocast(self.device.type, enabled=False)
        with alone, _padding(self.config, pad), attention_kernels(torch.device(self.device)):
            return self.model(**tokens, attention_mask=mask, **self._more).logits.float().cpu()

    def _probe(self) -> tuple[int, bool, bool]:
        eos = self.config.eos_token_id
        ends = [token for token in (eos if isinstance(eos, list) else [eos]) if token is not None][:1]
        letters = [token for token in range(self.rows) if token not in (*ends, self.pad)][:4]
        row = {"input_ids": [*letters[:3], *ends]}
        alone = self._run([row], letters[-1])
        if alone.dim() != 2:
            raise TypeError(
                f"`model={type(self.model).__name__}` gives no logits per sequence: a reward model is a sequence "
                "classifier, loaded as ...ForSequenceClassification."
            )
        pools_by_pad = not torch.equal(alone, self._run([row], row["input_ids"][-1]))
        self.pools_by_pad = pools_by_pad
        self.blocks = find_stacks(self.model, lambda: self._run([row], letters[-1]))
        longer = {"input_ids": [*letters[:3], *letters[:3], *ends]}
        beside = self.logits([row, longer])[:1]
        precision = self.model.get_input_embeddings().weight.dtype  # in which the logits were made
        pads = same_logits(beside, alone.to(precision), spread=float(alone.abs().max()))
        if not pads:
            rank_zero_warn(
                f"{type(self.model).__name__} cannot be padded on the right: it scores texts of one length at a time."
            )
        return alone.shape[1], pools_by_pad, pads


@contextmanager
def _padding(config: Any, pad: int | None) -> Iterator[None]:
    """Tells a classifier what its rows are filled up with."""
    own = config.pad_token_id
    config.pad_token_id = pad
    try:
        yield
    finally:
        config.pad_token_id = own


def is_classifier_object(value: Any) -> bool:
    """Whether a value is a network of transformers or PEFT, and no function of the user's."""
    return isinstance(value, nn.Module) and hasattr(value, "config") and hasattr(value, "get_input_embeddings")
