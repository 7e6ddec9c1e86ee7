"""Rules: what they score, by hand; what makes none; pickled, stored and named in YAML."""

import pickle
import random

import pytest
import torch

from lightning_rlhf import (
    ExactMatch,
    LengthPenalty,
    PPOModule,
    PromptDataModule,
    RegexMatch,
    RepetitionPenalty,
    TagFormat,
)
from tests.networks import tiny_gpt2, word_tokenizer
from tests.training import bare_trainer, fit, module_of

RULES = [
    ExactMatch("solution", r"= (\S+)", ignore_case=True),
    RegexMatch(r"^a\b", "search"),
    TagFormat(["a", "b"], opened=True),
    LengthPenalty(5, 1, 1),
    RepetitionPenalty(2, "words"),
]


def of_one(rule, response, **more):
    """The score of one response."""
    (score,) = rule(["a prompt"], [response], **{key: [value] for key, value in more.items()})
    return score


@pytest.mark.parametrize(
    ("rule", "response", "answer", "expected"),
    [
        (ExactMatch(), " Paris\n", "Paris", 1.0),
        (ExactMatch(), "New  York", "New York", 1.0),
        (ExactMatch(), "paris", "Paris", 0.0),
        (ExactMatch(ignore_case=True), "paris", "Paris", 1.0),
        (ExactMatch(), "1,000", "1000", 0.0),
        (ExactMatch(ignore_punctuation=True), "1,000", "1000", 1.0),
        (ExactMatch(), "4", 4, 1.0),
        (ExactMatch(), "four", ["4", "four"], 1.0),
        (ExactMatch(), "five", ["4", "four"], 0.0),
        (ExactMatch(), "4", None, None),
        (ExactMatch(extract=r"#### (\S+)"), "no #### 3\nyes #### 4", "4", 1.0),
        (ExactMatch(extract=r"#### (\S+)"), "4", "4", 0.0),
        (ExactMatch(extract=r"\d+"), "3 or 4?", "4", 1.0),
        (ExactMatch(extract=r"x(\d)?"), "x", "", 1.0),
    ],
)
def test_a_right_answer(rule, response, answer, expected):
    assert of_one(rule, response, answer=answer) == expected


def test_an_answer_may_have_another_key_and_must_have_one():
    assert of_one(ExactMatch("solution"), "4", solution="4", tokenizer="any") == 1.0
    with pytest.raises(
        ValueError, match=r"`key='answer'` must be a key of the prompts' rows, which have \['solution'\]"
    ):
        of_one(ExactMatch(), "4", solution="4", tokenizer="any")


@pytest.mark.parametrize(
    ("rule", "response", "expected"),
    [
        (RegexMatch(r"\d"), "a1b", 1.0),
        (RegexMatch(r"\d"), "ab", 0.0),
        (RegexMatch(r"\d", "fullmatch"), "1b", 0.0),
        (RegexMatch(r"(?s)a.*b", "fullmatch"), "a\nb", 1.0),
        (TagFormat(), "<think>1\n2</think>\n<answer>3</answer>\n", 1.0),
        (TagFormat(), "<think></think><answer></answer>", 1.0),
        (TagFormat(), "Well, <think>1</think><answer>3</answer>", 0.0),
        (TagFormat(), "<think>1</think> so <answer>3</answer>", 0.0),
        (TagFormat(), "<answer>3</answer><think>1</think>", 0.0),
        (TagFormat(), "<think>1</think><answer>3</answer><answer>4</answer>", 0.0),
        (TagFormat(), "<think>1<answer></think>3</answer>", 0.0),
        (TagFormat(), "<think>1</think>", 0.0),
        (TagFormat(opened=True), "1</think><answer>3</answer>", 1.0),
        (TagFormat(opened=True), "<think>1</think><answer>3</answer>", 0.0),
        (TagFormat(["a.b"]), "<aXb>1</aXb>", 0.0),
        (TagFormat(["a.b"]), "<a.b>1</a.b>", 1.0),
    ],
)
def test_patterns_and_formats(rule, response, expected):
    assert of_one(rule, response) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LengthPenalty(4, unit="words"), [0, 0, 0, 0, 0, -1, -1]),
        (LengthPenalty(4, ramp=2, unit="words"), [0, 0, 0, -0.5, -1, -1, -1]),
        (LengthPenalty(None, 2, unit="words"), [-1, -1, 0, 0, 0, 0, 0]),
        (LengthPenalty(6, 1, ramp=2, unit="words"), [-1, -1, -0.5, 0, 0, -0.5, -1]),
        (LengthPenalty(3, unit="characters"), [0, 0, 0, -1, -1, -1, -1]),
    ],
)
def test_length_is_free_within_the_limits(rule, expected):
    responses = [" ".join("abcdef"[:length]) for length in range(7)]
    assert rule(responses, responses) == expected


