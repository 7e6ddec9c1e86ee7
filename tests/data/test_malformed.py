"""Ten thousand rows and lines as they should not be: each is understood, or named with its field and value."""

import json
import random
import re

import pytest

from lightning_rlhf import (
    ConversationDataModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardedDataModule,
    UnpairedPreferenceDataModule,
)

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
LEAVES = [
    None,
    True,
    0,
    1,
    -1,
    2.5,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "a",
    "1",
    "[1, 2]",
    '["a"',
    "\ud800",
    "\0",
]
CHATS = [[USER, ANSWER], [USER], [ANSWER], [USER, ANSWER, USER, ANSWER], ["a", "b"], [1, 2], [{"text": "a"}, USER]]
KEYS = ["prompt", "response", "completion", "text", "messages", "chosen", "rejected", "margin", "tie", "label", "score"]
KEYS += ["reward", "responses", "ranks", "scores", "info", "summaries", "choice", "role", "content", "post", "title"]
GOOD = {"score": 1, "reward": "0.5", "label": True, "tie": False, "margin": 0, "messages": CHATS[3]}
GOOD |= {"responses": ["b", "c"], "ranks": [1, 2], "scores": [1, 2], "summaries": ["b", "c"], "choice": 1}
GOOD |= {"info": {"post": "a"}}
"""Where text is not what is right."""
FORMS = {
    PromptDataModule: [["prompt", "answer"]],
    ConversationDataModule: [["text"], ["prompt", "response"], ["prompt", "completion"], ["messages"]],
    PreferenceDataModule: [["prompt", "chosen", "rejected", "margin", "tie"], ["chosen", "rejected"]]
    + [["prompt", "responses", "ranks"], ["info", "summaries", "choice"]],
    UnpairedPreferenceDataModule: [["prompt", "completion", "label"], ["prompt", "chosen", "rejected"]]
    + [["prompt", "responses", "scores"], ["prompt", "response", "label"]],
    RewardedDataModule: [["prompt", "response", "score"], ["prompt", "completion", "reward"]],
}


class Chance(random.Random):
    """Draws values, rows and lines that nobody meant to write."""

    def value(self, depth=3):
        kind = self.random()
        if depth == 0 or kind < 0.4:
            return self.choice(LEAVES)
        if kind < 0.6:
            return [self.value(depth - 1) for _ in range(self.randrange(4))]
        if kind < 0.75:
            return self.choice(CHATS)
        return {self.choice(KEYS): self.value(depth - 1) for _ in range(self.randrange(4))}

    def row(self, forms):
        form = self.choice([*forms, KEYS])
        row = {key: self.value() if self.random() < 0.4 else GOOD.get(key, "a") for key in form if self.random() < 0.95}
        return self.value() if self.random() < 0.05 else row

    def line(self, forms):
        line = json.dumps(self.row(forms)).encode()
        kind = self.random()
        if kind < 0.7 or not line:
            return line
        place = self.randrange(len(line))
        if kind < 0.85:
            return line[:place]
        return line[:place] + self.choice([b"\xff", b'"', b"{", b"]", b"\\u", b"\0", b",,"]) + line[place:]


def read(cls, source, tokenizer):
    """Reads rows, and makes tokens of them."""
    data = cls(source)
    data.tokenizer = tokenizer
    for _ in data.train_dataloader():
        pass


@pytest.fixture(scope="module")
def tokenizer():
    """A token per byte, so that any text can be read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<eos>", bos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    return tokenizer


FIELD = re.compile(
    r"`[\w\[\]]+(=|`)|keys \[|no key|`messages|chat template|'ranks' |is no JSON|responses with the ranks"
)
"""How an error says which field is meant."""


@pytest.mark.parametrize("cls", FORMS)
def test_malformed_rows_are_understood_or_named_with_the_field(cls, tokenizer):
    chance, said, understood = Chance(0), [], 0
    for _ in range(1_700):
        row = chance.row(FORMS[cls])
        try:
            read(cls, ["a" if row is None else row], tokenizer)
        except ValueError as error:
            said.append(str(error))
        else:
            understood += 1
    assert all(f"`{cls.argument}[0]`" in error and len(error) < 700 for error in said)
    assert [error for error in said if not FIELD.search(error.partition("]`")[2])] == []
    assert understood > 50  # not all of the rows are so bad
    assert len(said) > 200


@pytest.mark.parametrize("cls", FORMS)
def test_malformed_lines_are_understood_or_named_with_file_and_line(cls, tokenizer, tmp_path):
    chance, said, understood = Chance(1), [], 0
    path = tmp_path / "rows.jsonl"
    good = json.dumps(
        {"text": "a", "prompt": "a", "response": "b", "label": 1, "score": 1, "chosen": "b", "rejected": "c"}
    )
    for _ in range(300):
        line = chance.line(FORMS[cls])
        path.write_bytes(good.encode() + b"\n" + line)
        try:
            read(cls, path, tokenizer)
        except ValueError as error:
            said.append(str(error))
        else:
            understood += 1
    place = f"`{cls.argument}={str(path)!r}`: line 2"
    assert [error for error in said if not error.startswith(place)] == []
    assert [error for error in said if not FIELD.search(error.removeprefix(place))] == []
    assert understood > 20
    assert len(said) > 100
