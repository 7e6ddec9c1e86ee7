"""A score per sentence or step, on the token that completes it."""

import functools
import random

import pytest
import torch

from lightning_rlhf import DenseReward, GRPOModule, PPOModule, PromptDataModule
from lightning_rlhf.rewards.combine import CombinedReward
from lightning_rlhf.rewards.dense import lines, sentences, token_scores
from tests.networks import piece_tokenizer, tiny_gpt2, word_tokenizer
from tests.training import bare_trainer, fit, module_of

PIECES = ["a", "b", ".", " ", "\n", ". a", "b.", ".\n", " b", "c", "d", "e", "f"]
EOS = len(PIECES)


@functools.cache
def pieces():
    """Tokens of one to three letters, joined as they are."""
    return piece_tokenizer(PIECES)


@functools.cache
def bytes_tokenizer():
    """A token a byte, as GPT-2's vocabulary begins, so that an emoji is four tokens; then `<eos>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<eos>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )


def texts_of(spans, text):
    return [text[a:b] for a, b in spans]


def on_tokens(ids, spans, scores, tokenizer=None):
    tokenizer = tokenizer or pieces()
    response = tokenizer.decode(ids, skip_special_tokens=True)
    return token_scores(response, torch.tensor(ids), tokenizer, spans, scores)


# --- parts of a text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("  One.  Two ", ["One.", "Two"]),
        ("Pi is 3.14. Or so...", ["Pi is 3.14.", "Or so..."]),
        ('He said "no." Then (so?) he left', ['He said "no."', "Then (so?)", "he left"]),
        ("A list\n- one\n- two.\n\nEnd", ["A list", "- one", "- two.", "End"]),
        ("今日は。明日は？", ["今日は。", "明日は？"]),  # noqa: RUF001
        ("...", ["..."]),
        (" \n ", []),
        ("", []),
    ],
)
def test_sentences_end_with_their_punctuation_or_the_line(text, expected):
    assert texts_of(sentences(text), text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a. b\n\n  c d  \ne", ["a. b", "c d", "e"]),
        ("a", ["a"]),
        ("\n\n", []),
    ],
)
def test_lines_are_without_the_space_around_them(text, expected):
    assert texts_of(lines(text), text) == expected


# --- on tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(19)
def test_a_score_lies_on_the_token_that_completes_its_part():
    ids = [0, 1, 2, 3, 1, 2, EOS]  # a b . _ b .
    assert on_tokens(ids, [(0, 3), (4, 6)], [1.0, 5.0]) == [0.0, 0.0, 1.0, 0.0, 0.0, 5.0, 0.0]


def test_a_token_that_ends_one_part_and_begins_the_next_bears_the_first_ones_score():
    ids = [0, 5, 1, 6, EOS]  # a |. a| b |b.|
    assert on_tokens(ids, [(0, 2), (3, 7)], [1.0, 5.0]) == [0.0, 1.0, 0.0, 5.0, 0.0]


def test_scores_that_meet_on_one_token_add_up():
    ids = [0, 5, 1]  # a |. a| b: both "a" and "a." are there once the second token is
    assert on_tokens(ids, [(0, 1), (0, 2), (1, 2), (3, 5)], [1.0, 2.0, 4.0, 8.0]) == [1.0, 6.0, 8.0]


@pytest.mark.parametrize("text", ["aé. b😀.c", "😀😀. é!", "日本。ab"])
def test_a_letter_of_several_tokens_is_complete_with_the_last(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text)["input_ids"]
    spans = [(i, i + 1) for i in range(len(text))]
    expected = [0.0] * len(ids)
    for i in range(len(text)):  # as many tokens as there are bytes so far
        expected[len(text[: i + 1].encode()) - 1] = i + 1.0
    assert len(ids) > len(text)
    assert on_tokens(ids, spans, [i + 1.0 for i in range(len(text))], tokenizer) == expected


def test_a_response_that_was_cut_within_a_letter_has_its_score_on_the_last_token():
    tokenizer = bytes_tokenizer()
    ids = tokenizer("a😀")["input_ids"][:3]
    response = tokenizer.decode(ids)
    assert response == "a\ufffd"
    scores = token_scores(response, ids, tokenizer, [(0, 1), (1, 2)], [1.0, 2.0])
    assert scores[0] == 1.0
    assert sum(scores) == 3.0


def test_any_split_of_any_text_puts_every_score_on_the_token_that_a_search_from_the_left_finds():
    generator = random.Random(0)
    for tokenizer in (pieces(), word_tokenizer(), bytes_tokenizer()):
        for _ in range(50):
            ids = [generator.randrange(len(tokenizer) - 2) for _ in range(generator.randrange(1, 9))]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            begin = generator.randrange(len(text)) if text else 0
            if not text:
                continue
            end = generator.randrange(begin + 1, len(text) + 1)
            first = next(t for t in range(len(ids)) if tokenizer.decode(ids[: t + 1])[:end] == text[:end])
            expected = [float(t == first) for t in range(len(ids))]
            assert token_scores(text, ids, tokenizer, [(begin, end)], [1.0]) == expected


def test_a_response_without_text_has_no_score():
    assert on_tokens([EOS], [], []) == [0.0]


@pytest.mark.parametrize(
    ("spans", "scores", "complaint"),
    [
        ([(0, 2)], [], "`scores` must be one for each of 1 parts of 'ab', and are 0"),
        ([(0, 3)], [1.0], r"`spans` holds \(0, 3\), which is no part of the response 'ab'"),
        ([(1, 1)], [1.0], r"`spans` holds \(1, 1\), which is no part"),
        ([(-1, 1)], [1.0], r"`spans` holds \(-1, 1\), which is no part"),
    ],
)
def test_what_is_no_part_of_the_response_is_refused(spans, scores, complaint):
    with pytest.raises(ValueError, match=complaint):
        on_tokens([0, 1], spans, scores)


@pytest.mark.parametrize(("ids", "decoded"), [([0, 1], "ab"), ([], "")])
def test_tokens_of_another_response_are_refused(ids, decoded):
    complaint = f"`tokens` decode to '{decoded}', and the response is 'ba': give those that were sampled"
    with pytest.raises(ValueError, match=complaint):
        token_scores("ba", ids, pieces(), [(0, 1)], [1.0])


# --- as a reward ------------------------------------------------------------------------------------------------------


def words(text):
    """Spans of words, as a split of one's own."""
    spans, start = [], 0
    for word in text.split(" ") if text else []:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return spans


