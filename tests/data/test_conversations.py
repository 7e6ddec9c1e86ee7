import re

import pytest

from lightning_rlhf import ConversationDataModule
from tests.networks import EOS, PAD, word_tokenizer

CHAT = [{"role": "user", "content": "a b"}]


def batch(rows, tokenizer=None, max_tokens=None):
    data = ConversationDataModule(rows, shuffle=False)
    data.tokenizer, data.max_tokens = tokenizer or word_tokenizer(), max_tokens
    (whole,) = data.train_dataloader()
    return whole


def test_of_a_text_all_but_the_first_token_is_learnt():
    rows = batch(["a b c", {"text": "d"}])
    assert rows.prompt_tokens.tolist() == [[0], [3]]
    assert rows.prompt_mask.all()
    assert rows.response_tokens.tolist() == [[1, 2, EOS], [EOS, PAD, PAD]]
    assert rows.response_mask.tolist() == [[True, True, True], [True, False, False]]


def test_of_a_prompt_and_a_response_the_response_is_learnt_with_its_eos():
    rows = batch([{"prompt": "a b c", "response": "d"}, {"prompt": "e", "response": "f g", "source": "book"}])
    assert rows.prompt_tokens.tolist() == [[0, 1, 2], [PAD, PAD, 4]]
    assert rows.prompt_mask.tolist() == [[True, True, True], [False, False, True]]
    assert rows.response_tokens.tolist() == [[3, EOS, PAD], [5, 6, EOS]]
    assert rows.response_mask.tolist() == [[True, True, False], [True, True, True]]


def test_texts_and_responses_may_stand_in_one_batch():
    rows = batch(["a b", {"prompt": "c d", "response": "e"}])
    assert rows.response_tokens.tolist() == [[1, EOS], [4, EOS]]


def test_a_prompt_may_be_chat_messages():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "s {{ messages[0]['content'] }}{% if add_generation_prompt %} t{% endif %}"
    rows = batch([{"prompt": CHAT, "response": "c"}], tokenizer)
    assert rows.prompt_tokens.tolist() == [[18, 0, 1, 19]]
    assert rows.response_tokens.tolist() == [[2, EOS]]


@pytest.mark.invariant(3)
def test_eos_is_learnt_also_where_it_is_what_pads():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = batch(["a b", "a b c d"], tokenizer)
    assert rows.response_tokens.tolist() == [[1, EOS, EOS, EOS], [1, 2, 3, EOS]]
    assert rows.response_mask.sum(1).tolist() == [2, 4]


def test_an_end_that_the_user_wrote_is_not_doubled():
    rows = batch([{"prompt": "a", "response": "b <eos>"}])
    assert rows.response_tokens.tolist() == [[1, EOS]]


def test_a_text_that_ends_with_eos_ends_once():
    assert batch([{"text": "a b <eos>"}]).response_tokens.tolist() == [[1, EOS]]


@pytest.mark.parametrize(
    ("rows", "keys"),
    [([{"prompt": "a"}], ["prompt"]), (["a", {"response": "a"}], ["response"]), ([{}], [])],
)
def test_a_row_that_lacks_a_key_is_an_error_that_names_it(rows, keys):
    complaint = f"`rows[{len(rows) - 1}]` has the keys {keys}: it needs 'text', 'prompt' and 'response', or 'messages'."
    with pytest.raises(ValueError, match=re.escape(complaint)):
        ConversationDataModule(rows)


def test_a_row_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match=r"`rows\[0\]`: `messages='a'` must be a list of chat messages"):
        batch([{"messages": "a"}])
    with pytest.raises(ValueError, match=r"`rows\[1\]`: `prompt=3` must be text"):
        batch(["a", {"prompt": 3, "response": "b"}])
    with pytest.raises(ValueError, match=r"`rows\[0\]`: .* has no token"):
        batch([""])


def test_a_row_that_is_too_long_is_named_with_its_eos_counted():
    with pytest.raises(ValueError, match=r"`rows\[1\]` has 4 tokens, and the model has room for 3"):
        batch(["a", "a b c"], max_tokens=3)
    assert len(batch(["a", "a b"], max_tokens=3)) == 2


ROWS = [{"prompt": "a", "response": " ".join("bcdefghijk"[: n % 7 + 1])} for n in range(40)]


def binned(rows, **arguments):
    data = ConversationDataModule(rows, **arguments)
    data.tokenizer = word_tokenizer()
    return data


def lengths(batch):
    return (batch.prompt_mask.sum(1) + batch.response_mask.sum(1)).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_has_as_many_rows_as_fit_into_its_tokens(shuffle):
    batches = list(binned(ROWS, batch_tokens=30, shuffle=shuffle).train_dataloader())
    totals = [sum(lengths(batch)) for batch in batches]
    assert max(totals) <= 30
    expected = sorted(1 + n % 7 + 1 + 1 for n in range(40))
    assert sorted(length for batch in batches for length in lengths(batch)) == expected
    assert len(batches) <= -(-sum(expected) // 30) + 1


def test_the_order_of_batches_is_another_every_epoch_and_their_number_the_same():
    data = binned(ROWS, batch_tokens=30, seed=1)
    first = [lengths(batch) for batch in data.train_dataloader()]
    again = [lengths(batch) for batch in data.train_dataloader()]
    data.cursor.epoch = 1
    later = [lengths(batch) for batch in data.train_dataloader()]
    assert first == again
    assert first != later
    assert sorted(first) == sorted(later)


def test_which_rows_go_together_is_drawn_from_the_seed_and_else_follows_their_order():
    rows = [{"prompt": "abcdefghijkl"[n], "response": "a"} for n in range(12)]  # of 3 tokens each

    def together(**arguments):
        batches = binned(rows, batch_tokens=6, **arguments).train_dataloader()
        return sorted(sorted(batch.prompt_tokens.flatten().tolist()) for batch in batches)

    assert together(shuffle=False) == [[n, n + 1] for n in range(0, 12, 2)]
    assert together(seed=1) == together(seed=1)
    assert len({str(together(seed=seed)) for seed in range(3)} | {str(together(shuffle=False))}) == 4


@pytest.mark.invariant(36)
def test_batches_by_tokens_go_on_where_the_cursor_stands():
    data = binned(ROWS, batch_tokens=30)
    everything = [lengths(batch) for batch in data.train_dataloader()]
    data.cursor.position = 3
    assert [lengths(batch) for batch in data.train_dataloader()] == everything[3:]


def test_a_row_that_no_batch_holds_is_named():
    with pytest.raises(ValueError, match=r"`rows\[6\]` has 9 tokens, and `batch_tokens=8` holds no row of that length"):
        binned(ROWS, batch_tokens=8).train_dataloader()
    with pytest.raises(ValueError, match="`batch_tokens=0` must be at least 1, or None"):
        binned(ROWS, batch_tokens=0)
