"""Rows in tokens that a folder keeps from run to run."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lightning_rlhf import (
    ConversationDataModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardedDataModule,
    StepDataModule,
    UnpairedPreferenceDataModule,
)
from lightning_rlhf.data.token_cache import TokenCache
from tests.networks import word_tokenizer

CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}{% generation %}{{ m.content }}"
    "{% endgeneration %} {% endif %}{% endfor %}"
)
ROWS = {
    PromptDataModule: [{"prompt": text, "source": n} for n, text in enumerate(("a b", "c", "d e f"))],
    ConversationDataModule: [{"prompt": "a", "response": "b c"}, {"messages": CHAT}, "d e"],
    PreferenceDataModule: [
        {"prompt": "a b", "chosen": "c", "rejected": "d e"},
        {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 0, 1]},
    ],
    UnpairedPreferenceDataModule: [{"prompt": "a", "chosen": "c", "rejected": "d e"}],
    RewardedDataModule: [{"prompt": "a", "response": "b c", "score": 0.5}, {"prompt": "b", "response": "", "score": 1}],
    StepDataModule: [{"prompt": "a", "steps": ["b c", "d"], "labels": [1, 0]}],
}
ALL = pytest.mark.parametrize("cls", ROWS)


def tokenizer_of(template=TEMPLATE):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def made(cls, folder, rows=None, tokenizer=None, **options):
    data = cls(rows or ROWS[cls], cache_dir=folder, shuffle=False, **options)
    data.tokenizer = tokenizer or tokenizer_of()
    return data, data._items(data.argument, data.rows)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "in" / "tokens"


@pytest.fixture
def counted(monkeypatch):
    """How often a row was made tokens of, by DataModule."""
    counts = []

    def count(cls):
        plain = cls.tokenized

        def tokenized(self, row, what):
            counts.append(what)
            return plain(self, row, what)

        monkeypatch.setattr(cls, "tokenized", tokenized)
        return counts

    return count


@ALL
def test_a_later_run_takes_the_tokens_that_an_earlier_one_made(cls, folder, counted):
    rows = ROWS[cls] * 10
    plain, expected = made(cls, None, rows)
    count = counted(cls)
    for calls in (len(plain.rows), 5):  # of which five are looked at again
        count.clear()
        _, items = made(cls, folder, rows)
        assert items == expected
        assert len(count) == calls
    (file,) = folder.iterdir()
    assert file.suffix == ".safetensors"


def test_validation_rows_have_a_file_of_their_own_and_batches_are_the_same(folder):
    for _ in range(2):
        data, _ = made(PromptDataModule, folder, validation=["f"])
        (batch,) = data.val_dataloader()
        assert batch.prompt_tokens.tolist() == [word_tokenizer()("f")["input_ids"]]
        assert torch.equal(next(iter(data.train_dataloader())).prompt_mask.sum(1), torch.tensor([2, 1, 3]))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (PromptDataModule, {"rows": ["a b", "c", "d e g"]}),
        (PromptDataModule, {"rows": ["a b", "c"]}),
        (
            ConversationDataModule,
            {"tokenizer": tokenizer_of(TEMPLATE.replace("{{ m.content }} {% else", "{{ m.content }} f {% else"))},
        ),
        (ConversationDataModule, {"rows": [{"prompt": "a", "response": "b c"}, {"messages": CHAT[:2]}, "d e"]}),
    ],
)
def test_other_rows_and_tokenizers_get_their_own_tokens(cls, change, folder, counted):
    made(cls, folder)
    count = counted(cls)
    data, items = made(cls, folder, **change)
    assert len(count) == len(data.rows)
    assert items == made(cls, None, **change)[1]


def test_a_new_token_is_another_tokenizer(folder, counted):
    made(PromptDataModule, folder)
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["a b"])
    _, items = made(PromptDataModule, folder, tokenizer=tokenizer)
    assert items[0].prompt == [len(tokenizer) - 1]


def test_steps_depend_on_what_stands_between_them(folder):
    data, (first,) = made(StepDataModule, folder, rows=[{"prompt": "a", "response": "b c d", "labels": [1]}])
    data.separator = " c "
    with pytest.raises(ValueError, match="`labels` are 1, and the response has 2 steps"):
        data._items(data.argument, data.rows)
    assert sum(first.learnt) == 1


def test_an_encoder_reads_other_tokens(folder):
    data, (plain, *_) = made(ConversationDataModule, folder, rows=[{"prompt": "a", "response": "b"}])
    tokenizer = data.tokenizer
    other = ConversationDataModule([{"prompt": "a", "response": "b"}], cache_dir=folder)
    other.tokenizer, other.has_encoder = tokenizer, True
    other._items(other.argument, other.rows)
    assert plain.prompt
    assert len(list(folder.iterdir())) == 2


def test_limits_are_looked_at_anew_since_rows_are_kept_whole(folder):
    made(PromptDataModule, folder)
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    data, items = made(PromptDataModule, folder, max_prompt_length=2, too_long="drop")
    assert [item.row["prompt"] for item in items] == ["a b", "c"]
    assert data.dropped["prompts"] == {"prompt": 1}
    _, items = made(PromptDataModule, folder, max_prompt_length=2, truncate={"prompt": "left"})
    assert [len(item.prompt) for item in items] == [2, 1, 2]
    with pytest.raises(ValueError, match=r"^`prompts\[2\]` has 3 tokens of prompt"):
        made(PromptDataModule, folder, max_prompt_length=2)
    assert list(folder.iterdir()) == [file]
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["cut", "other", "short"])
def test_a_file_that_cannot_be_read_is_made_anew(damage, folder, counted):
    _, expected = made(PromptDataModule, folder)
    (file,) = folder.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "other":
        save_file({"x": np.zeros(1)}, file)
    else:
        arrays = load_file(file)
        save_file(arrays | {"prompts": arrays["prompts"][:-1]}, file)
    count = counted(PromptDataModule)
    with pytest.warns(UserWarning, match=f"{file.name} in `cache_dir` cannot be read .*, and is made anew"):
        _, items = made(PromptDataModule, folder)
    assert items == expected
    assert len(count) == 3
    written = file.stat().st_mtime_ns
    assert made(PromptDataModule, folder)[1] == expected
    assert file.stat().st_mtime_ns == written


def test_what_fails_leaves_no_file(folder, monkeypatch):
    with pytest.raises(ValueError, match="has no token"):
        made(PromptDataModule, folder, rows=["a", ""])
    assert not folder.exists()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match=r"`cache_dir=.*tokens'` cannot be written to .*No space left.*name a folder"):
        _, items = made(PromptDataModule, folder)
    assert len(items) == 3, "the tokens are there all the same"
    assert not list(folder.iterdir())
    (folder.parent / "file").write_text("")
    with pytest.warns(UserWarning, match=r"`cache_dir=.*file/x'` cannot be written to"):
        made(PromptDataModule, folder.parent / "file" / "x")


def test_no_rows_and_rows_without_responses_come_back(folder):
    cache = TokenCache(folder)
    cache.write(folder / "x.safetensors", [])
    assert cache.read(folder / "x.safetensors", [], []) == []
    assert cache.read(folder / "y.safetensors", [], []) is None
    shutil.rmtree(folder)


def test_what_cannot_be_kept_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`cache_dir='.*file'` is a file, and must be a folder"):
        PromptDataModule(["a"], cache_dir=str(tmp_path / "file"))

    class Words:
        pass

    with pytest.raises(ValueError, match="`cache_dir` needs a tokenizer with `save_pretrained`, which Words has not"):
        made(PromptDataModule, tmp_path / "tokens", tokenizer=Words())


class Told(PromptDataModule):
    """Puts a text before every prompt, of which the cache is not told."""

    before = "a "

    def tokenized(self, row, what):
        return super().tokenized({**row, "prompt": self.before + row["prompt"]}, what)


def test_a_tokenized_of_ones_own_that_has_changed_is_noticed(folder, monkeypatch):
    rows = [f"{letter} b" for letter in "cdefghij"]
    _, first = made(Told, folder, rows)
    assert [item.prompt for item in made(Told, folder, rows)[1]] == [item.prompt for item in first]
    monkeypatch.setattr(Told, "before", "b ")
    with pytest.warns(UserWarning, match="`cache_dir` holds other tokens than its rows have now, and is made anew"):
        _, second = made(Told, folder, rows)
    assert [item.prompt[1:] for item in second] == [item.prompt[1:] for item in first]
    assert [item.prompt[0] for item in first + second] == [0] * 8 + [1] * 8
    assert [item.prompt for item in made(Told, folder, rows)[1]] == [item.prompt for item in second]


def test_how_special_tokens_are_treated_is_part_of_a_tokenizer(folder):
    one, other = tokenizer_of(), tokenizer_of()
    other.split_special_tokens = True
    for tokenizer in (one, other):
        made(PromptDataModule, folder, tokenizer=tokenizer)
    assert len(list(folder.iterdir())) == 2
