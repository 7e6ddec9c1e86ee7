"""What a reward model reads: prompts and responses as one text, and as tokens of its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_rlhf.models.classifier import Classifier, Row
from lightning_rlhf.models.texts import prompt_ids, response_ids

READS = ("both", "pair", "response", "apart")
"""The prompt and then the response, both as two segments, the response alone, or one after the other, each tokenised by
itself, as our DataModules do."""


class TextReader:
    """Makes tokens of prompts and responses.

    Args:
        tokenizer: Of the reward model.
        reads: One of :data:`READS`.
        append_eos: Whether every text ends with EOS.
        name: Of the reward model, for errors.
    """

    def __init__(self, tokenizer: Any, reads: str, append_eos: bool, name: str) -> None:
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError(
                f"`append_eos=True` of the reward model {name!r} needs a tokenizer with an EOS token: set "
                "`tokenizer.eos_token`."
            )
        self.tokenizer = tokenizer
        self.reads = reads
        self.append_eos = append_eos
        self.name = name

    def rows(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        tokens: Sequence[Tensor] | None = None,
        policy: Any = None,
    ) -> list[Row]:
        """Tokens of every text, as long as they are.

        Args:
            prompts: Strings or chat messages.
            responses: What follows them.
            tokens: Of the responses; with them the space between prompt and response is kept that some tokenizers take
                off what is decoded alone.
            policy: The tokenizer that decoded them.

        Returns:
            A row each.

        Raises:
            ValueError: If prompts are chat messages and cannot be read, or a text has no token.
        """
        if self.reads == "both" and tokens is not None and policy is not None:
            responses = continuations(prompts, responses, tokens, policy)
        if self.reads == "response":
            rows = self._tokenized(list(responses))
        elif self.reads == "apart":
            both = zip(prompts, responses, strict=True)
            rows = [
                {"input_ids": prompt_ids(prompt, self.tokenizer) + response_ids(response, self.tokenizer)}
                for prompt, response in both
            ]
        elif not all(isinstance(prompt, str) for prompt in prompts):
            rows = [self._chat(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        elif self.reads == "pair":
            rows = self._tokenized(list(prompts), list(responses))
        else:
            rows = self._tokenized([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
        for row, response in zip(rows, responses, strict=True):
            if self.append_eos and row["input_ids"][-1:] != [self.tokenizer.eos_token_id]:
                for name, values in row.items():
                    values.append(self.tokenizer.eos_token_id if name == "input_ids" else (values or [0])[-1])
            if not row["input_ids"]:
                raise ValueError(
                    f"the reward model {self.name!r} finds no token in what it is to read of the response "
                    f"{response!r}: use `append_eos=True`, or let it read the prompt too."
                )
        return rows

    def end_of(self, row: Row, limit: int) -> Row:
        """The last tokens of a row, after its BOS or CLS.

        Args:
            row: Of any length.
            limit: How many tokens may stay.

        Returns:
            The row, if it is no longer than that, or its end.
        """
        tokens = row["input_ids"]
        if len(tokens) <= limit:
            return row
        first = [token for token in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) if token is not None]
        kept = 1 if tokens[0] in first and limit > 1 else 0
        return {name: values[:kept] + values[len(values) - limit + kept :] for name, values in row.items()}

    def logits(self, classifier: Classifier, rows: Sequence[Row]) -> Sequence[Tensor]:
        """The logits that rows are scored by, in one forward pass.

        Args:
            classifier: That reads them.
            rows: That fit it.

        Returns:
            (scores, labels) of each: one score at its end.
        """
        return list(classifier.logits(rows)[:, None])

    def answers(
        self, scores: Sequence[list[float]], responses: Sequence[str], tokens: Sequence[Tensor] | None, policy: Any
    ) -> list[Any]:
        """What the reward says.

        Args:
            scores: Of each row, as many as it has logits.
            responses: What was written.
            tokens: Of the responses.
            policy: The tokenizer that decoded them.

        Returns:
            A number for each response.
        """
        return [score for (score,) in scores]

    def _tokenized(self, *segments: list[str]) -> list[Row]:
        encoded = self.tokenizer(*segments)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        return [{name: list(encoded[name][i]) for name in names} for i in range(len(segments[0]))]

    def _chat(self, prompt: Any, response: str) -> Row:
        if self.reads == "pair" or isinstance(prompt, str):
            raise ValueError(
                f"`prompt={prompt!r}` does not fit the reward model {self.name!r}: prompts of a batch are all strings "
                "or all chat messages, and with `reads='pair'` strings."
            )
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"`prompt` is a list of chat messages, and the reward model {self.name!r} has no chat template: set "
                "`chat_template` of its tokenizer, or let it read the response alone by `reads='response'`."
            )
        messages = [*prompt, {"role": "assistant", "content": response}]
        return {"input_ids": list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))}


def continuations(prompts: Sequence[Any], responses: Sequence[str], tokens: Sequence[Tensor], policy: Any) -> list[str]:
    """Responses with the space before them that a tokenizer takes off what is decoded alone, where there is one.

    Args:
        prompts: Strings or chat messages, which need no space.
        responses: Decoded alone.
        tokens: Of the responses.
        policy: The tokenizer that decoded them.

    Returns:
        What follows the prompts.
    """
    read = {
        prompt: policy(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts if isinstance(prompt, str)
    }
    alone = {prompt: policy.decode(ids, skip_special_tokens=True) for prompt, ids in read.items()}

    def continuation(prompt: Any, response: str, ids: Tensor) -> str:
        if not isinstance(prompt, str) or not response:
            return response
        together = policy.decode(read[prompt] + ids.tolist(), skip_special_tokens=True)
        before, _, _ = together.removeprefix(alone[prompt]).partition(response)
        return before + response if before.isspace() else response

    return [continuation(*row) for row in zip(prompts, responses, tokens, strict=True)]