def test_of_tokens_the_end_counts():
    tokens = [torch.arange(4), torch.arange(5)]
    assert LengthPenalty(4)(["", ""], ["", ""], tokens) == [0.0, -1.0]


def test_repetition_is_what_a_list_of_seen_ngrams_says():
    generator = random.Random(0)
    for _ in range(50):
        n, words = generator.randint(1, 3), [generator.choice("ab") for _ in range(generator.randint(0, 9))]
        seen, again, total = [], 0, 0
        for i in range(n, len(words) + 1):
            total += 1
            again += words[i - n : i] in seen
            seen.append(words[i - n : i])
        expected = pytest.approx(-again / total if total else 0.0)
        ids = torch.tensor([ord(word) for word in words])
        assert of_one(RepetitionPenalty(n, "words"), " ".join(words)) == expected
        assert of_one(RepetitionPenalty(n, "characters"), "".join(words)) == expected
        assert of_one(RepetitionPenalty(n), "", response_tokens=ids) == expected


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: ExactMatch(extract="("), r"`extract='\('` must be a regular expression of Python's: missing"),
        (lambda: RegexMatch("["), r"`pattern='\['` must be a regular expression of Python's"),
        (lambda: RegexMatch("a", "match"), "`mode='match'` must be 'search' or 'fullmatch'"),
        (lambda: TagFormat(["a", "a"]), r"`tags=\['a', 'a'\]` must be a list of one name or more, each once"),
        (lambda: TagFormat("think"), "`tags='think'` must be a list"),
        (lambda: TagFormat([]), r"`tags=\[\]` must be a list"),
        (lambda: LengthPenalty(), "`max_length=None` and `min_length=None` penalise no length"),
        (lambda: LengthPenalty(0), "`max_length=0` must be at least 1, or None"),
        (lambda: LengthPenalty(4, 0), "`min_length=0` must be at least 1, or None"),
        (lambda: LengthPenalty(4, ramp=-1), "`ramp=-1` must not be negative"),
        (lambda: LengthPenalty(4, 5), "`max_length=4` leaves no length without a penalty, with `min_length=5`"),
        (lambda: LengthPenalty(4, ramp=5), "`max_length=4` leaves no length .* `ramp=5`: raise it"),
        (lambda: LengthPenalty(4, 1, 2), "`max_length=4` leaves no length .* `ramp=2`: raise it"),
        (lambda: LengthPenalty(4, unit="letters"), "`unit='letters'` must be one of 'tokens', 'words', 'characters'"),
        (lambda: RepetitionPenalty(0), "`n=0` must be at least 1"),
        (lambda: LengthPenalty(4)(["a"], ["b"]), "`unit='tokens'` needs `response_tokens`: pass them, or count words"),
    ],
)
def test_what_makes_no_rule_is_refused(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_survives_pickling(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule


def test_a_checkpoint_knows_its_rules(tmp_path):
    module = module_of(PPOModule, reward=[*RULES, (RegexMatch("b"), 0.5)])
    trainer = bare_trainer(max_epochs=1)
    rows = [{"prompt": prompt, "solution": "4"} for prompt in "ab"]
    trainer.fit(module, datamodule=PromptDataModule(rows, batch_size=2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    policy = tiny_gpt2(initializer_range=0.3)
    loaded = PPOModule.load_from_checkpoint(tmp_path / "one.ckpt", policy=policy, tokenizer=word_tokenizer())
    assert [reward.function for reward in loaded.reward.rewards] == [*RULES, RegexMatch("b")]
    assert loaded.reward.weights == [1.0] * 5 + [0.5]


def test_a_module_scores_by_rules_each_under_its_name():
    rules = [RegexMatch("a"), RegexMatch("b"), RepetitionPenalty(1), LengthPenalty(3)]
    (experience,) = fit(module_of(PPOModule, reward=rules), iterations=1).experiences
    scores = experience.scores.by_name
    assert list(scores) == ["regex", "regex_2", "repetition_penalty", "length_penalty"]
    for i, response in enumerate(experience.responses):
        ids = experience.response_tokens[i][experience.response_mask[i]].tolist()
        expected = [float("a" in response), float("b" in response), len(set(ids)) / len(ids) - 1, -float(len(ids) > 3)]
        assert [float(values[i]) for values in scores.values()] == pytest.approx(expected)
