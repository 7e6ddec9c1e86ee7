"""What a module leaves behind: checkpoints to go on from, and folders for others to read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import _IncompatibleKeys

from lightning_rlhf.data.settled import settle
from lightning_rlhf.models.adapters import REWARD
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.dropout import DropoutValues, original_dropout
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.loading import ModelSpec
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.reference import fingerprint
from lightning_rlhf.models.weights import whole_state
from lightning_rlhf.modules.evaluation import EvaluatedModule
from lightning_rlhf.modules.resuming import STATE, algorithm_of, check_resumable
from lightning_rlhf.strategies.checkpoint_io import replace_synced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SavedModule(EvaluatedModule):
    """A policy that is saved. A frozen model that can be had again by its name is in no checkpoint.

    Attributes:
        spec: From which the policy is loaded.
    """

    spec: ModelSpec
    network_argument = "policy"  # what the user calls the network, for errors

    def __init__(self) -> None:
        super().__init__()
        self._dropout: DropoutValues = []
        self._frozen: dict[str, str] = {}  # fingerprints of weights that no checkpoint holds, by network
        self._expected: dict[str, Any] = {}  # what a checkpoint said

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is neither weight nor optimizer, and leaves out of the counters what has not come to an end."""
        checkpoint[STATE] = {"algorithm": algorithm_of(self)}
        adapters = self.policy.decoder.adapters
        if adapters is not None:
            checkpoint[STATE]["adapter"] = adapters.state_dict()
        left_out = self._left_out
        if left_out:
            self._frozen = self._frozen or self._fingerprints()
            checkpoint[STATE]["frozen"] = self._frozen
            # Folders of shards are read whole or not at all.
            if not isinstance(self.trainer.strategy, ModelParallelStrategy):
                weights = checkpoint["state_dict"].items()
                checkpoint["state_dict"] = {name: weight for name, weight in weights if name not in left_out}
        settle(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses what this module cannot go on from."""
        check_resumable(self, checkpoint, self._left_out)
        if self.policy.decoder.adapters is not None:
            self.policy.decoder.adapters.load_state_dict(checkpoint[STATE]["adapter"])
        self._expected = checkpoint[STATE]

    def on_train_start(self) -> None:
        """Makes sure of the weights that the checkpoint did not hold, once they are of the type that is used."""
        expected = self._expected.pop("frozen", None)
        if expected is not None:
            self._frozen = self._fingerprints()
            for network, spec in self.saved_specs.items():
                if self._frozen.get(network) != expected.get(network):
                    argument = self.network_argument if network == "policy" else network
                    raise ValueError(
                        f"`{argument}={spec.model!r}` is not the model that `ckpt_path` was trained on: its frozen "
                        "weights differ. Resume with the model that the run began with."
                    )

    @property
    def saved_specs(self) -> dict[str, ModelSpec]:
        """From which the networks are loaded whose weights checkpoints hold, by the name of the network."""
        return {"policy": self.spec}

    @property
    def _left_out(self) -> set[str]:
        """What checkpoints do not hold: a frozen model's own weights, where its name is enough to have them again."""
        prefixes = tuple(
            f"{network}.decoder.model."
            for network, spec in self.saved_specs.items()
            if spec.is_named and (spec.adapter is not None or spec.quantization is not None)
        )
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name for name in self.state_dict() if name.startswith(prefixes) and name not in trained}

    def _fingerprints(self) -> dict[str, str]:
        left_out, state = self._left_out, self.state_dict()
        fingerprints = {}
        for network in self.saved_specs:  # in an order that is the same on all processes
            own = {name for name in left_out if name.startswith(f"{network}.") and f".{REWARD}_" not in name}
            weights = {name: state[name] for name in state if name in own}
            if weights:
                fingerprints[network] = fingerprint(weights)
        return fingerprints

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but for weights that no checkpoint holds, which are here already."""
        left_out = self._left_out
        if not left_out:
            return super().load_state_dict(state_dict, strict, assign)
        state = {name: weight for name, weight in state_dict.items() if name not in left_out}
        missing, unexpected = super().load_state_dict(state, strict=False, assign=assign)
        missing = [name for name in missing if name not in left_out]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"`state_dict` lacks {missing}, and has {unexpected}, which {type(self).__name__} has not."
            )
        return _IncompatibleKeys(missing, unexpected)

    def save_pretrained(self, folder: str | os.PathLike[str], merge_adapter: bool = False) -> None:
        """Writes model and tokenizer as a plain Hugging Face folder, with the original dropout values.

        With an adapter, that alone is written, in PEFT's form; or the model with the adapter in its weights.

        A sharded policy is put together first: call it on all processes, and process 0 writes. Everything is written
        beside the folder first; files of the same name in it are then replaced one by one.

        Args:
            folder: Where to; made if it is missing.
            merge_adapter: Whether to write a whole model, in full precision, that needs no adapter any more.
        """
        if not self.is_built:
            self.configure_model()
        adapters = self.policy.decoder.adapters
        if merge_adapter and adapters is None:
            raise ValueError(f"`merge_adapter=True`: {type(self).__name__} has no adapter, so leave it out.")
        weights = whole_state(self.policy.decoder.model) if isinstance(self.policy, FSDPModule) else None
        if self.global_rank != 0:
            return
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
            with original_dropout(self._dropout):
                self.write(beside, weights, merge_adapter)
            self.tokenizer.save_pretrained(beside)
            for path in sorted(path for path in Path(beside).rglob("*") if path.is_file()):
                place = target / path.relative_to(beside)
                place.parent.mkdir(parents=True, exist_ok=True)
                replace_synced(path, place)

    def write(self, folder: str, weights: Mapping[str, Tensor] | None, merge_adapter: bool) -> None:
        """Writes the model, or its adapter.

        Args:
            folder: Where to.
            weights: All weights of the model, where they are sharded.
            merge_adapter: Whether a model with an adapter is written whole.
        """
        decoder = self.policy.decoder
        if decoder.adapters is None:
            decoder.model.save_pretrained(folder, state_dict=weights)
        elif merge_adapter:
            merged(decoder, weights).save_pretrained(folder)
        else:
            decoder.adapters.save(folder, weights)


@torch.no_grad()
def merged(decoder: Decoder, weights: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """A second model, in whose weights the adapter is; one whose layers were quantised says how far off it is.

    Args:
        decoder: With an adapter.
        weights: All weights of its model, where they are sharded.

    Returns:
        The model, on the CPU, to be saved.
    """
    assert decoder.adapters is not None
    second = decoder.adapters.merged(weights)
    if is_quantized(decoder.model):
        tokens, mask = decoder.sample()
        was_training = decoder.training
        decoder.eval()
        logits = decoder(tokens, mask, keep=tokens.shape[1]).logits.float().cpu()
        decoder.train(was_training)
        own = decoder_of(second)(tokens.cpu(), mask.cpu(), keep=tokens.shape[1]).logits.float()
        distance = (own - logits).abs().max()
        rank_zero_info(
            f"The merged model's logits differ from those of the quantised one by {float(distance):.2g} at most; their "
            f"standard deviation is {float(logits.std()):.2g}."
        )
    return second
