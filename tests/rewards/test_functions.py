import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_rlhf.rewards.functions import RewardFunction
from tests.networks import EOS, PAD, word_tokenizer, written

CHAT = [{"role": "user", "content": "a b"}]


def rollouts(**more):
    """Three responses of 2, 1 and 3 tokens; the first and the last end with EOS."""
    fields = {
        "prompts": ["a", CHAT, "c d"],
        "responses": ["b", "c", "d e"],
        "metadata": {"answer": ["x", "y", None], "level": [1, 2, 3]},
    }
    return replace(written([[0], [0, 1], [2, 3]], [[1, EOS], [2], [3, 4, EOS]]), **{**fields, **more})


def scored(function, **more):
    return RewardFunction(function)(rollouts(**more), "the tokenizer")


def test_a_reward_gets_prompts_as_given_and_responses_as_text():
    calls = []

    def reward(prompts, responses):
        calls.append((prompts, responses))
        return [1, 2, 3]

    assert scored(reward) == [1.0, 2.0, 3.0]
    assert calls == [(["a", CHAT, "c d"], ["b", "c", "d e"])]


def test_a_reward_gets_what_it_names_and_nothing_else():
    def reward(responses, answer, tokenizer, unknown="default"):
        assert (responses, answer) == (["b", "c", "d e"], ["x", "y", None])
        assert (tokenizer, unknown) == ("the tokenizer", "default")
        return [0, 0, 0]

    assert scored(reward) == [0.0, 0.0, 0.0]


def test_a_reward_that_takes_keywords_gets_all_there_is():
    calls = []

    def reward(prompts, responses, **metadata):
        calls.append(metadata)
        return [0, 0, 0]

    scored(reward)
    (metadata,) = calls
    assert set(metadata) == {"answer", "level", "response_tokens", "tokenizer"}
    assert metadata["level"] == [1, 2, 3]


def test_response_tokens_are_as_long_as_the_mask_counts():
    calls = []

    def reward(prompts, responses, response_tokens):
        calls.append(response_tokens)
        return [0, 0, 0]

    batch = rollouts()
    assert batch.response_tokens[1].tolist() == [2, PAD, PAD]
    scored(reward)
    assert [tokens.tolist() for tokens in calls[0]] == [[1, EOS], [2], [3, 4, EOS]]
    assert all(tokens.dim() == 1 for tokens in calls[0])


@pytest.mark.parametrize(
    "reward",
    [
        lambda texts, answers: [ord(answer[0]) for answer in answers],
        lambda *both: [ord(answer[0]) for answer in both[1]],
        lambda texts, answers, /: [ord(answer[0]) for answer in answers],
        lambda texts, answers, level: [ord(answer[0]) for answer in answers],
        lambda texts, answers, **metadata: [ord(answer[0]) for answer in answers if metadata["level"]],
        functools.partial(lambda extra, texts, answers: [ord(answer[0]) for answer in answers], 1),
    ],
    ids=["two names", "any number", "positional only", "and metadata", "and keywords", "partial"],
)
def test_a_reward_with_names_of_its_own_gets_prompts_and_responses_in_that_order(reward):
    assert scored(reward) == [98.0, 99.0, 100.0]


def test_a_builtin_whose_signature_is_unknown_does_too():
    assert scored(max, prompts=[7, 8, 9], responses=[1, 2, 3]) == [7.0, 8.0, 9.0]


class Judge:
    def __call__(self, prompts, responses):
        return [float(len(response)) for response in responses]

    def score(self, prompts, responses):
        return self(prompts, responses)


def count_cats(prompts, responses):
    return [response.count("cat") for response in responses]


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (count_cats, "count_cats"),
        (lambda prompts, responses: 0, "<lambda>"),
        (functools.partial(count_cats), "count_cats"),
        (functools.partial(functools.partial(Judge())), "Judge"),
        (Judge(), "Judge"),
        (Judge().score, "score"),
        (max, "max"),
    ],
    ids=["function", "lambda", "partial", "partial of a partial", "object", "method", "builtin"],
)
def test_a_reward_has_the_name_that_its_author_gave_it(reward, name):
    assert RewardFunction(reward).name == name


def test_a_name_can_be_given():
    assert RewardFunction(count_cats, name="cats").name == "cats"


@pytest.mark.parametrize(
    "scores",
    [
        [0.5, True, 2],
        (0.5, 1.0, 2.0),
        np.array([0.5, 1.0, 2.0]),
        np.array([0.5, 1.0, 2.0], dtype=np.float32),
        torch.tensor([0.5, 1.0, 2.0]),
        torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
        [np.float32(0.5), np.int64(1), 2.0],
        [torch.tensor(0.5), torch.tensor(1), torch.tensor(2.0, requires_grad=True)],
        [np.array(0.5), np.array(1), np.array(2.0)],
        (score for score in (0.5, 1.0, 2.0)),
        map(float, (0.5, 1, 2)),
    ],
    ids=[
        "list",
        "tuple",
        "numpy",
        "single",
        "tensor",
        "bfloat16",
        "numpy_numbers",
        "tensors",
        "arrays",
        "generator",
        "map",
    ],
)
def test_scores_may_come_as_anything_that_holds_numbers(scores):
    assert scored(lambda prompts, responses: scores) == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "scores",
    [
        [[1, 2], [3], [4, 5, 6]],
        [(1, 2), (3,), (4, 5, 6)],
        [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])],
        [np.array([1.0, 2.0]), np.array([3]), np.array([4, 5, 6])],
        [[torch.tensor(1), 2], [np.float32(3)], [4, 5, 6]],
    ],
    ids=["lists", "tuples", "tensors", "arrays", "mixed"],
)
def test_dense_scores_may_too(scores):
    assert scored(lambda prompts, responses: scores) == [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]


