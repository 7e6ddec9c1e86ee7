"""One way to call any decoder-only model of transformers, found out by trying rather than by name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_rlhf.models.blocks import Blocks, find_blocks
from lightning_rlhf.models.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class DecoderOutput:
    """What a model says about the positions that were asked for.

    Attributes:
        logits: As the model gives them, soft caps and all; of chosen positions (1, chosen, vocabulary).
        states: What its language-modelling head read; of chosen positions (1, chosen, width).
        cache: Keys and values so far, or None where the model keeps none.
        trunk: What the lowest block that trains read, at all positions; None where nothing is kept.
    """

    logits: Float[Tensor, "batch positions vocabulary"]
    states: Float[Tensor, "batch positions width"]
    cache: Any = None
    trunk: Float[Tensor, "batch new trunk"] | None = None


class Decoder(nn.Module):
    """A decoder-only model, whatever its arguments are called.

    Args:
        model: Any ``...ForCausalLM`` of transformers.

    Attributes:
        caches: Whether it can be decoded from a cache, token by token.
        pads: Whether left padding leaves its logits alone.
        chooses: Whether its head may be given single positions, and need not read the padding.
        blocks: Where it can be cut; None where that is not known.
        trunk: The frozen blocks below those that train, whose work can be kept; None where there are none, or where
            the model cannot begin in its middle.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.accepted = frozenset(inspect.signature(model.forward).parameters)
        self.caches = {"past_key_values", "use_cache"} <= self.accepted
        self.pads = "attention_mask" in self.accepted
        self.chooses = True
        self.blocks: Blocks | None = None
        self.trunk: Trunk | None = None

    @property
    def width(self) -> int:
        """Width of the states that the head reads."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def max_positions(self) -> int | None:
        """How many tokens a row may have, prompt and response together; None if the config names no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None or limit < 0 else limit  # XLNet's -1 is no limit

    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        mask: Bool[Tensor, "batch total"],
        keep: int,
        cache: Any = None,
        use_cache: bool = False,
        positions: Int[Tensor, "batch new"] | None = None,
        trunk: Float[Tensor, "batch new trunk"] | None = None,
        chosen: Bool[Tensor, "batch keep"] | None = None,
    ) -> DecoderOutput:
        """Reads tokens, after those in the cache if there is one.

        Args:
            tokens: What to read.
            mask: True where a token is real, those in the cache included.
            keep: For how many of the last positions logits are wanted.
            cache: From an earlier call.
            use_cache: Whether the output should hold a cache.
            positions: Of the tokens that are read; by default those that the mask counts.
            trunk: What an earlier call returned for these tokens; the frozen blocks are then not run.
            chosen: True at those of the last ``keep`` positions that the head is to read; all by default.

        Returns:
            Logits, states, cache, and the trunk if it can be kept.
        """
        arguments: dict[str, Any] = {
            "attention_mask": mask.long(),
            "position_ids": positions_of(mask)[:, -tokens.shape[1] :] if positions is None else positions,
            "logits_to_keep": keep,
            "use_cache": use_cache,
        }
        if cache is not None:
            arguments["past_key_values"] = cache
        arguments = {name: value for name, value in arguments.items() if name in self.accepted}

        states: list[Tensor] = []

        def read(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # A slice is multiplied by another kernel where the head is frozen, and a reference would not quite be the
            # policy. (A slice of one row calls itself contiguous.)
            if chosen is None:
                states.append(inputs[0].clone(memory_format=torch.contiguous_format))
            else:
                states.append(inputs[0][:, -keep:][chosen][None])  # (1, chosen, width)
            return states[-1], *inputs[1:]

        handle = self.model.get_output_embeddings().register_forward_pre_hook(read)
        try:
            if self.trunk is None:
                output = self.model(input_ids=tokens, **arguments)
            elif trunk is None:
                with self.trunk.watched(self.model) as seen:
                    output = self.model(input_ids=tokens, **arguments)
                trunk = seen[-1]
            else:
                with self.trunk.replaced(self.model, trunk):
                    output = self.model(input_ids=tokens, **arguments)
        finally:
            handle.remove()
        kept = output.past_key_values if use_cache else None
        if cache is None and kept is not None:
            from lightning_rlhf.models.cache import give_room  # imports transformers, which is there by now

            give_room(kept)
        if chosen is not None:
            return DecoderOutput(output.logits, states[-1], kept, trunk)
        return DecoderOutput(_last(output.logits, keep), _last(states[-1], keep), kept, trunk)

    @torch.no_grad()
    def probe(self) -> None:
        """Tries with a few tokens what the model can do, sets the attributes, and warns of what it cannot.

        Raises:
            ValueError: If what it says of a token depends on what follows.
        """
        was_training = self.training
        self.eval()
        tokens, mask = self.sample()
        name = type(self.model).__name__
        try:
            plain = self(tokens, mask, keep=2).logits
            layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", 0)
            self.blocks = find_blocks(self.model, layers, lambda: self(tokens, mask, keep=2))
            if not _same(self(tokens[:, :5], mask[:, :5], keep=1).logits, plain[:, :1]):
                raise ValueError(
                    f"`model={name}` looks at tokens that come later, so that it cannot write: take a causal model, or "
                    "make this one causal (BERT: `is_decoder=True` in its config)."
                )
            last = torch.tensor([[False, True]], device=tokens.device)
            self.chooses = _same(self(tokens, mask, keep=2, chosen=last).logits, plain[:, 1:])
            self.pads = self.pads and self._pads(tokens, plain)
            self.caches = self.caches and self._caches(tokens, plain)
        finally:
            self.train(was_training)
        if not self.caches:
            rank_zero_warn(f"{name} cannot be decoded from a cache: every token reads the whole text again.")
        if not self.pads:
            rank_zero_warn(f"{name} cannot be padded on the left: the prompts of a batch must be equally long.")

    def sample(self) -> tuple[Int[Tensor, "1 total"], Bool[Tensor, "1 total"]]:
        """A few tokens to try things on, and their mask."""
        embedding = self.model.get_input_embeddings().weight
        tokens = (torch.arange(6, device=embedding.device) % embedding.shape[0])[None]
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def freeze(self, num_layers_unfrozen: int) -> None:
        """Leaves the top blocks and what comes after them to train, less the embeddings, and nothing else.

        Args:
            num_layers_unfrozen: How many blocks; 0 freezes the whole model, -1 nothing.

        Raises:
            ValueError: If there are fewer blocks, or they were not found.
        """
        if num_layers_unfrozen == -1:
            return
        name = type(self.model).__name__
        if self.blocks is None:
            raise ValueError(
                f"`num_layers_unfrozen={num_layers_unfrozen}`: the blocks of {name} were not found, so that only -1 "
                "(everything trains) is possible."
            )
        if num_layers_unfrozen > len(self.blocks.blocks):
            raise ValueError(
                f"`num_layers_unfrozen={num_layers_unfrozen}` is more than the {len(self.blocks.blocks)} blocks of "
                f"{name}: use -1 if everything is to train."
            )
        self.model.requires_grad_(False)
        embedding = self.model.get_input_embeddings().weight
        for top in self.blocks.top(num_layers_unfrozen) if num_layers_unfrozen else ():
            for parameter in self.model.get_submodule(top).parameters():
                parameter.requires_grad_(parameter is not embedding and parameter.is_floating_point())
        if 0 < num_layers_unfrozen < len(self.blocks.blocks):
            branch = len(self.blocks.blocks) - num_layers_unfrozen
            self._keep_trunk(Trunk(self.blocks.blocks[:branch], self.blocks.blocks[branch]))

    def _keep_trunk(self, trunk: Trunk) -> None:
        """Tries on padded rows whether a pass may begin with kept states of some of them."""
        tokens, mask = self.sample()
        tokens, mask = torch.cat([tokens, tokens.flip(1)]), torch.cat([mask, mask])
        mask[0, 0] = not self.pads
        was_training = self.training
        self.eval()
        try:
            with trunk.learning_forms(self.model), torch.no_grad():
                self(tokens, mask, keep=2)
            self.trunk = trunk
            whole = self(tokens, mask, keep=2)
            assert whole.trunk is not None
            begun = self(tokens[1:], mask[1:], keep=2, trunk=whole.trunk[1:])
            keeps = not whole.trunk.requires_grad and _same(begun.logits, whole.logits[1:])
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError):
            keeps = False  # whatever a forward that does not fit stumbles over
        finally:
            self.train(was_training)
        if not keeps:
            self.trunk = None
            rank_zero_warn(
                f"{type(self.model).__name__} cannot begin in its middle: its frozen blocks run in every pass."
            )

    def _pads(self, tokens: Tensor, plain: Tensor) -> bool:
        padded = torch.cat([tokens.new_zeros(1, 3), tokens], dim=1)
        mask = torch.arange(padded.shape[1], device=tokens.device)[None] >= 3
        return _same(self(padded, mask, keep=2).logits, plain)

    def _caches(self, tokens: Tensor, plain: Tensor) -> bool:
        rows = torch.cat([tokens, tokens.flip(1)])
        mask = torch.ones_like(rows, dtype=torch.bool)
        first = tokens.shape[1] - 1
        start = self(rows[:, :first], mask[:, :first], keep=1, use_cache=True)
        if not (hasattr(start.cache, "batch_select_indices") and hasattr(start.cache, "batch_repeat_interleave")):
            return False
        start.cache.batch_repeat_interleave(2)
        start.cache.batch_select_indices(torch.ones(1, dtype=torch.long, device=tokens.device))
        step = self(tokens[:, first:], mask[:1], keep=1, cache=start.cache, use_cache=True)
        return _same(torch.cat([start.logits[:1], step.logits], dim=1), plain)


def positions_of(mask: Bool[Tensor, "batch total"]) -> Int[Tensor, "batch total"]:
    """Numbers the real tokens of every row from 0; padding before them is at 0, and behind them where they end.

    Args:
        mask: True where a token is real.

    Returns:
        The positions.
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _last(values: Tensor, keep: int) -> Tensor:
    """The last positions; what has no others is no slice, whose gradient would be copied into zeros."""
    return values if values.shape[1] == keep else values[:, -keep:]


def _same(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by rounding only, measured against their spread."""
    tolerance = 1e-3 if torch.finfo(expected.dtype).bits >= 32 else 0.1
    if logits.shape != expected.shape:
        return False
    logits, expected = logits.float(), expected.float()
    return bool((logits - expected).abs().max() <= tolerance * expected.std())
