"""Steps of decoding, recorded as CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.generation.steps import RecordedSteps, Steps, Text
from lightning_rlhf.models.outputs import same_logits
from lightning_rlhf.models.policy import NextToken, Policy

FEWEST = 16
"""Tokens of a response from which recording a step pays."""
TRIED = 3
"""Steps that are made in both ways before recorded ones are trusted: one over as many columns as there will be, then
two over those that there are, since a number that was burnt in shows at the second."""
KEPT_BYTES = 2**32
"""Bytes of keys and values up to which they stay on a GPU between batches, and what was recorded on them."""


class Recorder:
    """Records steps, and keeps what it has recorded for the next batch.

    Whether a model can be recorded is tried out: the first steps are made in both ways and compared, and again once
    texts are longer than they were.

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
        self._tried_columns = 0
        self.forget()

    @property
    def is_trusted(self) -> bool:
        """Whether enough steps were compared."""
        return self.trials >= TRIED

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
            self.trials = self.trials if columns <= self._tried_columns else 0
            self._tried_columns = max(columns, self._tried_columns)
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

    def step(self, policy: Policy, rows: int, is_widest: bool = False) -> NextToken:
        """What the policy says, once the cache has advanced.

        Args:
            policy: In evaluation mode.
            rows: The first so many.
            is_widest: Whether attention goes over all columns, used or not.

        Returns:
            Tensors that the next step overwrites.
        """
        columns = self.fixed.columns if is_widest else min(level(self.fixed.filled), self.fixed.columns)
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
            found = self.step(policy, rows, is_widest=self.trials == 1).logits
            reason = "" if same_logits(found, expected.logits) else "logits differ"
        except Exception as error:
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
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    said = self._read(policy, rows, columns)
            finally:
                torch.cuda.set_stream(before)  # which torch forgets where recording fails
        return graph, said


def level(columns: int) -> int:
    """So many columns, or some more: numbers of which a text needs few as it grows.

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
