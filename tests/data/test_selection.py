"""What is kept, cut, left out and held out, by every DataModule."""

import re

import pytest

from lightning_rlhf import (
    ConversationDataModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardedDataModule,
    UnpairedPreferenceDataModule,
)
from lightning_rlhf.data.selection import Rows, Unique, normalized, split
from tests.networks import EOS, word_tokenizer

LETTERS = "abcdefghij"
ROWS = {
    PromptDataModule: [{"prompt": letter, "source": n} for n, letter in enumerate(LETTERS)],
    ConversationDataModule: [{"prompt": letter, "response": "k"} for letter in LETTERS],
    PreferenceDataModule: [{"prompt": letter, "chosen": "k", "rejected": "l"} for letter in LETTERS],
    UnpairedPreferenceDataModule: [{"prompt": letter, "response": "k", "label": True} for letter in LETTERS],
    RewardedDataModule: [{"prompt": letter, "response": "k", "score": 0.5} for letter in LETTERS],
}
ALL = pytest.mark.parametrize("cls", ROWS)


def prompts_of(rows):
    return [row["prompt"] if isinstance(row, dict) else row.prompt for row in rows]


def batch(data, loader="train", tokenizer=None, **room):
    data.tokenizer = tokenizer or word_tokenizer()
    for name, value in room.items():
        setattr(data, name, value)
    (whole,) = getattr(data, f"{loader}_dataloader")()
    return whole


# --- splits -----------------------------------------------------------------------------------------------------------


@ALL
def test_a_share_is_held_out_and_no_prompt_is_on_both_sides(cls):
    rows = ROWS[cls] * 3
    data = cls(rows, validation_share=0.3)
    learnt, held_out = prompts_of(data.rows), prompts_of(data.held_out["validation"])
    assert (len(learnt), len(held_out)) == (21, 9)
    assert not set(learnt) & set(held_out)
    assert len(batch(data, "val")) == 9


def test_a_conversation_is_held_out_with_all_that_begin_alike_up_to_the_first_answer():
    def chat(question, *rest):
        roles = ["user", "assistant"] * 2
        return [{"role": role, "content": text} for role, text in zip(roles, [question, *rest], strict=False)]

    rows = [{"messages": chat(letter, *rest)} for letter in LETTERS for rest in (["k"], ["l"], ["k", "a", "m"])]
    data = ConversationDataModule(rows, validation_share=0.3)
    learnt, held_out = (
        {row["messages"][0]["content"] for row in some} for some in (data.rows, data.held_out["validation"])
    )
    assert (len(learnt), len(held_out)) == (7, 3)
    assert len(ConversationDataModule(rows * 2, deduplicate="exact").rows) == len(rows)


def test_the_split_depends_on_its_seed_and_the_prompts_alone():
    def held_out(rows, **arguments):
        return set(prompts_of(PromptDataModule(rows, validation_share=0.3, **arguments).held_out["validation"]))

    rows = ROWS[PromptDataModule]
    assert held_out(rows) == held_out(rows[::-1]) == held_out(rows, seed=7)
    assert len({frozenset(held_out(rows, split_seed=seed)) for seed in range(5)}) > 2
    # Of more rows those stay held out that were, as far as the share goes.
    assert len(held_out(rows) & held_out([*rows, "k", "l", "m"])) >= 2


def test_rows_that_are_held_out_are_named_by_their_place_in_the_source():
    rows = [{"prompt": letter * 3 if letter == "c" else letter} for letter in LETTERS]
    for seed in range(20):
        data = PromptDataModule([" ".join(row["prompt"]) for row in rows], validation_share=0.2, split_seed=seed)
        data.tokenizer, data.max_tokens = word_tokenizer(), 2
        is_held_out = "c c c" in prompts_of(data.held_out["validation"])
        with pytest.raises(ValueError, match=r"`prompts\[2\]` has 3 tokens"):
            data.val_dataloader() if is_held_out else data.train_dataloader()