def test_none_says_that_a_reward_does_not_apply():
    first, second, third = scored(lambda prompts, responses: [1.0, None, 3])
    assert (first, third) == (1.0, 3.0)
    assert second != second


def test_none_says_so_beside_dense_scores_too():
    first, second, third = scored(lambda prompts, responses: [[1, 2], None, [4, 5, 6]])
    assert (first, third) == ([1.0, 2.0], [4.0, 5.0, 6.0])
    assert len(second) == 1
    assert second[0] != second[0]


@pytest.mark.invariant(39)
@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 responses"),
        ([1.0] * 4, "returned 4 scores for 3 responses"),
        ([], "returned 0 scores for 3 responses"),
        (torch.zeros(2), "returned 2 scores for 3 responses"),
        (None, "returned None: it must return a list"),
        (1.0, "returned 1.0: it must return a list"),
        (torch.tensor(1.0), "returned 1.0: it must return a list"),
        ("abc", "returned 'abc': it must return a list"),
        ([1.0, float("nan"), 1.0], "gave nan for response 1 .*: it must be finite"),
        ([1.0, 1.0, float("-inf")], "gave -inf for response 2 .*: it must be finite"),
        (np.array([np.inf, 1.0, 1.0]), "gave inf for response 0 .*: it must be finite"),
        ([1.0, 1e39, 1.0], "gave 1e[+]39 for response 1 .*: it must be finite"),
        ([1.0, 10**400, 1.0], "gave 1000.* for response 1 .*: it must be a number"),
        ([1.0, {}, 1.0], "gave {} for response 1"),
        ([1.0, "much", 1.0], "gave 'much' for response 1"),
        ([1.0, object, 1.0], "gave <class 'object'> for response 1 .*: it must be a number"),
        ([[1.0], [1.0], [1.0, 1.0, 1.0]], r"gave \[1.0\] for response 0 .*has 2 tokens"),
        (np.ones((3, 3)), r"gave \[1.0, 1.0, 1.0\] for response 0 .*has 2 tokens"),
        ([[1.0, 1.0], 1.0, [1.0, 1.0, 1.0]], "gave 1.0 for response 1 .*, and a list for another response"),
        ([3.0, 4.0, [1.0, 1.0, 1.0]], "gave 3.0 for response 0 .*, and a list for another response"),
        ([[1.0, 1.0], [1.0], [1.0, float("nan"), 1.0]], "gave nan for token 1 of response 2 .*: it must be finite"),
        ([[1.0, None], [1.0], [1.0, 1.0, 1.0]], "gave None for token 1 of response 0 .*: it must be a number"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_reward_and_sample(scores, complaint):
    def judge(prompts, responses):
        return scores

    with pytest.raises(ValueError, match=f"^`reward` 'judge' {complaint}"):
        scored(judge)


def test_the_error_quotes_the_response():
    with pytest.raises(ValueError, match=r"response 2 \('d e'\)"):
        scored(lambda prompts, responses: [1.0, 1.0, float("nan")])


def explode(prompts, responses):
    raise KeyError("answer")


def explode_later(prompts, responses):
    for response in responses:
        yield {"b": 1.0}[response]


@pytest.mark.invariant(39)
@pytest.mark.parametrize("reward", [explode, explode_later])
def test_a_reward_that_raises_is_named_and_its_own_error_kept(reward):
    with pytest.raises(
        RuntimeError, match=f"^`reward` '{reward.__name__}' raised KeyError.*first of which is 'b'"
    ) as e:
        scored(reward)
    assert isinstance(e.value.__cause__, KeyError)


def test_a_reward_that_wants_what_no_row_has_says_so():
    def reward(prompts, responses, solution):
        return [0, 0, 0]

    with pytest.raises(RuntimeError, match="`reward` 'reward' raised TypeError: .*'solution'"):
        scored(reward)


def test_what_is_not_callable_is_no_reward():
    with pytest.raises(TypeError, match="`reward=0.5` must be callable"):
        RewardFunction(0.5)


def test_the_tokenizer_is_the_policys():
    tokenizer = word_tokenizer()
    seen = []

    def reward(prompts, responses, tokenizer):
        seen.append(tokenizer)
        return [0, 0, 0]

    RewardFunction(reward)(rollouts(), tokenizer)
    assert seen[0] is tokenizer
