"""One number for a prompt and a response, from any sequence classifier with one output."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_rlhf.batches import PreferenceBatch, ResponseBatch
from lightning_rlhf.models.attention import attention_kernels, install, noticing, uninstall
from lightning_rlhf.models.blocks import find_blocks, hooked
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.outputs import same_logits
from lightning_rlhf.models.reading import aligned, unpadded


class Scorer(Decoder):
    """A sequence classifier with one output, which reads texts as fast as it can.

    Where its score is a linear function of the state at the last token, rows lie one behind the other (:meth:`line`),
    and what several responses share is read once. Otherwise (encoders, which may look at a first token or at all of
    them; encoder-decoders) its own forward reads rows padded on the right. Which of the two it is is tried out.

    Args:
        model: Called with ``input_ids`` and ``attention_mask``, it returns ``logits``, (batch, 1).
        pad: What rows are filled up with.

    Attributes:
        head: Name of the linear layer that reads the last token's state; None where the score is made otherwise.
    """

    def __init__(self, model: Any, pad: int) -> None:
        super().__init__(model)
        self.pad = pad
        self.head: str | None = None
        self.accepted = frozenset(inspect.signature(model.base_model.forward).parameters)
        self._more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self.pads = True

    def head_parameters(self) -> list[nn.Parameter]:
        """Of all that the classifier has beside its backbone."""
        backbone = {id(parameter) for parameter in self.model.base_model.parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in backbone]

    def forward(self, batch: PreferenceBatch) -> Float[Tensor, "batch responses"]:  # type: ignore[override]
        """The scores of responses; 0 for one that is not there.

        Args:
            batch: Prompts and responses; what lies in the padding changes nothing.

        Returns:
            In single precision or more, with gradients.
        """
        is_there = batch.is_there
        scores = self.scored(batch.rows())
        return torch.zeros_like(is_there, dtype=scores.dtype).masked_scatter(is_there, scores)

    def scored(self, rows: ResponseBatch) -> Float[Tensor, " rows"]:
        """The score of every row.

        Args:
            rows: Prompts and responses.

        Returns:
            In single precision or more, with gradients.
        """
        if self.head is not None:
            scores = torch.squeeze_copy(self.model.get_submodule(self.head)(self.last_states(rows)), -1)
        else:
            tokens, mask = self._joined(rows)
            scores = self.whole(tokens, mask)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def scores_at(self, rows: ResponseBatch, mask: Bool[Tensor, "rows response"]) -> Float[Tensor, "rows response"]:
        """The scores of what was written up to some of the tokens, read at each of them.

        Args:
            rows: Prompts and responses.
            mask: True at tokens of the responses at which a score is read.

        Returns:
            In single precision or more, with gradients; 0 elsewhere.
        """
        assert self.head is not None, "a score that is read at the end of all alone"
        scores = torch.squeeze_copy(self.model.get_submodule(self.head)(self.states_at(rows, mask)), -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return torch.zeros_like(mask, dtype=scores.dtype).masked_scatter(mask, scores)

    def last_states(self, rows: ResponseBatch) -> Float[Tensor, "rows width"]:
        """The states at the last tokens, where the backbone is causal.

        Args:
            rows: Prompts and responses.

        Returns:
            A state of each.
        """
        columns = torch.arange(rows.response_mask.shape[1], device=rows.response_mask.device)
        return self.states_at(rows, columns == rows.response_mask.sum(1, keepdim=True) - 1)

    def states_at(self, rows: ResponseBatch, mask: Bool[Tensor, "rows response"]) -> Float[Tensor, "chosen width"]:
        """The states at some of the responses' tokens, where the backbone is causal.

        Args:
            rows: Prompts and responses.
            mask: True at these tokens.

        Returns:
            A state of each, row by row.
        """
        # A token more, which nobody reads: the state that would predict it is that of the last one.
        longer = ResponseBatch(
            prompt_tokens=rows.prompt_tokens,
            prompt_mask=rows.prompt_mask,
            response_tokens=nn.functional.pad(rows.response_tokens, (0, 1)),
            response_mask=torch.cat([torch.ones_like(rows.response_mask[:, :1]), rows.response_mask], dim=1),
        )
        first = self.line(longer)
        if first is not None:
            reading = unpadded(longer, None, first)
            assert reading.chosen is not None
            places = torch.zeros_like(longer.response_mask, dtype=torch.long)
            places = places.masked_scatter(longer.response_mask, reading.chosen)
            states = self._states(reading.tokens, reading.mask, reading.positions)[0]
            return states.index_select(0, places[:, 1:][mask])
        tokens, is_real = self._joined(rows)
        states = self._states(tokens, is_real.long(), None)
        row, column = mask.nonzero().unbind(1)
        return states[row, rows.prompt_mask.sum(1)[row] + column]

    def whole(self, tokens: Int[Tensor, "rows total"], mask: Bool[Tensor, "rows total"]) -> Float[Tensor, " rows"]:
        """The scores of texts, by the classifier's own forward.

        Args:
            tokens: Padded right.
            mask: True where a token is real.

        Returns:
            A score of each.
        """
        if not self.pads and not bool(mask.all()):
            lengths = mask.sum(1).tolist()
            pairs = zip(tokens.split(1), lengths, strict=True)
            return torch.cat(
                [self.whole(row[:, :n], torch.ones_like(row[:, :n], dtype=torch.bool)) for row, n in pairs]
            )
        tokens = torch.where(mask, tokens, self.pad)
        with attention_kernels(tokens.device):
            return self.model(input_ids=tokens, attention_mask=mask.long(), **self._more).logits[:, 0]

    def _states(self, tokens: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
        arguments = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        if positions is not None:
            arguments["position_ids"] = positions
        arguments = {name: value for name, value in arguments.items() if name in self.accepted}
        with attention_kernels(tokens.device):
            return self.model.base_model(**arguments).last_hidden_state

    @staticmethod
    def _joined(rows: ResponseBatch) -> tuple[Tensor, Tensor]:
        """Prompts with their responses, padded on the right, no wider than they need be."""
        mask = torch.cat([rows.prompt_mask, rows.response_mask], dim=1)
        tokens = torch.cat([rows.prompt_tokens, rows.response_tokens], dim=1)
        width = int(mask.sum(1).max())
        return aligned(tokens, mask, "right")[:, :width], aligned(mask, mask, "right")[:, :width]

    # --- what it can do -------------------------------------------------------------------------------------------

    def sample(self) -> tuple[Int[Tensor, "1 total"], Bool[Tensor, "1 total"]]:
        """A few tokens to try things on, the last of them EOS, where there is one; and their mask."""
        config, embedding = self.model.config.get_text_config(), self.model.get_input_embeddings().weight
        eos = config.eos_token_id
        ends = [token for token in (eos if isinstance(eos, list) else [eos]) if token is not None][:1]
        others = [token for token in range(embedding.shape[0]) if token not in (*ends, self.pad)]
        letters = [others[i % len(others)] for i in range(6 - len(ends))]
        tokens = torch.tensor([[*letters, *ends]], device=embedding.device)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def find_blocks(self) -> None:
        """Finds the blocks by watching a pass."""
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", 0)
        self.blocks = find_blocks(self.model, layers, lambda: self.whole(*self.sample()))
        if self.blocks is not None:
            blocks = (self.model.get_submodule(name) for name in self.blocks.blocks)
            self.block_size = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)

    @torch.no_grad()
    def probe(self) -> None:
        """Tries with a few tokens how the score is made, and whether rows may lie one behind the other."""
        was_training = self.training
        self.eval()
        tokens, mask = self.sample()
        try:
            self.head = self._head(tokens, mask)
            self.find_blocks()
            self.pads = self._bears_padding(tokens, mask)
            self.head = self.head if self.pads else None
            self.unpads = self.head is not None and self._unpads(tokens)
        finally:
            self.train(was_training)

    def _head(self, tokens: Tensor, mask: Tensor) -> str | None:
        """The layer that reads what the backbone says, and whose output at the last token is the score."""
        for name, layer in self.model.named_children():
            if not (isinstance(layer, nn.Linear) and layer.out_features == 1):
                continue
            seen: list[Tensor] = []
            with hooked(layer, lambda _, inputs, seen=seen: seen.append(inputs[0])):
                score = self.whole(tokens, mask)
            try:
                states = self._states(tokens, mask.long(), None)
            except (AttributeError, RuntimeError, TypeError, ValueError):
                return None  # it reads more than these, as encoder-decoders do
            said = layer(states[:, -1])[:, 0]
            is_read = seen and same_logits(seen[0].reshape(-1, states.shape[-1])[-1], states[0, -1], spread=1.0)
            if is_read and same_logits(said, score, spread=float(score.abs().max())):
                return name
        return None

    def _bears_padding(self, tokens: Tensor, mask: Tensor) -> bool:
        alone = self.whole(tokens, mask)
        longer, width = torch.cat([tokens[:, :4], tokens], dim=1), tokens.shape[1]
        beside = torch.cat([nn.functional.pad(tokens, (0, 4)), longer])
        is_real = torch.arange(width + 4, device=tokens.device)[None] < torch.tensor(
            [[width], [width + 4]], device=tokens.device
        )
        return same_logits(self.whole(beside, is_real)[:1], alone, spread=float(alone.abs().max()))

    def _unpads(self, tokens: Tensor) -> bool:
        """Whether rows may lie one behind the other; two of these share a prompt."""
        if not install(self.model.base_model):
            return False
        prompts, responses = (
            torch.cat([tokens[:, :3], tokens[:, :3], tokens[:, 1:4]]),
            tokens.flip(1)[:, :4].repeat(3, 1),
        )
        is_prompt, is_response = torch.ones_like(prompts).bool(), torch.ones_like(responses).bool()
        is_prompt[2, 0] = is_response[1, 2:] = is_response[2, 3:] = False
        rows = ResponseBatch(
            prompt_tokens=prompts, prompt_mask=is_prompt, response_tokens=responses, response_mask=is_response
        )
        expected = torch.cat([self.last_states(rows.select(torch.tensor([i]))) for i in range(3)])
        shares, pads = self.shares, self.pads
        self.unpads, self.shares, self.pads = True, True, False  # in line, whether it pays or not
        try:
            with noticing() as noticed:
                found = same_logits(self.last_states(rows), expected, spread=1.0)
            self.packs = all(noticed)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            found = False  # whatever a forward that does not fit stumbles over
        finally:
            self.unpads, self.shares, self.pads = False, shares, pads
        if not found:
            uninstall(self.model.base_model)
        return found
