"""Conversations: which tokens are learnt, by hand and as transformers says."""

import re

import pytest

from lightning_rlhf import ConversationDataModule
from lightning_rlhf.data.chats import chat_ids
from tests.networks import EOS, PAD, word_tokenizer

CHAT = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b c"},
    {"role": "assistant", "content": "d e"},
    {"role": "user", "content": "f"},
    {"role": "assistant", "content": "g"},
]
# A word for each role, the content, and EOS and "t" after what the assistant says; "s" begins.
PLAIN = (
    "s {% for m in messages %}{{ {'system': 'p', 'user': 'q', 'assistant': 'r'}[m.role] }} {{ m.content }} "
    "{% if m.role == 'assistant' %}<eos> t {% endif %}{% endfor %}{% if add_generation_prompt %}r{% endif %}"
)
MARKED = PLAIN.replace("{{ m.content }} {% if m.role == 'assistant' %}<eos> t {% endif %}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>{% endgeneration %} t "
    "{% else %}{{ m.content }} {% endif %}")  # fmt: skip
WITHOUT_EOS = MARKED.replace(" <eos>{% endgeneration %}", "{% endgeneration %} <eos>")
IDS = [18, 15, 0, 16, 1, 2, 17, 3, 4, EOS, 19, 16, 5, 17, 6, EOS]
LEARNT = [7, 8, 9, 14, 15]


def tokenizer_of(template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learnt_of(messages, template):
    ids, learnt = chat_ids(messages, tokenizer_of(template))
    return ids, [place for place, is_learnt in enumerate(learnt) if is_learnt]


@pytest.mark.invariant(3)
@pytest.mark.parametrize("template", [PLAIN, MARKED, WITHOUT_EOS], ids=["by prefixes", "by marks", "by marks, no EOS"])
def test_every_turn_of_the_assistant_is_learnt_with_its_eos_and_nothing_else(template):
    assert learnt_of(CHAT, template) == (IDS, LEARNT)


def test_the_marks_are_those_that_transformers_reads():
    tokenizer = tokenizer_of(MARKED)
    found = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert [place for place, mark in enumerate(found["assistant_masks"]) if mark] == LEARNT
    assert found["input_ids"][: len(IDS)] == IDS


def test_a_conversation_that_ends_without_eos_gets_one():
    template = PLAIN.replace("<eos> t ", "t ")
    ids, learnt = learnt_of(CHAT[:3], template)
    assert ids == [18, 15, 0, 16, 1, 2, 17, 3, 4, 19, EOS]
    assert learnt == [7, 8, 9, 10]


def test_a_batch_has_the_first_answer_and_all_that_follows_as_its_response():
    data = ConversationDataModule([{"messages": CHAT}, {"prompt": "a", "response": "b"}], shuffle=False)
    data.tokenizer = tokenizer_of(PLAIN)
    (batch,) = data.train_dataloader()
    assert batch.prompt_tokens[0].tolist() == IDS[:7]
    assert batch.response_tokens[0].tolist() == IDS[7:]
    assert batch.learnt[0].nonzero().flatten().tolist() == [0, 1, 2, 7, 8]
    assert batch.response_tokens[1].tolist() == [1, EOS, *[PAD] * 7]
    assert batch.learnt[1].nonzero().flatten().tolist() == [0, 1]


def test_a_conversation_that_is_cut_is_learnt_as_far_as_it_goes():
    data = ConversationDataModule([{"messages": CHAT}], truncate={"response": "right"}, max_response_length=8)
    data.tokenizer = tokenizer_of(PLAIN)
    (batch,) = data.train_dataloader()
    assert batch.response_tokens.tolist() == [IDS[7:15]]
    assert batch.learnt[0].nonzero().flatten().tolist() == [0, 1, 2, 7]


def test_an_encoder_reads_all_before_the_only_answer():
    data = ConversationDataModule([{"messages": CHAT[:3]}])
    data.tokenizer, data.has_encoder = tokenizer_of(PLAIN), True
    (batch,) = data.train_dataloader()
    assert batch.prompt_tokens.tolist() == [IDS[:7]]
    assert batch.response_tokens.tolist() == [[3, 4, EOS]]
    data = ConversationDataModule([{"messages": CHAT}])
    data.tokenizer, data.has_encoder = tokenizer_of(PLAIN), True
    with pytest.raises(ValueError, match=r"`rows\[0\]`: `messages` must end with the assistant's only message"):
        data.train_dataloader()


FORGETFUL = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else 'h' }}")
HALF_MARKED = MARKED.replace("{% generation %}{{ m.content }} <eos>{% endgeneration %}",
    "{% if loop.last %}{% generation %}{{ m.content }} <eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
)  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "template", "complaint"),
    [
        (CHAT[:2], PLAIN, "`messages` has no message of the assistant"),
        (CHAT[2:], PLAIN, "`messages` begins with the assistant"),
        (CHAT, FORGETFUL, "`messages[2]`: the chat template writes what comes before it in another way when more"),
        (
            [CHAT[1], {"role": "assistant", "content": ""}],
            PLAIN.replace("<eos> t ", ""),
            "`messages`: nothing that the",
        ),
        (CHAT, HALF_MARKED, "`messages`: the chat template marks 1 turns of the assistant, and there are 2"),
        (CHAT, "{{ raise_exception('no systems') }}", "the chat template refuses the messages (TemplateError: no syst"),
        (CHAT, None, "the tokenizer has no chat template: set `tokenizer.chat_template`"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(messages, template, complaint):
    data = ConversationDataModule([{"messages": messages}])
    data.tokenizer = tokenizer_of(template)
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        data.train_dataloader()
    assert str(error.value).startswith("`rows[0]`: ")
