"""A model of its own that says what reward is still to come."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_rlhf.models.adapter_configs import has_adapter_only
from lightning_rlhf.models.classifier import load_classifier
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.headed import HeadedModel
from lightning_rlhf.models.loading import ModelSpec, check_folder
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.reading import Responses
from lightning_rlhf.models.scorer_loading import stored
from lightning_rlhf.models.states import head_states, placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Critic(nn.Module):
    """A language model whose own head is taken off, and a value head in its place.

    Args:
        decoder: Changed in place.
        value_head: Reads the states that its own head read.
    """

    def __init__(self, decoder: Decoder, value_head: nn.Module) -> None:
        super().__init__()
        _behead(decoder)
        self.decoder = decoder
        self.value_head = value_head

    def forward(self, batch: Responses) -> Float[Tensor, "batch response"]:
        """The values of the states before the tokens of responses.

        Args:
            batch: Prompts and responses; what lies in the padding changes nothing.

        Returns:
            Per response token, with gradients.
        """
        reading = self.decoder.reading(batch, None)
        return placed(self.value_head(head_states(self.decoder, reading)), reading, batch)


class _NoHead(nn.Module):
    """Where a language-modelling head was that nobody asks, and that would be a parameter without a gradient."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.new_zeros(1, weight.shape[1]), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        return states[..., :1]


def _behead(decoder: Decoder) -> None:
    head = decoder.model.get_output_embeddings()
    name = next(name for name, module in decoder.model.named_modules() if module is head)
    parent, _, child = name.rpartition(".")
    setattr(decoder.model.get_submodule(parent), child, _NoHead(head.weight.detach()))
    decoder.is_plain = False


def critic_network(spec: ModelSpec, begins_with_score: bool) -> tuple[PreTrainedModel, nn.Linear | None]:
    """Reads the model that a critic is to be.

    Args:
        spec: Of a language model, or of a sequence classifier that is one but for its head.
        begins_with_score: Whether a value head is to begin with a classifier's.

    Returns:
        A language model, and the classifier's head if it was asked for and there is one; it says what the classifier's
        export does, whose mean is 0 and whose deviation is 1.

    Raises:
        ValueError: If a classifier reads its score in another way than a value head does.
    """
    if not is_classifier(spec):
        return spec.load(), None
    classifier = _classifier(spec)
    score = score_of(classifier, begins_with_score)
    return _language_model(classifier), None if score is None else _normalized(score, stored(classifier.config))


def score_of(classifier: Any, begins_with_score: bool) -> nn.Linear | None:
    """The head of a classifier, if a value head is to begin with it.

    Args:
        classifier: That a critic is to be.
        begins_with_score: Whether it is.

    Returns:
        The head, or None.

    Raises:
        ValueError: If it reads its score in another way than a value head does, or says several.
    """
    name, score = type(classifier).__name__, getattr(classifier, "score", None)
    if classifier.config.is_encoder_decoder or not isinstance(score, nn.Linear):
        raise ValueError(
            f"`critic={name}` does not read its score off the last token's state by one linear layer, so that no value "
            "head could begin with it: take the classifier of a decoder-only model, or a language model."
        )
    if begins_with_score and score.out_features != 1:
        raise ValueError(
            f"`critic={name}` has {score.out_features} labels, of which none is a value: set `value_head` to 'mlp' or "
            "'linear' for a new head on its states."
        )
    return score if begins_with_score else None


@torch.no_grad()
def _normalized(score: nn.Linear, how: dict[str, Any]) -> nn.Linear:
    """A head that takes off what a reward model's export is read with, so that values are scores."""
    mean, std = how.get("mean", 0.0), how.get("std", 1.0)
    normalized = nn.Linear(score.in_features, 1, dtype=score.weight.dtype, device=score.weight.device)
    normalized.weight.copy_(score.weight / std)
    normalized.bias.copy_(((0.0 if score.bias is None else score.bias) - mean) / std)
    return normalized


