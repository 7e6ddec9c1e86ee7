import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lightning_rlhf.data.tokens import at, pad_id, padded, prompt_ids, response_ids
from tests.networks import EOS, PAD, word_tokenizer

BOS = 21
CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
TEMPLATE = (
    "{% for m in messages %}{{ 's' if m['role'] == 'user' else 't' }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}t {% endif %}"
)


def tokenizer(wraps="$A", bos=True):
    """One that puts special tokens around every text; its BOS is the last word."""
    made = word_tokenizer()
    if bos:
        made.bos_token = "v"
    special = [("<eos>", EOS), ("v", BOS)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=wraps, special_tokens=special)
    return made


def test_words_become_tokens():
    assert prompt_ids("b a d", word_tokenizer()) == [1, 0, 3]
    assert response_ids("b a d", word_tokenizer()) == [1, 0, 3, EOS]


def test_the_token_that_begins_every_text_begins_a_prompt():
    assert prompt_ids("b a", tokenizer("v $A")) == [BOS, 1, 0]


def test_a_response_begins_without_it_since_it_goes_on():
    assert response_ids("b a", tokenizer("v $A")) == [1, 0, EOS]


def test_a_token_that_ends_every_text_does_not_end_a_prompt():
    assert prompt_ids("b a", tokenizer("v $A <eos>")) == [BOS, 1, 0]


def test_an_end_that_the_user_wrote_stays():
    assert prompt_ids("b a <eos>", tokenizer("$A")) == [1, 0, EOS]


@pytest.mark.parametrize("wraps", ["$A", "v $A", "v $A <eos>", "$A <eos>"])
def test_a_response_ends_with_one_eos(wraps):
    assert response_ids("b a", tokenizer(wraps)) == [1, 0, EOS]
    assert response_ids("b a <eos>", tokenizer(wraps)) == [1, 0, EOS]


def test_an_empty_response_is_an_eos():
    assert response_ids("", word_tokenizer()) == [EOS]


@pytest.mark.parametrize("wraps", ["$A", "v $A", "$A <eos>"])
def test_an_empty_prompt_begins_with_bos(wraps):
    assert prompt_ids("", tokenizer(wraps)) == [BOS]


def test_an_empty_prompt_of_a_tokenizer_without_bos_is_an_error():
    with pytest.raises(ValueError, match="^`prompt=''` has no token, and the tokenizer no BOS token to begin with"):
        prompt_ids("", word_tokenizer())


def test_chat_messages_go_through_the_template_and_end_where_the_assistant_speaks():
    made = tokenizer("v $A <eos>")
    made.chat_template = TEMPLATE
    # The template alone decides which special tokens there are.
    assert prompt_ids(CHAT, made) == [18, 0, 1, 19, 2, 18, 3, 19]


def test_chat_messages_without_a_template_are_an_error_that_says_what_to_set():
    with pytest.raises(ValueError, match="no chat template: set `tokenizer.chat_template`"):
        prompt_ids(CHAT, word_tokenizer())


@pytest.mark.parametrize("prompt", [3, None, ["a"], [], {"role": "user", "content": "a"}, [{"role": "user"}]])
def test_what_is_neither_text_nor_chat_is_an_error_that_quotes_it(prompt):
    with pytest.raises(ValueError, match="must be text, or a list of chat messages") as error:
        prompt_ids(prompt, word_tokenizer())
    assert repr(prompt) in str(error.value)


def test_rows_are_filled_with_pad_or_else_with_eos_or_else_with_anything():
    assert pad_id(word_tokenizer()) == PAD
    assert pad_id(word_tokenizer(pad=False)) == 23
    assert word_tokenizer(pad=False).eos_token_id == 23
    assert pad_id(word_tokenizer(pad=False, eos=False)) == 0


def test_prompts_are_padded_left_and_responses_right():
    tokens, mask = padded([[1], [2, 3, 4]], 9, "left")
    assert tokens.tolist() == [[9, 9, 1], [2, 3, 4]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    tokens, mask = padded([[1], [2, 3, 4]], 9, "right")
    assert tokens.tolist() == [[1, 9, 9], [2, 3, 4]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    assert tokens.dtype == torch.long


@pytest.mark.invariant(3)
def test_masks_come_from_lengths_so_that_a_real_token_may_be_the_one_that_pads():
    tokens, mask = padded([[1, EOS], [EOS], [EOS, EOS, EOS]], EOS, "right")
    assert mask.sum(1).tolist() == [2, 1, 3]
    _, mask = padded([[EOS, 1], [EOS]], EOS, "left")
    assert mask.tolist() == [[True, True], [False, True]]
    assert bool((tokens[:, 2] == EOS).all())


def test_whatever_a_tokenizer_raises_is_said_of_the_row():
    class PanicError(Exception):
        pass

    complaint = r"^`x.jsonl`: line 3: the tokenizer refuses its text \(PanicError: too odd\)"
    with pytest.raises(ValueError, match=complaint), at("`x.jsonl`: line 3"):
        raise PanicError("too odd")
    with pytest.raises(ValueError, match=r"^`x.jsonl`: line 3: no token$"), at("`x.jsonl`: line 3"):
        raise ValueError("no token")
