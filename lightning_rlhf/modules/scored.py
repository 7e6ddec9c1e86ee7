"""A module whose network scores responses rather than writing them: how it is built, asked and saved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_rlhf.batches import PreferenceBatch
from lightning_rlhf.data.preferences import preference_batch
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.freezing import freeze_weights
from lightning_rlhf.models.headed import HeadedModel
from lightning_rlhf.models.loading import ModelSpec
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.reward_folder import write_reward_adapter
from lightning_rlhf.models.scorer import Scorer
from lightning_rlhf.models.scorer_loading import STORED, load_scorer
from lightning_rlhf.models.texts import end_id, prompt_ids, response_ids
from lightning_rlhf.models.vocabulary import SpecialTokens, fit_embeddings, with_own_pad
from lightning_rlhf.modules.offline import OfflineModule
from lightning_rlhf.modules.resuming import STATE


class ScoringNetwork(nn.Module):
    """What trains.

    Args:
        decoder: Scores responses.
    """

    def __init__(self, decoder: Scorer) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """The scores of responses, (batch, responses)."""
        return self.decoder(batch)


class ScoringModule(OfflineModule):
    """A network that scores responses.

    Attributes:
        mean: Of its scores on a reference set.
        std: Their standard deviation there.
    """

    network_argument = "model"
    policy: Any  # a ScoringNetwork, under the name that every module has for what trains
    network: type[nn.Module] = ScoringNetwork
    mean, std = 0.0, 1.0

    @property
    def tokenizer(self) -> Any:
        """Of the model, with a PAD that is no EOS."""
        self._tokenizer = with_own_pad(super().tokenizer)
        return self._tokenizer

    def load_network(self, spec: ModelSpec) -> Any:
        """A classifier with one output."""
        model, tokenizer = load_scorer(spec), self.tokenizer
        if model.get_input_embeddings().weight.shape[0] == len(tokenizer) - 1 == tokenizer.pad_token_id:
            fit_embeddings(model, tokenizer, rank_zero_info)  # a row for the PAD that it was given
        return model

    def seen(self, model: Any) -> Decoder:
        """What scores responses with it."""
        pad = int(self.tokenizer.pad_token_id)
        model.config.get_text_config().pad_token_id = pad
        scorer = Scorer(model, pad)
        scorer.probe()
        return scorer

    def build(self) -> None:
        """Makes the network, under a random state that depends on the seed alone."""
        scorer: Any = self.load_decoder(self.spec)
        if is_quantized(scorer.model) and scorer.adapters is None and self.spec.num_layers_unfrozen != 0:
            raise ValueError(
                f"`quantization={self.spec.quantization!r}` leaves {type(scorer.model).__name__} nothing to train but "
                "its head, since rounded weights have no gradient: give it an `adapter`, or `num_layers_unfrozen=0`."
            )
        freeze_weights(scorer, self.spec.num_layers_unfrozen)
        for parameter in scorer.head_parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.policy = self.network(scorer).train()
        self.compile_policy()
        self.special_tokens = SpecialTokens((end_id(self.tokenizer),), scorer.pad)

    @property
    def max_prompt_tokens(self) -> int | None:
        """How long a prompt and a response may be together, in tokens; None is no limit."""
        limits = (super().max_prompt_tokens, self.tokenizer.model_max_length)
        return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)

    def parts(self) -> dict[str, nn.Module]:
        """What the optimizer tells apart: the head, and the rest of the model."""
        scorer = self.policy.decoder
        return {"head": nn.ParameterList(scorer.head_parameters()), "model": scorer}

    # --- scores ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, prompts: Sequence[Any], responses: Sequence[str], batch_size: int = 32) -> list[Any]:
        """Scores responses, mean and standard deviation taken off.

        Args:
            prompts: Strings or lists of chat messages.
            responses: One to each.
            batch_size: Rows that are read side by side.

        Returns:
            What :meth:`scores_of` gives, one after the other.

        Raises:
            ValueError: If these are no lists of one length, or a text is longer than what the model has room for.
        """
        if isinstance(prompts, str) or isinstance(responses, str) or len(prompts) != len(responses):
            raise ValueError(
                f"`prompts` ({len(prompts)}) and `responses` ({len(responses)}) must be lists of one length."
            )
        if not self.is_built:
            self.configure_model()
        scores: list[Any] = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            with self.quiet():
                scores += self.scores_of(prompts[rows], responses[rows], start)
        return scores

    def scores_of(self, prompts: Sequence[Any], responses: Sequence[str], start: int) -> list[Any]:
        """Scores responses side by side.

        Args:
            prompts: Strings or lists of chat messages.
            responses: One to each.
            start: Number of the first, for errors.

        Returns:
            A number each.
        """
        prompt = [prompt_ids(prompt, self.tokenizer) for prompt in prompts]
        response = [[response_ids(response, self.tokenizer)] for response in responses]
        self.check_room(start, [len(p) + len(r) for p, (r,) in zip(prompt, response, strict=True)])
        batch = preference_batch(prompt, response, self.special_tokens.pad).to(self.device)
        return self.normalized(self.policy(batch))[:, 0].tolist()

    def check_room(self, start: int, lengths: list[int]) -> None:
        """Refuses texts that the model cannot read.

        Args:
            start: Number of the first.
            lengths: Of each, in tokens.

        Raises:
            ValueError: If one is too long.
        """
        limit = self.max_prompt_tokens
        if limit is not None and max(lengths) > limit:
            number = start + lengths.index(max(lengths))
            raise ValueError(
                f"`prompts[{number}]` and `responses[{number}]` have {max(lengths)} tokens together, and the model has "
                f"room for {limit}: shorten them."
            )

    def normalized(self, scores: Tensor) -> Tensor:
        """Scores as the export gives them.

        Args:
            scores: As the network does.

        Returns:
            With mean 0 and standard deviation 1 on the reference set.
        """
        return (scores - self.mean) / self.std

    def generate(self, *args: Any, **kwargs: Any) -> list[str]:
        """Refused: nothing is written here."""
        raise TypeError(
            f"{type(self).__name__} writes no text: `score(prompts, responses)` says what responses are worth."
        )

    # --- saving ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds mean and standard deviation of the scores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE]["scores"] = {"mean": self.mean, "std": self.std}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        scores = checkpoint[STATE]["scores"]
        self.mean, self.std = scores["mean"], scores["std"]

    def save_pretrained(self, folder: str | os.PathLike[str], merge_adapter: bool = True) -> None:
        """Writes model and tokenizer as a folder for ``RewardModel``, with the original dropout values.

        It is one for ``AutoModelForSequenceClassification`` too, where transformers has that class for the
        architecture. If not, ``AutoModel`` reads the backbone, and the head lies beside it
        (`docs/algorithms/reward.md`). With an adapter the whole model is written, in full precision; or adapter and
        head alone, as PEFT does for such classifiers, for a policy with an adapter on the same model.

        Args:
            folder: Where to; made if it is missing.
            merge_adapter: Whether a model with an adapter is written whole.
        """
        if not self.is_built:
            self.configure_model()
        super().save_pretrained(folder, merge_adapter and self.policy.decoder.adapters is not None)

    @property
    def reading(self) -> dict[str, Any]:
        """How an export is to be read, for its config."""
        return {"reads": "apart"}

    def write(self, folder: str, weights: Mapping[str, Tensor] | None, merge_adapter: bool) -> None:
        """Writes the model, and in its config how it is to be read."""
        scorer = self.policy.decoder
        model = scorer.model
        how = {"mean": self.mean, "std": self.std, **self.reading}
        if scorer.adapters is not None and not merge_adapter:
            write_reward_adapter(scorer, self.spec, folder, how, weights)
            return
        if merge_adapter:
            model, weights = scorer.adapters.merged(weights), None
            if is_quantized(scorer.model):
                self._tell_distance(scorer, model)
        setattr(model.config, STORED, {**how, "head": isinstance(model, HeadedModel)})
        model.save_pretrained(folder, state_dict=weights)

    @torch.no_grad()
    def _tell_distance(self, scorer: Scorer, merged: Any) -> None:
        tokens, mask = scorer.sample()
        with self.quiet():  # the model has its original dropout while it is saved
            score = scorer.whole(tokens, mask).cpu()
        distance = Scorer(merged, scorer.pad).whole(tokens.cpu(), mask.cpu()) - score
        rank_zero_info(f"The merged model scores a few tokens {float(distance):.2g} from the quantised one.")