@pytest.mark.parametrize(
    ("rows", "arguments", "complaint"),
    [
        (["a", "b"], {"validation_share": 1.5}, "`validation_share=1.5` must be between 0 and 1"),
        (
            ["a", "b"],
            {"validation_share": 0.5, "validation": ["c"]},
            "`validation_share=0.5` and `validation` both say",
        ),
        (None, {"validation_share": 0.5}, "`validation_share=0.5` needs all rows of `prompts` at once"),
        (["a"] * 4, {"validation_share": 0.5}, "holds out 4 of 4 rows of `prompts`, which have 1 different prompts"),
        (["a", "b"], {"validation_share": 0.1}, "holds out 0 of 2 rows of `prompts`"),
    ],
)
def test_a_split_that_cannot_be_is_refused(rows, arguments, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        PromptDataModule(rows, **arguments)


def test_a_split_takes_whole_prompts_until_the_share_is_reached():
    rows = Rows(list("aaabbc"), list("012345"))
    learnt, held_out = split(rows, list(rows), 0.5, 0, "rows")
    assert sorted(learnt + held_out) == sorted(rows)
    assert len(held_out) >= 3
    assert [rows.places.index(place) for place in learnt.places] == sorted(map(int, learnt.places))


# --- duplicates -------------------------------------------------------------------------------------------------------


@ALL
def test_the_first_of_equal_rows_is_kept_and_the_others_are_counted(cls):
    rows = ROWS[cls]
    data = cls([*rows, *rows[:4]], validation=rows * 2, deduplicate="exact", shuffle=False)
    assert prompts_of(data.rows) == list(LETTERS)
    batch(data)
    batch(data, "val")
    assert data.dropped[data.argument] == {"duplicate": 4}
    assert data.dropped["validation"] == {"duplicate": 10}
    assert len(cls([*rows, *rows[:4]]).rows) == 14  # rows are kept as given


def test_only_what_is_read_makes_a_row_another():
    def kept(cls, *rows, how="exact"):
        return len(cls(list(rows), deduplicate=how).rows)

    assert kept(PromptDataModule, {"prompt": "a", "level": 1}, {"prompt": "a", "level": 2}) == 1
    assert kept(ConversationDataModule, {"text": "a"}, {"prompt": "a", "response": "b"}, "a") == 2
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert kept(PreferenceDataModule, pair, {**pair, "chosen": "c", "rejected": "b"}) == 2
    assert kept(PreferenceDataModule, pair, {"prompt": "a", "responses": ["c", "b"], "ranks": [2, 1]}) == 1
    assert kept(PreferenceDataModule, *({**pair, "margin": margin} for margin in (0, 0.0, 2))) == 2
    assert kept(RewardedDataModule, *({"prompt": "a", "response": "b", "score": s} for s in (1, 1.0, 2))) == 2
    assert kept(PromptDataModule, "Stra\u00dfe  a", "strasse a\n", how="normalized") == 1
    assert kept(PromptDataModule, "Stra\u00dfe  a", "strasse a\n") == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A  b\n", "a b"),
        ("\ufb01ne", "FINE"),
        ("e\u0301", "\u00c9"),
        ("\uff11", "1"),
        ("\u1e9e", "ss"),
        ("a\u00a0b", "a b"),
        ("\u3391", "khz"),  # a form of capitals
        ("\u0390", "\u03aa\u0301"),  # taken apart in small letters alone
    ],
)
def test_texts_are_the_same_but_for_case_white_space_and_forms_of_characters(one, other):
    assert normalized(one) == normalized(other)
    chats = [[{"role": "user", "content": text}] for text in (one, other)]
    seen = Unique("normalized")
    assert [seen.is_new(chat) for chat in chats] == [True, False]
    assert normalized("a b") != normalized("ab")


def test_another_way_to_tell_duplicates_is_refused():
    with pytest.raises(ValueError, match="`deduplicate='fuzzy'` must be 'exact' or 'normalized', or None"):
        PromptDataModule(["a"], deduplicate="fuzzy")


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_longer_prompts_are_left_out_and_counted_and_that_is_said_once(caplog):
    data = PromptDataModule(["a", "a b c", "b", "a"], max_prompt_length=2, too_long="drop", deduplicate="exact")
    with caplog.at_level("INFO"):
        assert len(batch(data)) == 2
        batch(data)
        batch(data, tokenizer=word_tokenizer())
    assert data.dropped == {"prompts": {"prompt": 1, "duplicate": 1}}
    said = [record.message for record in caplog.records if "`prompts`" in record.message]
    assert said == ["`prompts`: 2 of 4 rows are left out: 1 that were there already, 1 for the length of the prompt."]


def test_a_prompt_is_cut_on_the_side_that_is_asked_for(caplog):
    def cut(side, **arguments):
        data = PromptDataModule(["a b c d", "e"], truncate={"prompt": side}, shuffle=False, **arguments)
        found = batch(data)
        assert data.truncated == {"prompts": {"prompt": 1}}
        assert found.prompts == ["a b c d", "e"]  # as it was given
        return found.prompt_tokens[0].tolist()

    with caplog.at_level("INFO"):
        assert cut("left", max_prompt_length=2) == [2, 3]
        assert cut("right", max_length=3) == [0, 1, 2]
    assert "`prompts`: cut to fit: 1 prompts." in caplog.text


def test_a_prompt_that_is_cut_keeps_its_special_tokens():
    tokenizer = word_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "a", "z"  # the first, and one that is not there
    data = PromptDataModule(["a b c d", "b c d"], truncate={"prompt": "left"}, max_prompt_length=2, shuffle=False)
    assert batch(data, tokenizer=tokenizer).prompt_tokens.tolist() == [[0, 3], [2, 3]]
    data = ConversationDataModule([{"prompt": "b c d <eos>", "response": "a"}], truncate={"prompt": "right"})
    found = batch(data, has_encoder=True, max_tokens=3)
    assert found.prompt_tokens.tolist() == [[1, 2, EOS]]
    data = PromptDataModule(["b c d <eos>"], truncate={"prompt": "right"}, max_prompt_length=3)
    assert batch(data).prompt_tokens.tolist() == [[1, 2, 3]]  # nothing ends a prompt that goes on
    data = PromptDataModule(["a b"], truncate={"prompt": "right"}, max_prompt_length=1)
    with pytest.raises(ValueError, match=r"`prompts\[0\]` has 2 tokens of prompt"):  # of which nothing would be left
        batch(data, tokenizer=tokenizer)


