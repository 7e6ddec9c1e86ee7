"""What the passes of a run hold, found by making each of them on tensors without numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_rlhf.generation.recorder import FEWEST, level
from lightning_rlhf.generation.sampling import Sampling, draw
from lightning_rlhf.models.blocks import instead
from lightning_rlhf.models.branches import ValueAdapter, ValueBranch
from lightning_rlhf.models.freezing import frozen_blocks
from lightning_rlhf.models.trunk import Trunk
from lightning_rlhf.planning.live import Live
from lightning_rlhf.planning.networks import Classifier
from lightning_rlhf.planning.outlines import Network
from lightning_rlhf.planning.paper import (
    ACTIVATIONS,
    CACHE,
    GRADIENTS,
    LOGITS,
    PACKED,
    HeadOnPaper,
    SoftmaxOnPaper,
    fixed,
    hold,
    longest,
)
from lightning_rlhf.planning.placement import Placement
from lightning_rlhf.planning.rows import Rows, reading, values_of


class Passes:
    """The passes of one network, and of a critic beside it.

    Args:
        mode: In which the network was made.
        network: With the types in which it computes.
        placement: Of the run.
        critic: A network of its own that says values in the same passes.
    """

    def __init__(
        self, mode: FakeTensorMode, network: Network, placement: Placement, critic: Network | None = None
    ) -> None:
        self.mode = mode
        self.network = network
        self.critic = critic
        self.all = [network] if critic is None else [network, critic]
        self.placement = placement
        self.decoder = network.decoder
        self.head: Any = self.decoder.model.get_output_embeddings()
        self.is_plain = self._is_plain()
        self.recorded = 0  # bytes of the cache that steps of a rollout are recorded on
        self.left = 0  # bytes that a backward pass leaves to the next
        self.spare: list[Tensor] = []  # that which has them

    def update(self, rows: Rows, in_forward: bool, in_backward: bool) -> Counter[str]:
        """Forward and backward pass of a micro-batch.

        Args:
            rows: Of the micro-batch.
            in_forward: Whether there are gradients, of an earlier one, during the forward pass.
            in_backward: Whether these are still there during the backward pass, and added to.

        Returns:
            Bytes by what they are for, when they are most.
        """
        trained = [parameter for network in self.all for parameter in network.trained]
        with self._live(training=True) as live:
            hooks = [p.register_post_accumulate_grad_hook(lambda p: live.relabel(p.grad, GRADIENTS)) for p in trained]
            self._gradients(live, trained, in_forward)
            with self.placement.autocast():
                objective = self._forward(live, rows)
            if not in_backward:
                self._gradients(live, trained, False)
            objective.backward()
            del objective
            self._gradients(live, trained, False)
        for hook in hooks:
            hook.remove()
        self.left = sum(tensor.nbytes for tensor in self.spare)
        self.spare.clear()
        return live.peak

    def scoring(self, rows: Rows) -> Counter[str]:
        """A forward pass without gradients, for log-probs alone.

        Args:
            rows: Of the pass.

        Returns:
            Bytes by what they are for, when they are most.
        """
        with self._reading() as live:
            self._forward(live, rows, with_values=False)
        return live.peak

    def valuing(self, rows: Rows) -> Counter[str]:
        """A forward pass without gradients, for values alone, where the sampler does not have them.

        Args:
            rows: Of the pass.

        Returns:
            Bytes by what they are for, when they are most.
        """
        with self._reading() as live:
            if self.critic is not None:
                values_of(self.critic, rows)
            elif isinstance(branch := self.network.value, ValueBranch | ValueAdapter):
                branch.alone(self.decoder, reading(self.decoder, rows))
        return live.peak

    def rollout(self, rows: Rows, group: int, sampling: Sampling, learnt: int = 0) -> Counter[str]:
        """Reading of prompts, and the last step of writing, when the cache is longest.

        Args:
            rows: Prompts of an iteration, and the longest response.
            group: Responses to each prompt.
            sampling: How tokens are drawn.
            learnt: Tokens of responses that a backward pass learns from.

        Returns:
            Bytes by what they are for, when they are most.
        """
        with self._reading() as live:
            tokens, mask, cache = self._begun(rows)
            output = self.decoder(tokens, mask, keep=1, cache=cache, use_cache=self.decoder.caches)
            cache = output.cache
            read, logits = tokens.shape[1], output.logits[:, 0]
            del output
            hold(live, cache)
            if cache is not None and group > 1:
                cache.batch_repeat_interleave(group)
                hold(live, cache)
            logits = logits.repeat_interleave(group, 0)
            prompts, live.peak = live.peak, live.now.copy()  # from here on a step
            count, last = rows.count * group, read + rows.response - 1
            with live.labelled(LOGITS):
                draw(logits, torch.zeros(count), sampling)
            drawing = live.peak[LOGITS]
            read_again = 1 if getattr(cache, "past", cache) is not None else last
            tokens = torch.zeros(count, read_again, dtype=torch.long)
            mask = torch.ones(count, last if read_again > 1 else read + 1, dtype=torch.bool)
            output = self.decoder(tokens, mask, keep=1, cache=cache, use_cache=self.decoder.caches)
            hold(live, cache)
            # Room for more tokens is made in this first step, and is there in the last one.
            passing = live.peak.total() - live.now.total()
            del output
        size = longest(cache, read, last)
        if self.placement.is_gpu and not self.placement.is_sharded and sampling.max_new_tokens >= FEWEST:
            self.recorded = fixed(cache, level(last + 1))
            # What the prompt was read into is still there when the first step is made.
            size = self.recorded + fixed(cache, read) if self.recorded else size
        step = Counter({CACHE: size, LOGITS: drawing, ACTIVATIONS: passing})
        return max(prompts, step, key=Counter.total) + self._packed(count, sampling, learnt)

    def _packed(self, rows: int, sampling: Sampling, learnt: int) -> Counter[str]:
        """Copies of weights that a step reads, on a CPU."""
        from lightning_rlhf.models.linear import packed_bytes  # imports transformers, which is there by now

        is_plain = not (self.placement.is_gpu or self.placement.is_sharded)
        if not is_plain or self.placement.precision.endswith("mixed") or sampling.max_new_tokens < FEWEST:
            return Counter()
        return Counter({PACKED: packed_bytes(self.decoder.model, rows, learnt, self.decoder.encoder_blocks)})

    def trunk_bytes(self, rows: Rows) -> int:
        """What frozen blocks made of texts, where it can be kept.

        Args:
            rows: The texts.

        Returns:
            The bytes; 0 where there are no frozen blocks.
        """
        branch = frozen_blocks(self.decoder, self.network.branches)
        if branch is None:
            return 0
        assert self.decoder.blocks is not None
        name = self.decoder.blocks.blocks[branch]
        watched = Trunk((), name).watched(self.decoder.model)
        with self.mode, torch.no_grad(), self.placement.autocast(), watched as seen:
            self.decoder(*self.decoder.sample(), keep=1)
        prefix = len(getattr(self.decoder, "prefix", ()))
        return rows.count * (rows.columns + prefix) * seen[-1].shape[-1] * seen[-1].element_size()

    def _forward(self, live: Live, rows: Rows, with_values: bool = True) -> Tensor:
        """Something that depends on log-probs and values of responses."""
        begun, mask, cache = self._begun(rows)
        written = torch.zeros(rows.count, rows.response - 1, dtype=torch.long)
        tokens = torch.cat([begun, written], dim=1)
        mask = torch.cat([mask, torch.ones_like(written, dtype=torch.bool)], dim=1)

        def say(states: Tensor) -> Tensor:
            weight, bias = self.head.weight, self.head.bias
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
                states, weight = states.to(dtype), weight.to(dtype)
            spare = None if self.placement.is_gpu else self.spare
            return HeadOnPaper.apply(states[:, -rows.response :], weight, bias, live, spare)

        value = self.network.value if with_values else None
        branch = value if isinstance(value, ValueBranch | ValueAdapter) else None
        again = reading(self.decoder, rows)
        if again.source is not None and isinstance(branch, ValueBranch):
            again.source.states = cache.states  # both read what the encoder made once
        listening = nullcontext([]) if branch is None else branch.listening(self.decoder, again)
        with instead(self.head, say) if self.is_plain else nullcontext(), listening as heard:
            output = self.decoder(tokens, mask, rows.response, cache)
        said = (output.logits if self.is_plain else SoftmaxOnPaper.apply(output.logits, live)).sum()
        if branch is not None:
            said = said + branch(self.decoder, again, heard).sum()
        elif value is not None:
            said = said + value(output.states).sum()
        if with_values and self.critic is not None:
            said = said + values_of(self.critic, rows).sum()
        return said

    def _begun(self, rows: Rows) -> tuple[Tensor, Tensor, Any]:
        prompt = torch.zeros(rows.count, rows.prompt, dtype=torch.long)
        return self.decoder.begin(prompt, torch.ones_like(prompt, dtype=torch.bool))

    def _is_plain(self) -> bool:
        """Whether logits are the product of states and head, with nothing after it."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_hook(lambda *args: seen.append(args[-1]))
        try:
            with self.mode, torch.no_grad():
                logits = self.decoder(*self.decoder.sample(), keep=1).logits
        finally:
            hook.remove()
        is_same = logits.untyped_storage()._cdata == seen[-1].untyped_storage()._cdata and seen[-1]._version == 0
        return isinstance(self.head, nn.Linear) and is_same

    @contextmanager
    def _live(self, training: bool) -> Iterator[Live]:
        with self.mode, Live(ACTIVATIONS) as live:
            for network in self.all:
                live.ignore(network.tensors)
                for part in network.modules:
                    part.train(training)
            yield live

    @contextmanager
    def _reading(self) -> Iterator[Live]:
        """Without gradients, as for all that does not train."""
        with torch.no_grad(), self._live(training=False) as live, self.placement.autocast():
            yield live

    @staticmethod
    def _gradients(live: Live, parameters: list[nn.Parameter], are_there: bool) -> None:
        with live.labelled(GRADIENTS):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter) if are_there else None


@torch.no_grad()
def scored(mode: FakeTensorMode, classifier: Classifier, rows: Rows) -> Counter[str]:
    """A pass of a reward model.

    Args:
        mode: In which it was made.
        classifier: The model.
        rows: Texts that it scores.

    Returns:
        Bytes by what they are for, when they are most.
    """
    model, length = classifier.model, rows.prompt + rows.response
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = length if limit is None or limit <= 0 else min(length, limit)
    count = min(rows.count, max(1, classifier.reward.batch_tokens // length))
    model.config.get_text_config().pad_token_id = 0
    with mode, Live(ACTIVATIONS) as live:
        live.ignore((*model.parameters(), *model.buffers()))
        tokens = torch.zeros(count, length, dtype=torch.long)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return live.peak
