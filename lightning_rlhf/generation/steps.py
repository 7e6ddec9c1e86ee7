"""Steps of decoding: from a cache that grows, or recorded once and played again."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlhf.models.outputs import same_logits
from lightning_rlhf.models.policy import NextToken, Policy

DROP_FINISHED_AT = 0.125
"""Share of finished rows from which they leave the batch: leaving copies the cache of those that stay."""
FEWEST = 16
"""Tokens of a response from which recording a step pays."""
TRIED = 2
"""Steps that are made in both ways before the recorded one is trusted."""
KEPT_BYTES = 2**32
"""Bytes of keys and values up to which they stay on a GPU between batches, and what was recorded on them."""


class Text(Protocol):
    """Everything written so far, prompt and response."""

    tokens: Int[Tensor, "rows total"]
    mask: Bool[Tensor, "rows total"]


class Steps:
    """Steps from a cache that grows with every token.

    Args:
        policy: In evaluation mode.
        cache: After the prompt was read; None where the whole text is read again.
    """

    def __init__(self, policy: Policy, cache: Any) -> None:
        self.policy = policy
        self.cache = cache

    def read(self, text: Text) -> NextToken:
        """Reads what has not been read yet.

        Args:
            text: So far.

        Returns:
            What the policy says of the token to come.
        """
        # What an encoder made of the prompt is no past of the response.
        has_past = getattr(self.cache, "past", self.cache) is not None
        step = self.policy.next_token(text.tokens[:, -1:] if has_past else text.tokens, text.mask, self.cache)
        self.cache = step.cache
        return step

    def staying(self, alive: Bool[Tensor, " rows"], remaining: int) -> Int[Tensor, " staying"] | None:
        """Which rows are read on, after some have ended.

        Args:
            alive: Those that have not.
            remaining: How many these are.

        Returns:
            Their numbers; None where all stay.
        """
        if len(alive) == 1 or len(alive) - remaining < DROP_FINISHED_AT * len(alive):
            return None
        return alive.nonzero().squeeze(1) if remaining else alive.new_zeros(1, dtype=torch.long)

    def select(self, index: Int[Tensor, " staying"]) -> None:
        """Lets the others go.

        Args:
            index: Of :meth:`staying`.
        """
        if self.cache is not None:
            self.cache.batch_select_indices(index)


class RecordedSteps(Steps):
    """Steps that were recorded as CUDA graphs, one for each number of rows and of columns of the cache.

    A step launches hundreds of kernels, which takes longer than to run them; a graph is launched at once. Rows leave
    when half of them have ended, so that few graphs are needed.

    Args:
        policy: In evaluation mode.
        cache: After the prompt was read.
        text: The prompt.
        recorder: That has the graphs.
    """

    def __init__(self, policy: Policy, cache: Any, text: Text, recorder: Recorder) -> None:
        super().__init__(policy, cache)
        self.recorder = recorder
        self.rows = len(text.mask)
        recorder.fixed.fill(cache, text.mask)
        self._let_go()

    def read(self, text: Text) -> NextToken:
        """As there; at first in both ways, until it is known that they say the same."""
        recorder = self.recorder
        if not recorder.is_refused:
            recorder.fixed.advance(text.tokens[:, -1:])
            if recorder.trials >= TRIED:
                return recorder.step(self.policy, self.rows)
        said = super().read(text)
        if not recorder.is_refused:
            recorder.try_on(self.policy, self.rows, said)
        self._let_go()
        return said

    def _let_go(self) -> None:
        if self.recorder.trials >= TRIED and not self.recorder.is_refused:
            self.cache = None  # nobody reads it any more

    def staying(self, alive: Bool[Tensor, " rows"], remaining: int) -> Int[Tensor, " staying"] | None:
        """Those that have not ended and some that have, half as many or a quarter."""
        if self.recorder.is_refused:
            return super().staying(alive, remaining)
        count = len(alive)
        while count > 1 and (count + 1) // 2 >= remaining:
            count = (count + 1) // 2
        if count == len(alive) or self.recorder.trials < TRIED:
            return None
        return (~alive).long().argsort(stable=True)[:count]

    def select(self, index: Int[Tensor, " staying"]) -> None:
        """As there."""
        if self.recorder.is_refused:
            super().select(index)
        else:
            self.recorder.fixed.select(index)
            self.rows = len(index)


class Recorder:
    """Records steps, and keeps what it has recorded for the next batch.

    Whether a model can be recorded is tried out: the first two steps are made in both ways and compared.

    Args:
        records: False makes the same steps without recording them, as where there is no GPU.

    Attributes:
        fixed: The cache that steps are recorded on.
        trials: Steps that were compared.
        is_refused: Whether steps cannot be recorded.
    """

    def __init__(self, records: bool = True) -> None:
        self.records = records
        self.trials = 0
        self.is_refused = False
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        # What was recorded lies on a GPU, and belongs to a process.
        return {"records": self.records}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def forget(self) -> None:
        """Frees what it holds."""
        self.fixed: Any = None
        self._graphs: dict[tuple[int, int], tuple[Any, NextToken]] = {}
        self._recorded_on: tuple[Any, ...] = ()

    def steps(self, policy: Policy, cache: Any, text: Text, new: int) -> Steps:
        """What reads a batch.

        Args:
            policy: In evaluation mode.
            cache: After the prompt was read.
            text: The prompt.
            new: Tokens of a response at most.

        Returns:
            Recorded steps where they pay and can be had, else others.
        """
        if self.is_refused or new < FEWEST or not self._suits(policy, cache):
            return Steps(policy, cache)
        columns = level(text.mask.shape[1] + new)
        recorded_on = _places(policy)
        if self.fixed is None or recorded_on != self._recorded_on or not self.fixed.fits(cache, text.mask, columns):
            from lightning_rlhf.models.fixed_cache import FixedCache  # imports transformers, which is there by now

            self.forget()
            model = policy.decoder.model
            added = model.dtype if model.config._attn_implementation == "eager" else None
            with torch.inference_mode(False):  # or what validation makes could not be written to in training
                self.fixed = FixedCache(cache, text.mask, columns, added)
            self._recorded_on = recorded_on
        return RecordedSteps(policy, cache, text, self)

    def rest(self) -> None:
        """Frees between batches what takes much memory."""
        if self.fixed is not None and self.fixed.nbytes > KEPT_BYTES:
            self.forget()

    def step(self, policy: Policy, rows: int) -> NextToken:
        """What the policy says, once the cache has advanced.

        Args:
            policy: In evaluation mode.
            rows: The first so many.

        Returns:
            Tensors that the next step overwrites.
        """
        columns = min(level(self.fixed.filled), self.fixed.columns)
        if not self.records:
            return self._read(policy, rows, columns)
        if (rows, columns) not in self._graphs:
            self._graphs[rows, columns] = self._recorded(policy, rows, columns)
        graph, said = self._graphs[rows, columns]
        graph.replay()
        return said

    def try_on(self, policy: Policy, rows: int, expected: NextToken) -> None:
        """Compares a step with what it should say, and refuses to record if it does not.

        Args:
            policy: In evaluation mode.
            rows: The first so many.
            expected: By a cache that grows.
        """
        self.trials += 1
        try:
            reason = "" if same_logits(self.step(policy, rows).logits, expected.logits) else "logits differ"
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"  # whatever a forward that does not fit stumbles over
        if reason:
            self.is_refused = True
            self.forget()
            rank_zero_warn(
                f"{type(policy.decoder.model).__name__} cannot be decoded by recorded steps ({reason}): every step is "
                "launched anew, which is slower on a GPU."
            )

    def _suits(self, policy: Policy, cache: Any) -> bool:
        decoder = policy.decoder
        if self.records and not next(decoder.parameters()).is_cuda:
            return False
        from torch.distributed.fsdp import FSDPModule

        from lightning_rlhf.models.fixed_cache import FixedCache

        is_whole = not any(isinstance(module, FSDPModule) for module in policy.modules())
        return is_whole and not decoder.has_encoder and decoder.caches and FixedCache.can_hold(cache)

    def _read(self, policy: Policy, rows: int, columns: int) -> NextToken:
        fixed = self.fixed
        for layer in fixed.layers:
            layer.use(rows, columns)
        return policy.next_token(
            fixed.tokens[:rows], fixed.seen[:rows, :, :, :columns], fixed.cache, fixed.positions[:rows]
        )

    def _recorded(self, policy: Policy, rows: int, columns: int) -> tuple[Any, NextToken]:
        # Weights that autocast has kept in half precision are those of one batch: a graph makes its own.
        is_cast = torch.is_autocast_enabled("cuda")
        cast = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=is_cast, cache_enabled=False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with cast:
            with torch.cuda.stream(stream):
                self._read(policy, rows, columns)
            torch.cuda.current_stream().wait_stream(stream)
            graph, pool = torch.cuda.CUDAGraph(), next((graph.pool() for graph, _ in self._graphs.values()), None)
            # Other threads, which pin batches or ask for rewards, may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                said = self._read(policy, rows, columns)
        return graph, said


def level(columns: int) -> int:
    """So many columns, or up to half as many again: of which a text needs few different numbers as it grows.

    Args:
        columns: At least 1.

    Returns:
        64, 128, 192, 256, 384, 512, 768, ...
    """
    power = 64
    while power < columns:
        power *= 2
    return power * 3 // 4 if power > 128 and columns <= power * 3 // 4 else power


def _places(policy: Policy) -> tuple[Any, ...]:
    """Where the weights lie, and in what they are multiplied: a recorded step reads them there."""
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return (id(policy), cast, *(tensor.data_ptr() for tensor in (*policy.parameters(), *policy.buffers())))