def test_a_response_that_is_cut_ends_without_eos():
    data = ConversationDataModule(
        [{"prompt": "a", "response": "b c d"}], truncate={"response": "right"}, max_response_length=2
    )
    assert batch(data).response_tokens.tolist() == [[1, 2]]
    assert data.truncated == {"rows": {"response": 1}}


@pytest.mark.parametrize(
    ("truncate", "prompt", "response"),
    [
        ({"prompt": "left"}, [3], [4, 5, EOS]),
        ({"prompt": "left", "response": "right"}, [3], [4, 5, EOS]),
        ({"response": "right"}, None, None),  # the prompt alone is as long as may be
    ],
)
def test_where_both_are_too_long_together_the_prompt_is_cut_first(truncate, prompt, response):
    data = ConversationDataModule([{"prompt": "a b c d", "response": "e f"}], truncate=truncate)
    if prompt is None:
        with pytest.raises(ValueError, match=r"`rows\[0\]` has 7 tokens, and the model has room for 4"):
            batch(data, max_tokens=4)
        return
    found = batch(data, max_tokens=4)
    assert found.prompt_tokens.tolist() == [prompt]
    assert found.response_tokens.tolist() == [response]


def test_the_response_is_cut_where_a_shorter_prompt_is_not_enough():
    data = ConversationDataModule(
        [{"prompt": "a b", "response": "c d e f"}], truncate={"prompt": "left", "response": "right"}, max_length=3
    )
    found = batch(data)
    assert (found.prompt_tokens.tolist(), found.response_tokens.tolist()) == ([[1]], [[2, 3]])
    assert data.truncated == {"rows": {"prompt": 1, "response": 1}}


def test_responses_that_would_be_equal_are_not_cut():
    rows = [{"prompt": "a", "chosen": "b c d", "rejected": "b c e"}, {"prompt": "a", "chosen": "b c", "rejected": "d"}]
    arguments = {"truncate": {"response": "right"}, "max_response_length": 2, "too_long": "drop", "shuffle": False}
    data = PreferenceDataModule(rows, **arguments)
    assert batch(data).response_tokens.tolist() == [[[1, 2], [3, EOS]]]
    assert data.dropped == {"preferences": {"response": 1}}
    assert data.truncated == {"preferences": {"response": 1}}


@ALL
def test_every_module_leaves_out_what_the_model_has_no_room_for(cls):
    long = dict(ROWS[cls][0], prompt="a a a a a a")
    data = cls([*ROWS[cls], long], too_long="drop")
    assert len(batch(data, max_tokens=6 if cls is not PromptDataModule else 5)) == 10
    assert data.dropped[data.argument].total() == 1


def test_what_no_limit_can_be_is_refused():
    with pytest.raises(ValueError, match=r"`truncate={'response': 'left'}` must say 'left' or 'right' of 'prompt'"):
        ConversationDataModule(["a"], truncate={"response": "left"})
    with pytest.raises(ValueError, match=r"`truncate={'text': 'left'}` must say"):
        ConversationDataModule(["a"], truncate={"text": "left"})
    for arguments in ({"max_response_length": 3}, {"truncate": {"response": "right"}}):
        with pytest.raises(ValueError, match="are for rows that have one, and those of PromptDataModule have none"):
            PromptDataModule(["a"], **arguments)


# --- names, and tokens ------------------------------------------------------------------------------------------------


@ALL
def test_what_other_names_rows_have_is_told(cls):
    other = {"prompt": "question", "response": "completion", "score": "reward", "chosen": "better"}
    rows = [{other.get(key, key): value for key, value in row.items()} for row in ROWS[cls]]
    columns = {key: name for key, name in other.items() if key in cls.keys and key not in ("response", "score")}
    assert prompts_of(cls(rows, columns=columns).rows) == list(LETTERS)
    with pytest.raises(ValueError, match="`columns` names 'prompts', which must be one of "):
        cls(rows, columns={"prompts": "question"})


def test_rows_are_made_tokens_of_once_for_a_tokenizer_and_a_model():
    calls = []

    class Counting(PromptDataModule):
        def tokenized(self, row, what):
            calls.append(what)
            return super().tokenized(row, what)

    data = Counting(["a", "b"], validation=["c"])
    data.tokenizer = tokenizer = word_tokenizer()
    for _ in range(3):
        data.train_dataloader()
        data.val_dataloader()
    assert calls == ["`prompts[0]`", "`prompts[1]`", "`validation[0]`"]
    data.max_tokens = 5
    data.train_dataloader()
    data.tokenizer = word_tokenizer()
    data.train_dataloader()
    data.tokenizer = tokenizer
    data.train_dataloader()
    assert len(calls) == 9
    data.rows = data.rows.select([1])
    data.train_dataloader()
    assert calls[9:] == ["`prompts[1]`"]