def is_classifier(spec: ModelSpec) -> bool:
    """Whether a model is a sequence classifier or a backbone with a head that scores, and no language model.

    Args:
        spec: Of the model.

    Returns:
        The answer.
    """
    from transformers import PreTrainedModel

    if spec.is_named:
        if spec.gguf_file:
            return False
        config = _config(spec)
        is_named_so = any("SequenceClassification" in name for name in config.architectures or ())
        return is_named_so or bool(stored(config).get("head"))
    if isinstance(spec.model, HeadedModel):
        return True
    return isinstance(spec.model, PreTrainedModel) and "SequenceClassification" in type(spec.model).__name__


def _classifier(spec: ModelSpec) -> Any:
    """The sequence classifier that a spec is of."""
    if spec.is_named:
        return load_classifier(
            replace(spec, num_layers_unfrozen=-1, adapter=None, gradient_checkpointing=False), "critic"
        )
    model: Any = spec.model
    return copy.deepcopy(model).to(spec.torch_dtype())


def _config(spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    if not isinstance(spec.model, str | os.PathLike):
        return getattr(spec.model, "config", spec.model)
    check_folder(os.fspath(spec.model), "critic")
    source = {"revision": spec.revision or "main", "trust_remote_code": spec.trust_remote_code}
    return AutoConfig.from_pretrained(os.fspath(spec.model), **source)


def _language_model(classifier: Any) -> PreTrainedModel:
    """A causal language model on a classifier's own blocks; its head is of no use but to find out what it can do."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(classifier.config)
    setattr(model, model.base_model_prefix, classifier.base_model)
    model.tie_weights()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head.weight.is_meta:
        head.to_empty(device=embedding.device).to(embedding.dtype)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.02)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.eval()


def check_weights(spec: ModelSpec) -> None:
    """Refuses a critic of its own that could not train.

    Args:
        spec: Of the critic.

    Raises:
        ValueError: If it is quantised, or an adapter alone.
    """
    if spec.quantization is not None:
        raise ValueError(
            f"`critic.quantization={spec.quantization!r}` is for a critic that is an adapter on the policy's own "
            "model: give both a LoRA and the same model, or leave it out."
        )
    if isinstance(spec.model, nn.Module) and is_quantized(spec.model):
        raise ValueError(
            f"`critic={type(spec.model).__name__}` is quantised, and rounded weights have no gradient: pass one that "
            "is not, or give policy and critic the same folder, `quantization` and a LoRA each."
        )
    if spec.is_named and has_adapter_only(os.fspath(spec.model)):
        name = os.fspath(spec.model)
        raise ValueError(
            f"`critic={name!r}` holds an adapter and no model: pass `ModelSpec(<the model>, adapter={name!r})`."
        )


def check_ranks(decoder: Decoder) -> None:
    """Refuses a critic whose adapter would lose ranks.

    Args:
        decoder: Of the critic.

    Raises:
        ValueError: If it would.
    """
    if decoder.adapters is not None and decoder.adapters.allocates:
        raise ValueError("`critic.adapter` of type ADALORA: ranks are reduced of a policy's alone: use LORA.")


def check_vocabulary(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a critic that would read other words than the policy wrote.

    Args:
        spec: Of the critic.
        tokenizer: Of the policy.

    Raises:
        ValueError: If its tokenizer numbers tokens otherwise, or there are fewer of them than the policy has.
    """
    if not _has_tokenizer(spec):
        rows = _config(spec).get_text_config().vocab_size
        if rows < len(tokenizer):
            raise ValueError(
                f"`critic` knows {rows} tokens, and the policy's tokenizer {len(tokenizer)}: it is of another "
                "vocabulary. Take a model that reads the policy's tokens."
            )
        return
    its, mine = spec.load_tokenizer().get_vocab(), tokenizer.get_vocab()
    if not (its.items() <= mine.items() or mine.items() <= its.items()):
        differ = next(token for token in sorted(its) if its[token] != mine.get(token))
        raise ValueError(
            f"`critic={spec.model!r}` is of another vocabulary than the policy: {differ!r} is its token {its[differ]}, "
            f"and the policy's {mine.get(differ)}. Take a model that reads the policy's tokens."
        )


def _has_tokenizer(spec: ModelSpec) -> bool:
    """Whether one lies beside the weights; of a folder that has none transformers would make one of a single token."""
    if not isinstance(spec.model, str | os.PathLike):
        return False
    folder = Path(spec.model)
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return not folder.is_dir() or spec.gguf_file is not None or any((folder / name).is_file() for name in names)
