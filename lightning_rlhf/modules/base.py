"""What every algorithm's module shares: networks, tokenizer, text generation, optimizer, saving."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_rlhf.chance import run_seed
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.settled import count_logged, go_on_with_a_new_epoch
from lightning_rlhf.generation.sampling import Sampling, SamplingChanges
from lightning_rlhf.models.activations import fuse_activations, fuse_norms
from lightning_rlhf.models.critics import Critic
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.dropout import disable_dropout, has_dropout
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.freezing import freeze
from lightning_rlhf.models.loading import ModelLike, ModelSpec, load_tokenizer
from lightning_rlhf.models.offloading import wait
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.recomputation import recompute_activations
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.models.vocabulary import SpecialTokens, fit_embeddings
from lightning_rlhf.modules.arguments import plain_arguments, reject_unknown
from lightning_rlhf.modules.building import BuiltModule
from lightning_rlhf.modules.evaluation import expect
from lightning_rlhf.modules.imports import check_datamodule, warn_of_the_other
from lightning_rlhf.modules.optimization import (
    OptimizerLike,
    SchedulerLike,
    make_optimizer,
    make_scheduler,
    parameter_groups,
)
from lightning_rlhf.modules.ranks import take_over
from lightning_rlhf.modules.signals import EndTogether
from lightning_rlhf.modules.trainer_checks import check_precision
from lightning_rlhf.strategies.checkpoint_io import make_checkpoints_atomic
from lightning_rlhf.strategies.fsdp2 import check_strategy

_WRONG_ADVICE = (
    "You defined a `validation_step` but have no `val_dataloader`",  # not every run is evaluated
    "You have overridden `on_before_batch_transfer` in `LightningModule`",  # which is meant
)
"""What Lightning warns of that does not hold for these modules."""


class RLHFModule(BuiltModule):
    """A policy that learns.

    Args:
        policy: The network to train: a name, folder, object, config or :class:`ModelSpec`.
        tokenizer: Of the policy; by default the one beside its weights. An object, name or folder.
        disable_dropout: Whether dropout is 0 while this module trains; exports have the original values.
        seed: Of everything random; what ``seed_everything`` set, else 0, by default.
        optimizer: Makes one optimizer of parameter groups; AdamW with trlX's settings (learning rate 3e-5, betas 0.9
            and 0.95, weight decay 1e-6) by default.
        learning_rates: Of ``"policy"`` or ``"value"`` (all that says values), where it is not the optimizer's own; a
            schedule multiplies each.
        decay_norms_and_biases: Whether the optimizer's weight decay is for norms and biases too, as in trlX.
        lr_scheduler: ``"constant"``, ``"linear"`` or ``"cosine"`` over the run's progress, or a factory that is
            stepped after every update.
        warmup_updates: Updates over which a named schedule rises from 0.
        compile: Whether ``torch.compile`` compiles the policy's blocks for the passes that train; or options for it,
            such as ``{"mode": "max-autotune"}``. For GPUs: on a CPU it is slower (`docs/performance.md`).
        evaluation_sampling: What differs from ``sampling`` when responses are written for evaluation or prediction,
            such as ``{"temperature": 0}``.
        **unknown: Refused by name.
    """

    def __init__(
        self,
        policy: ModelLike,
        *,
        tokenizer: Any = None,
        disable_dropout: bool = True,
        seed: int | None = None,
        optimizer: OptimizerLike = None,
        learning_rates: dict[str, float] | None = None,
        decay_norms_and_biases: bool = True,
        lr_scheduler: SchedulerLike = "constant",
        warmup_updates: int = 0,
        compile: bool | dict[str, Any] = False,  # noqa: A002
        evaluation_sampling: SamplingChanges = None,
        **unknown: Any,
    ) -> None:
        reject_unknown(type(self), unknown)
        warn_of_the_other(type(self).__name__)
        super().__init__()
        self.spec = ModelSpec.of(policy)
        self.seed = run_seed(seed)
        self.disable_dropout = disable_dropout
        self.optimizer = optimizer
        self.learning_rates = learning_rates
        self.decay_norms_and_biases = decay_norms_and_biases
        self.lr_scheduler = lr_scheduler
        self.warmup_updates = warmup_updates
        self.compile_options = compile
        self.sampling = Sampling()
        self.sampling_changes = evaluation_sampling
        self.sampling.but(evaluation_sampling, "evaluation_sampling")  # what is misspelt is better said now
        self._tokenizer = tokenizer
        self.reference: Reference | None = None
        self.critic: Critic | None = None
        self._end: EndTogether | None = None
        self.save_hyperparameters(plain_arguments(self.__dict__.pop("_given") | {"seed": self.seed}))

    # --- networks -----------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """Of the policy; loaded when it is first asked for."""
        if self._tokenizer is None or isinstance(self._tokenizer, str | os.PathLike):
            self._tokenizer = load_tokenizer(self._tokenizer, self.spec)
        return self._tokenizer

    def build(self) -> None:
        """Makes the policy, under a random state that depends on the seed alone."""
        decoder = self.load_decoder(self.spec)
        if is_quantized(decoder.model) and decoder.adapters is None and self.spec.num_layers_unfrozen != 0:
            raise ValueError(
                f"`quantization={self.spec.quantization!r}` leaves {type(decoder.model).__name__} nothing to train, "
                "since rounded weights have no gradient: give it an `adapter`, or `num_layers_unfrozen=0` for a value "
                "head alone."
            )
        freeze(decoder, self.spec.num_layers_unfrozen)
        self.policy = Policy(decoder, self.sampling.temperature or 1.0)
        self.make_critic()
        self.compile_policy()
        # From here on the mode is Lightning's: it leaves a model in evaluation mode as it is, without dropout.
        self.policy.train()
        self.special_tokens = SpecialTokens.of(self.tokenizer, self.policy.decoder.model)

    def make_critic(self) -> None:
        """Makes what says values, for a module that learns some."""

    def load_decoder(self, spec: ModelSpec, model: Any = None) -> Decoder:
        """Loads a model, fits it to the tokenizer, and finds out what it can do.

        Args:
            spec: Of the model.
            model: The model, where it has been loaded.

        Returns:
            The model, ready to be called.
        """
        from lightning_rlhf.models.linear import speed_up_linears  # imports transformers

        model = self.load_network(spec) if model is None else model
        if not (spec.is_named or self._trainer is None or self.builds_for_all):
            take_over(model, self._trainer.strategy.root_device)  # an object need not be the same everywhere
        new_rows = fit_embeddings(model, self.tokenizer)
        adapters = spec.adapt(model)
        if (
            new_rows
            and adapters is not None
            and not any(p.requires_grad for p in model.get_input_embeddings().parameters())
        ):
            rank_zero_warn(
                f"The adapter leaves the rows of {new_rows} new tokens at the mean of the others: name the embeddings "
                "in its `modules_to_save` or the tokens in `trainable_token_indices` if they are to be learnt."
            )
        if spec.gradient_checkpointing:
            recompute_activations(model)
        fuse_activations(model)
        fuse_norms(model)
        speed_up_linears(model)
        if self.disable_dropout:
            self._dropout += disable_dropout(model)
        decoder = self.seen(model)
        decoder.adapters = adapters
        decoder.shares = self.disable_dropout or not has_dropout(model)
        return decoder

    def load_network(self, spec: ModelSpec) -> Any:
        """Builds or reads a network, of the kind that this module trains.

        Args:
            spec: Of the network.

        Returns:
            A model of transformers, or what can be used as one.
        """
        return spec.load()

    def seen(self, model: Any) -> Decoder:
        """One way to call a network, once it is known what it can do.

        Args:
            model: From :meth:`load_network`.

        Returns:
            What calls it.
        """
        decoder = decoder_of(model)
        probe(decoder)
        return decoder

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        reference = self.__dict__.get("reference")
        if reference is not None:  # it stays out of the module tree, but goes where the policy goes
            reference.network._apply(fn)
            if reference.waits:
                wait(reference.network, shared=self.policy)
        return super()._apply(fn, recurse)

    # --- training -----------------------------------------------------------------------------------------------

    @abstractmethod
    def progress(self) -> float:
        """How far the run has come, from 0 to 1."""

    def configure_callbacks(self) -> list[Callback]:
        """Looks at the trainer before anything else does, and gives the data its tokenizer."""
        check_strategy(self.trainer)
        check_precision(self.trainer)
        check_datamodule(self.trainer)
        make_checkpoints_atomic(self.trainer.strategy)
        self._end = EndTogether(self.trainer) if self.trainer.world_size > 1 else None
        for advice in _WRONG_ADVICE:
            warnings.filterwarnings("ignore", message=advice)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, RLHFDataModule):
            data.tokenizer = self.tokenizer
        return []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuses what another module would learn from."""
        expect(batch, *self.learns_from, self, "train_dataloaders", "learns from")
        if self.trainer.ckpt_path is not None:
            count_logged(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends the run on all processes where one of them was told to."""
        if self._end is not None:
            self._end.agree()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Lets gradients go; the memory of the head's, which is the largest, is kept for the next."""
        decoder = self.policy.decoder
        gradient = decoder.model.get_output_embeddings().weight.grad if decoder.is_plain else None
        piece = gradient.untyped_storage() if type(gradient) is Tensor else None
        del gradient
        optimizer.zero_grad()
        if piece is not None:
            decoder.spare.give("gradient", piece)

    def on_train_epoch_start(self) -> None:
        """Begins an epoch, of a resumed run too."""
        go_on_with_a_new_epoch(self.trainer)

    def parts(self) -> dict[str, nn.Module]:
        """What the optimizer tells apart, by the names that ``learning_rates`` has for them."""
        return {"policy": self.policy.decoder}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains, as the optimizer gets it."""
        return parameter_groups(self.parts(), self.learning_rates, self.decay_norms_and_biases)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over all groups, and its schedule."""
        groups = self.parameter_groups()
        if not groups:
            raise ValueError(
                f"`num_layers_unfrozen={self.spec.num_layers_unfrozen}` leaves {type(self).__name__} nothing to train: "
                "unfreeze a block."
            )
        embeddings = [p for module in self.modules() if isinstance(module, nn.Embedding) for p in module.parameters()]
        optimizer = make_optimizer(self.optimizer, groups, embeddings)
        if self.policy.decoder.adapters is not None:
            self.policy.decoder.adapters.follow(optimizer)
        scheduler = make_scheduler(self.lr_scheduler, optimizer, self.warmup_updates, self.progress)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
