"""One way to call any language model of transformers, found out by trying rather than by name."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_rlhf.functional.head import head_logprobs
from lightning_rlhf.functional.logprobs import response_logprobs
from lightning_rlhf.functional.spare import Spare
from lightning_rlhf.models.adapters import Adapters
from lightning_rlhf.models.attention import attention_kernels, packs
from lightning_rlhf.models.blocks import Blocks, find_blocks, hooked, instead
from lightning_rlhf.models.lookup import sparse_lookup
from lightning_rlhf.models.outputs import DecoderOutput, Said, same_logits
from lightning_rlhf.models.reading import Reading, Responses, first_with_prompt, padded, pays, positions_of, unpadded
from lightning_rlhf.models.states import choosing, last
from lightning_rlhf.models.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder(nn.Module):
    """A decoder-only model, whatever its arguments are called; and what every language model has in common.

    Args:
        model: Any ``...ForCausalLM`` of transformers.

    Attributes:
        caches: Whether it can be decoded from a cache, token by token.
        pads: Whether left padding leaves its logits alone.
        chooses: Whether its head may be given single positions, and need not read the padding.
        is_plain: Whether its logits are the product of states and head, with nothing after it.
        unpads: Whether it reads rows that lie one behind the other.
        shares: Whether it may then read a prompt once that several rows have: not where dropout is to differ.
        packs: Whether kernels of a GPU for rows of different lengths say what its attention says.
        block_size: Parameters of its largest block; 0 where blocks were not found.
        is_compiled: Whether its blocks are compiled, for passes that train.
        blocks: Where it can be cut; None where that is not known.
        encoder_blocks: Names of an encoder's blocks.
        trunk: The frozen blocks below those that train, whose work can be kept; None where there are none, or where
            the model cannot begin in its middle.
        adapters: What trains in its layers, if it was given some.
        spare: Memory that one pass through the head leaves to the next.
    """

    has_encoder = False
    """Whether prompts are read by an encoder, and only responses by the decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.accepted = frozenset(inspect.signature(model.forward).parameters)
        self.caches = {"past_key_values", "use_cache"} <= self.accepted
        self.pads = "attention_mask" in self.accepted
        self.chooses = True
        self.is_plain = self.unpads = self.shares = self.packs = self.is_compiled = False
        self.block_size = 0
        self.blocks: Blocks | None = None
        self.encoder_blocks: tuple[str, ...] = ()
        self.trunk: Trunk | None = None
        self.adapters: Adapters | None = None
        self.spare = Spare()

    @property
    def width(self) -> int:
        """Width of the states that the head reads."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def max_positions(self) -> int | None:
        """How many tokens a row may have, prompt and response together; None if the config names no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None or limit <= 0 else limit  # XLNet's -1 is no limit

    def prompt_room(self, max_new_tokens: int) -> int | None:
        """How many tokens a prompt may have.

        Args:
            max_new_tokens: What its response may need.

        Returns:
            The number; None for no limit.
        """
        return None if self.max_positions is None else self.max_positions - max_new_tokens

    @property
    def response_room(self) -> int | None:
        """How many tokens a response may have, where it does not share the prompt's room; None for no limit."""
        return None

    def find_blocks(self) -> None:
        """Finds the blocks by watching a pass."""
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", 0)
        self.blocks = find_blocks(self.model, layers, lambda: self(*self.sample(), keep=1))
        if self.blocks is not None:
            blocks = (self.model.get_submodule(name) for name in self.blocks.blocks)
            self.block_size = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)

    def begin(
        self, prompt_tokens: Int[Tensor, "batch prompt"], prompt_mask: Bool[Tensor, "batch prompt"]
    ) -> tuple[Int[Tensor, "batch begun"], Bool[Tensor, "batch begun"], Any]:
        """What stands before the first token of a response.

        Args:
            prompt_tokens: Padded left.
            prompt_mask: True where a token is real.

        Returns:
            Tokens to be read, their mask, and the cache that goes with them: here the prompt, and none.

        Raises:
            ValueError: If prompts must be padded and the model cannot be.
        """
        self.check_padding(prompt_mask)
        return prompt_tokens, prompt_mask, None

    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        mask: Bool[Tensor, "batch total"],
        keep: int,
        cache: Any = None,
        use_cache: bool = False,
        trunk: Float[Tensor, "batch new trunk"] | None = None,
        positions: Int[Tensor, "batch new"] | None = None,
    ) -> DecoderOutput:
        """Reads tokens, after those in the cache if there is one.

        Args:
            tokens: What to read.
            mask: True where a token is real, those in the cache included; with ``positions``, (batch, 1, new, cached),
                True where each looks.
            keep: For how many of the last positions logits are wanted.
            cache: From an earlier call.
            use_cache: Whether the output should hold a cache.
            trunk: What an earlier call returned for these tokens; the frozen blocks are then not run.
            positions: Of the tokens in their rows; by default as the mask says.

        Returns:
            Logits, states, cache, and the trunk if it can be kept.
        """
        states: list[Tensor] = []

        def read(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # A slice is multiplied by another kernel where the head is frozen, and a reference would not quite be the
            # policy. (A slice of one row calls itself contiguous.)
            states.append(inputs[0].clone(memory_format=torch.contiguous_format))
            return states[-1], *inputs[1:]

        if positions is None:
            positions, mask = positions_of(mask)[:, -tokens.shape[1] :], mask.long()
        given = self._given(cache)
        with hooked(self.model.get_output_embeddings(), read), self._watched(trunk) as seen:
            output = self._run(tokens, mask, positions, keep, trunk, use_cache=use_cache, **given)
        kept = output.past_key_values if use_cache else None
        if kept is not None and "past_key_values" not in given:  # the first time
            from lightning_rlhf.models.cache import give_room  # imports transformers, which is there by now

            give_room(kept)
        return DecoderOutput(last(output.logits, keep), last(states[-1], keep), kept, seen[-1] if seen else None)

    def _given(self, cache: Any) -> dict[str, Any]:
        """What goes with the tokens of a step."""
        return {} if cache is None else {"past_key_values": cache}

    def line(self, batch: Responses) -> list[int] | None:
        """Says how rows may lie one behind the other, and whether they should.

        Args:
            batch: Prompts and responses.

        Returns:
            For each row, the one whose prompt it looks at; None where rows are padded: on a GPU where no kernel takes
            all of them at once (in single precision, say), and on a CPU where padding costs less than attending row by
            row.
        """
        device = batch.prompt_tokens.device
        drops = self.training and not self.shares
        is_possible = device.type == "cpu" or (
            self.packs and not drops and packs(device, next(self.model.parameters()).dtype)
        )
        if not (self.unpads and is_possible and bool(batch.prompt_mask[:, -1].all())):
            return None
        first = first_with_prompt(batch, self.shares)
        return first if device.type != "cpu" or not self.pads or pays(batch, first, self.block_size) else None

    def reading(self, batch: Responses, trunk: Float[Tensor, "batch joined width"] | None) -> Reading:
        """What is to be read in order to learn how likely responses were.

        Args:
            batch: Prompts and responses; what lies in the padding changes nothing.
            trunk: What the frozen blocks made of them, where it was kept.

        Returns:
            What :meth:`read` reads.

        Raises:
            ValueError: If prompts must be padded and the model cannot be.
        """
        first = self.line(batch)
        if first is not None:
            return unpadded(batch, trunk, first)
        self.check_padding(batch.prompt_mask)
        return padded(batch, trunk, self.chooses)

    def check_padding(self, prompt_mask: Bool[Tensor, "batch prompt"]) -> None:
        """Refuses prompts of different lengths where the model cannot be padded.

        Args:
            prompt_mask: True where a token is real.

        Raises:
            ValueError: If some token is padding, and the model cannot be padded.
        """
        if not self.pads and not bool(prompt_mask.all()):
            raise ValueError(
                f"`policy={type(self.model).__name__}` cannot be padded on the left, and the prompts of this batch "
                "differ in length: use prompts of one length, or a batch size of 1."
            )

    def read(self, reading: Reading, temperature: float = 1.0) -> Said:
        """Says of tokens how likely they were.

        Args:
            reading: The tokens.
            temperature: What logits are divided by.

        Returns:
            Log-probs, entropies and states, with gradients.
        """
        states: list[Tensor] = []
        head, is_plain = self.model.get_output_embeddings(), self.is_plain and reading.chosen is not None
        tied = sparse_lookup(self.model.get_input_embeddings(), head) if is_plain else nullcontext()

        def say(chosen: Tensor) -> Tensor:
            weight = head.weight if shared is None else shared
            both = head_logprobs(chosen, weight, head.bias, reading.targets, temperature, spare=self.spare)
            return torch.stack(both, dim=-1)

        with hooked(head, choosing(reading, states)), instead(head, say) if is_plain else nullcontext(), tied as shared:
            output = self.run(reading)
        if is_plain:
            logprobs, entropy = output.logits.unbind(-1)
        else:
            logits = output.logits if reading.chosen is not None else last(output.logits, reading.keep)
            logprobs, entropy = response_logprobs(logits, reading.targets, temperature)
        return Said(logprobs, entropy, states[-1])

    def run(self, reading: Reading) -> Any:
        """Lets the model read tokens, and returns what it returns."""
        return self._run(reading.tokens, reading.mask, reading.positions, reading.keep, reading.trunk)

    def _watched(self, trunk: Tensor | None) -> AbstractContextManager[list[Tensor]]:
        """What the lowest block that trains reads in a pass."""
        if self.trunk is None or trunk is not None:
            return nullcontext([] if trunk is None else [trunk])
        return self.trunk.watched(self.model)

    def _run(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, keep: int, trunk: Tensor | None, **more: Any
    ) -> Any:
        arguments = {"use_cache": False, **self._arguments(tokens, mask, positions), "logits_to_keep": keep, **more}
        arguments = {name: value for name, value in arguments.items() if name in self.accepted}
        given = None if self.trunk is None or trunk is None else self.trunk.replaced(self.model, trunk)
        with attention_kernels(tokens.device), given or nullcontext():
            return self.model(**arguments)

    def _arguments(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}

    def bears_padding(self, tokens: Int[Tensor, "1 total"], plain: Tensor) -> bool:
        """Whether left padding leaves the logits alone.

        Args:
            tokens: A few, unpadded.
            plain: What the model says of the last two of them.

        Returns:
            The answer.
        """
        longer = torch.cat([tokens.new_zeros(1, 3), tokens], dim=1)
        mask = torch.arange(longer.shape[1], device=tokens.device)[None] >= 3
        return same_logits(self(longer, mask, keep=2).logits, plain)

    def sample(self) -> tuple[Int[Tensor, "1 total"], Bool[Tensor, "1 total"]]:
        """A few tokens to try things on, and their mask."""
        embedding = self.model.get_input_embeddings().weight
        tokens = (torch.arange(6, device=embedding.device) % embedding.shape[0])[None]
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
