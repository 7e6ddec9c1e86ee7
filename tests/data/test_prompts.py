import json

import pytest

from lightning_rlhf import PromptDataModule
from tests.networks import EOS, PAD, word_tokenizer

CHAT = [{"role": "user", "content": "a b"}]
ROWS = ["a b c", {"prompt": CHAT, "answer": "x"}, {"prompt": "d", "level": 2}]


def batches(rows, **arguments):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "s {{ messages[0]['content'] }}{% if add_generation_prompt %} t{% endif %}"
    data = PromptDataModule(rows, shuffle=False, **arguments)
    data.tokenizer = tokenizer
    return list(data.train_dataloader())


def test_prompts_stand_side_by_side_padded_left():
    (batch,) = batches(ROWS)
    assert batch.prompt_tokens.tolist() == [[PAD, 0, 1, 2], [18, 0, 1, 19], [PAD, PAD, PAD, 3]]
    assert batch.prompt_mask.sum(1).tolist() == [3, 4, 1]


def test_prompts_are_kept_as_given_and_what_else_a_row_holds_beside_them():
    (batch,) = batches(ROWS)
    assert batch.prompts == ["a b c", CHAT, "d"]
    assert batch.metadata == {"answer": [None, "x", None], "level": [None, None, 2]}


def test_every_batch_has_every_key():
    assert [batch.metadata for batch in batches(ROWS, batch_size=1)] == [
        {"answer": [None], "level": [None]},
        {"answer": ["x"], "level": [None]},
        {"answer": [None], "level": [2]},
    ]


def test_a_batch_is_as_wide_as_its_own_longest_prompt():
    assert [batch.prompt_tokens.shape for batch in batches(ROWS, batch_size=1)] == [(1, 3), (1, 4), (1, 1)]


@pytest.mark.invariant(8)
def test_a_prompt_may_hold_the_token_that_pads():
    (batch,) = batches(["<pad> a", "b", "c <eos>"])
    assert batch.prompt_tokens.tolist() == [[PAD, 0], [PAD, 1], [2, EOS]]
    assert batch.prompt_mask.tolist() == [[True, True], [False, True], [True, True]]


def test_rows_may_come_from_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    (from_file,), (from_list,) = batches(path), batches(ROWS)
    assert from_file.prompts == from_list.prompts
    assert from_file.metadata == from_list.metadata


def test_a_row_without_a_prompt_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"`prompts\[1\]` has no key 'prompt': it has \['question'\]"):
        PromptDataModule(["a", {"question": "b"}])


def test_a_key_that_is_called_as_the_prompt_is_does_not_take_its_place():
    rows = [{"question": "a", "prompt": "b"}]
    with pytest.raises(
        ValueError, match=r"`prompts\[0\]` has 'question', which `columns` says is the prompt, and 'prom"
    ):
        PromptDataModule(rows, columns={"prompt": "question"})


def test_a_prompt_that_is_no_text_is_an_error_that_names_its_row():
    with pytest.raises(ValueError, match=r"`prompts\[1\]`: `prompt=3` must be text"):
        batches(["a", 3])


def test_a_prompt_that_is_too_long_is_named_before_the_first_batch():
    data = PromptDataModule(["a b", "a b c", "a"])
    data.tokenizer, data.max_tokens = word_tokenizer(), 2
    with pytest.raises(ValueError, match=r"`prompts\[1\]` has 3 tokens, and the model has room for 2: shorten it"):
        data.train_dataloader()
    data.max_tokens = 3
    assert len(data.train_dataloader()) == 1