def early(prompts, segments):
    return [[1.0 if segment < "k" else -1.0 for segment in row] for row in segments]


@pytest.mark.invariant(19)
@pytest.mark.parametrize("cls", [PPOModule, GRPOModule])
def test_a_module_learns_from_a_score_per_word(cls):
    module = module_of(cls, reward=DenseReward(early, split=words), kl_coef=0.0)
    (experience,) = fit(module, iterations=1).experiences
    scores = experience.scores
    for i, tokens in enumerate(experience.response_tokens):
        ids = tokens[experience.response_mask[i]].tolist()
        # A token a word; `<eos>` is none, and the letters before k are the first ten.
        expected = [0.0 if token >= 22 else 1.0 if token < 10 else -1.0 for token in ids]
        assert scores.token_scores[i][: len(ids)].tolist() == expected
        assert float(scores.by_name["early"][i]) == sum(expected)
    assert scores.token_scores.abs().sum() > 10


def test_a_score_may_ask_for_metadata_and_for_nothing_it_does_not_name():
    calls = []

    def judge(prompts, segments, answer):
        calls.append((prompts, answer))
        return [[0.0] * len(row) for row in segments]

    def all_there_is(prompts, segments, **more):
        calls.append(sorted(more))
        return [None if i else [0.0] * len(row) for i, row in enumerate(segments)]

    rows = [{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}]
    fit(module_of(PPOModule, reward=[DenseReward(judge), DenseReward(all_there_is, "lines")]), 1, rows)
    assert sorted(zip(*calls[0], strict=True)) == [("a b", 1), ("c", 2)]
    assert calls[1] == ["answer", "response_tokens", "responses", "tokenizer"]


@pytest.mark.invariant(39)
@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (
            lambda rows: [1.0 for _ in rows],
            r"it gave 1.0 for response 0 \('.*'\), which has \d+ segments: it must give",
        ),
        (lambda rows: [[1.0] * len(row) if i else [1.0] * 40 for i, row in enumerate(rows)], "which has .* segments"),
        (lambda rows: [[1.0] * len(rows[0]), 0.5, *rows[2:]], "it gave 0.5 for response 1 "),
        (lambda rows: rows[:1], "it must return a list for each of 6 responses"),
        (lambda rows: 1.0, "it returned 1.0: it must return a list for each of 6 responses"),
        (
            lambda rows: [[float("nan")] * len(row) for row in rows],
            "`reward` 'judge' gave nan for token .* of response",
        ),
    ],
    ids=["one each", "too many", "mixed", "too few rows", "a number", "nan"],
)
def test_what_does_not_fit_the_segments_is_an_error_that_names_reward_and_sample(answer, complaint):
    def judge(prompts, segments):
        return answer(segments)

    with pytest.raises((RuntimeError, ValueError), match=f"`reward` 'judge'.*{complaint}|{complaint}"):
        fit(module_of(PPOModule, reward=DenseReward(judge, split=words)), iterations=1)


@pytest.mark.parametrize(
    ("build", "error", "complaint"),
    [
        (lambda: DenseReward(early, split="steps"), ValueError, "`split='steps'` must be 'sentences', 'lines', or"),
        (lambda: DenseReward(early, split=3), TypeError, "`split=3` must be callable"),
        (lambda: DenseReward(0.5), TypeError, "`score=0.5` must be callable"),
        (lambda: DenseReward("nowhere.score"), ValueError, "`score='nowhere.score'` must be a callable or the dotted"),
        (lambda: DenseReward(early, "nowhere.cut"), ValueError, "`split='nowhere.cut'` must be a callable or the dot"),
    ],
)
def test_what_makes_no_dense_reward_is_refused(build, error, complaint):
    with pytest.raises(error, match=complaint):
        build()


def test_a_checkpoint_knows_its_dense_reward(tmp_path):
    name = "tests.rewards.test_dense"
    module = module_of(PPOModule, reward=[DenseReward(f"{name}.early", split=words), DenseReward(early, "lines")])
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(module, datamodule=PromptDataModule(["a", "b"], batch_size=2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    policy = tiny_gpt2(initializer_range=0.3)
    loaded = PPOModule.load_from_checkpoint(tmp_path / "one.ckpt", policy=policy, tokenizer=word_tokenizer())
    first, second = (reward.function for reward in loaded.reward.rewards)
    assert (first.score, first.split, second.score, second.split) == (early, words, early, lines)


def test_one_that_cannot_be_imported_is_not_stored():
    class Local(DenseReward):
        pass

    assert DenseReward(lambda prompts, segments: []).plain() is None
    assert Local(early).plain() is None
    assert CombinedReward(DenseReward(early)).name == "early"
