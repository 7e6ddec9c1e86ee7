import re

import pytest

from lightning_rlhf import PreferenceDataModule
from tests.networks import EOS, PAD, word_tokenizer

ROWS = [
    {"prompt": "a b", "chosen": "c", "rejected": "d e", "margin": 0.5, "source": "x"},
    {"prompt": "f", "responses": ["g", "h h", "i"], "ranks": [3, 1, 2]},
    {"prompt": "j", "chosen": "k", "rejected": "l", "tie": True},
]


def batch(rows, max_tokens=None, **arguments):
    data = PreferenceDataModule(rows, shuffle=False, **arguments)
    data.tokenizer, data.max_tokens = word_tokenizer(), max_tokens
    (whole,) = data.train_dataloader()
    return whole


def test_responses_lie_side_by_side_the_best_first():
    found = batch(ROWS)
    assert found.prompt_tokens.tolist() == [[0, 1], [PAD, 5], [PAD, 9]]
    assert found.prompt_mask.tolist() == [[True, True], [False, True], [False, True]]
    assert found.response_tokens.tolist() == [
        [[2, EOS, PAD], [3, 4, EOS], [PAD, PAD, PAD]],
        [[7, 7, EOS], [8, EOS, PAD], [6, EOS, PAD]],
        [[10, EOS, PAD], [11, EOS, PAD], [PAD, PAD, PAD]],
    ]
    assert found.response_mask.sum(2).tolist() == [[2, 3, 0], [3, 2, 2], [2, 2, 0]]
    assert found.is_there.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert found.ranks.tolist() == [[0, 1, 3], [0, 1, 2], [0, 0, 3]]
    assert found.margins.tolist() == [0.5, 0.0, 0.0]
    assert found.metadata == {"source": ["x", None, None]}


def test_rows_of_a_batch_are_its_responses_with_their_prompts():
    rows = batch(ROWS).rows()
    assert rows.prompt_tokens.tolist() == [[0, 1]] * 2 + [[PAD, 5]] * 3 + [[PAD, 9]] * 2
    assert [tokens[mask].tolist() for tokens, mask in zip(rows.response_tokens, rows.response_mask, strict=True)] == [
        [2, EOS],
        [3, 4, EOS],
        [7, 7, EOS],
        [8, EOS],
        [6, EOS],
        [10, EOS],
        [11, EOS],
    ]


def test_the_prompt_of_a_comparison_is_tokenised_once():
    class Counting:
        def __init__(self):
            self.inner, self.texts = word_tokenizer(), []

        def __call__(self, text, **options):
            self.texts.append(text)
            return self.inner(text, **options)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    data = PreferenceDataModule(ROWS)
    data.tokenizer = Counting()
    data.train_dataloader()
    assert sorted(data.tokenizer.texts) == sorted(["a b", "c", "d e", "f", "g", "h h", "i", "j", "k", "l"])


def test_a_row_that_is_too_long_is_an_error_that_names_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"`preferences\[0\]` has 5 tokens, and the model has room for 4: .*`too_long='drop'`"
    ):
        batch(ROWS, max_tokens=4)
    with pytest.raises(
        ValueError, match=r"`preferences\[0\]` has 2 tokens of prompt, and `max_prompt_length=1` allows"
    ):
        batch(ROWS, max_prompt_length=1)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c c c"}')
    with pytest.raises(ValueError, match=re.escape(f"`preferences={str(path)!r}`: line 1 has 4 tokens of response")):
        batch(path, max_response_length=3)


def test_where_an_encoder_reads_the_prompt_either_part_has_room_of_its_own():
    def read(prompt, response):
        data = PreferenceDataModule(ROWS[:1])
        data.tokenizer, data.has_encoder = word_tokenizer(), True
        data.max_tokens, data.max_response_tokens = prompt, response
        (whole,) = data.train_dataloader()
        return whole

    assert read(2, 3).response_mask.sum((1, 2)).tolist() == [5]
    with pytest.raises(ValueError, match=r"`preferences\[0\]` has 2 tokens, and the model has room for 1"):
        read(1, 3)
    with pytest.raises(ValueError, match=r"`preferences\[0\]` has 3 tokens of response, and the model has room for 2"):
        read(2, 2)


def test_longer_rows_are_left_out_where_that_is_asked_for_and_counted():
    data = PreferenceDataModule(
        [*ROWS, {"prompt": "a a a a", "chosen": "b", "rejected": "c"}],
        max_length=4,
        max_prompt_length=3,
        too_long="drop",
    )
    data.tokenizer = word_tokenizer()
    (found,) = data.train_dataloader()
    assert len(found) == 2
    assert data.dropped == {"preferences": {"prompt": 1, "row": 1}}


def test_where_nothing_is_left_that_is_an_error():
    with pytest.raises(
        ValueError, match="`preferences`: all 3 rows are too long: raise the limits \\(`max_length=1`\\)"
    ):
        batch(ROWS, max_length=1, too_long="drop")
    with pytest.raises(ValueError, match="raise the limits .none but what the model has room for., or let rows be cut"):
        batch(ROWS, max_tokens=1, too_long="drop")


def test_what_is_measured_on_lies_the_longest_first_and_what_is_predicted_as_given():
    rows = [{"prompt": "a", "chosen": " ".join("b" * n), "rejected": "c"} for n in (1, 3, 2)]
    rows.insert(1, {"prompt": "a a a a", "chosen": "b", "rejected": "c"})
    data = PreferenceDataModule(validation=rows, predict=rows, batch_size=4)
    data.tokenizer = word_tokenizer()
    (measured,) = data.val_dataloader()
    (predicted,) = data.predict_dataloader()
    assert measured.response_mask.sum((1, 2)).tolist() == [4, 6, 5, 4]
    assert predicted.response_mask.sum((1, 2)).tolist() == [4, 4, 6, 5]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"columns": {"better": "x"}}, "`columns` names 'better', which must be one of 'prompt', 'chosen'"),
        ({"too_long": "cut"}, "`too_long='cut'` must be 'error' or 'drop'"),
        ({"max_length": 0}, "`max_length=0` must be at least 1, or None"),
        ({"max_response_length": -1}, "`max_response_length=-1` must be at least 1, or None"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        PreferenceDataModule(ROWS, **arguments)


def test_a_prompt_without_a_token_is_named():
    with pytest.raises(ValueError, match=r"`preferences\[0\]`: `prompt=''` has no token"):
        batch([{"prompt": "", "chosen": "a", "rejected": "b"}])
