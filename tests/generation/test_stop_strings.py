"""Stop strings: found on ids, wherever they begin and end, against a search in the text."""

from collections.abc import Sequence

import pytest
import torch

from lightning_rlhf import PPOModule, SFTModule
from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.generation import steps
from lightning_rlhf.generation.decode import Decoded, DecodeLoop
from lightning_rlhf.generation.sampling import Sampling
from lightning_rlhf.models.vocabulary import SpecialTokens
from tests.networks import Scripted, bigram, piece_tokenizer, tiny_gpt2, word_tokenizer

PIECES = ["a", "b", "c", "d", "e", "f", "ab", "bc", "abc", "cab", "fcabd", "##", "b#", "."]
TOKENIZER = piece_tokenizer(PIECES)
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def decoded(
    lines: Sequence[Sequence[int]], stop: Sequence[str], prompts: Sequence[Sequence[int]] | None = None, **settings: int
) -> Decoded:
    """What becomes of lines under stop strings; a prompt's first token must be its line's number."""
    from transformers import StopStringCriteria

    prompts = [[i] for i in range(len(lines))] if prompts is None else prompts
    sampling = Sampling(**{"max_new_tokens": max(map(len, lines)), **settings})
    tokens, mask = padded(prompts, PAD, "left")
    policy = Scripted(lines, prompt_width=tokens.shape[1])
    loop = DecodeLoop(policy, sampling, SpecialTokens((EOS,), PAD), StopStringCriteria(TOKENIZER, list(stop)))
    return loop(tokens, mask, row_uniforms(0, "rollout", (), range(len(lines)), sampling.max_new_tokens))


def ids(*pieces: str) -> list[int]:
    return [EOS if piece == "<eos>" else PIECES.index(piece) for piece in pieces]


def responses(out: Decoded) -> list[list[int]]:
    return [row[row_mask].tolist() for row, row_mask in zip(out.tokens, out.mask, strict=True)]


def cut(line: Sequence[int], stop: Sequence[str]) -> list[int]:
    """The shortest beginning of a line that has ended, by looking at its text."""
    for t in range(len(line)):
        text = "".join(PIECES[token] for token in line[: t + 1] if token != EOS)
        if line[t] == EOS or any(string in text for string in stop):
            return list(line[: t + 1])
    return list(line)


@pytest.mark.invariant(3, 7)
def test_the_token_that_completes_a_stop_string_is_kept_and_is_the_last() -> None:
    lines = [
        ids("d", "##", "e", "e"),  # one token
        ids("d", "e", "b#", "f"),  # none of it
        ids("abc", "b", "##", "a"),
        ids("e", "<eos>", "##", "a"),  # after the end
        ids("e", "f", "e", "##"),  # with the very last token
    ]
    out = decoded(lines, ["##"])
    assert responses(out) == [lines[0][:2], lines[1], lines[2][:3], lines[3][:2], lines[4]]
    assert out.truncated.tolist() == [False, True, False, False, False]
    assert set(out.tokens[~out.mask].tolist()) == {PAD}
    assert out.values[out.mask].tolist() == [100.0 * i + t for i, n in enumerate([2, 4, 3, 2, 4]) for t in range(n)]


@pytest.mark.invariant(7)
@pytest.mark.parametrize(
    "line",
    [
        ids("e", "a", "b", "c", "d", "f"),  # token by token
        ids("e", "ab", "c", "d", "f"),
        ids("e", "a", "bc", "d", "f"),
        ids("e", "abc", "d", "f"),
        ids("e", "cab", "c", "d", "f"),  # begins inside a token
        ids("a", "a", "abc", "d", "f"),  # begins again
        ids("ab", "ab", "c", "d", "f"),
    ],
)
def test_a_stop_string_may_span_tokens_and_begin_inside_one(line: list[int]) -> None:
    out = decoded([line], ["abcd"])
    assert responses(out) == [line[:-1]]


@pytest.mark.invariant(7)
@pytest.mark.parametrize(
    ("line", "stop", "length"),
    [
        (ids("e", "fcabd", "e"), "ab", 2),  # in the middle of a token
        (ids("e", "fcabd", "e"), "fc", 2),
        (ids("f", "fcabd", "e"), "ff", 2),  # ends inside a token
        (ids("b", "b#", "##", "e"), "b###", 3),
        (ids("b", "b#", "##", "e"), "bb##", 3),
        (ids("e", "##", "##", "e"), "###", 3),
    ],
)
def test_a_stop_string_may_end_inside_a_token_which_is_kept_whole(line: list[int], stop: str, length: int) -> None:
    assert responses(decoded([line], [stop])) == [line[:length]]


@pytest.mark.invariant(7)
def test_whichever_of_several_stop_strings_comes_first_ends_a_response() -> None:
    lines = [ids("a", "##", "d", "."), ids("d", "e", "##", "."), ids("a", ".", "d", "e"), ids("a", "b", "c", "f")]
    out = decoded(lines, ["de", "##", "."])
    assert out.mask.sum(1).tolist() == [2, 2, 2, 4]
    assert out.truncated.tolist() == [False, False, False, True]


@pytest.mark.invariant(7)
def test_a_stop_string_in_the_prompt_ends_nothing() -> None:
    prompts = [ids("a", "##", "#" * 2), ids("b", "##"), ids("c", "b#")]
    lines = [ids("d", "e", "f"), ids("b#", "e", "##"), ids("e", "b#", "##")]
    out = decoded(lines, ["##", "#b"], prompts=prompts)
    assert responses(out) == lines  # nor one that begins in it: `##` and then `b#` holds `#b`
    assert out.truncated.tolist() == [True, False, False]


@pytest.mark.invariant(7)
def test_min_new_tokens_keeps_off_eos_and_no_stop_string() -> None:
    out = decoded([ids("a", "##", "b", "c")], ["##"], min_new_tokens=4)
    assert responses(out) == [ids("a", "##")]
    assert out.truncated.tolist() == [False]


@pytest.mark.invariant(4, 7)
@pytest.mark.parametrize("share", [0.0, 0.125, 2.0])
@pytest.mark.parametrize(
    "stop", [["##"], ["ab"], ["bca", "e"], ["abc", "#.", "cabd"], ["aaaa"], ["c", "d", "ff"], [".#", "b##b", "fcab"]]
)
def test_random_texts_end_where_a_search_says_they_do(
    stop: list[str], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "DROP_FINISHED_AT", share)
    count = len(PIECES)  # a line's number is a token
    weights = torch.ones(count, EOS + 1)
    weights[:, EOS] = 0.3
    ends = set()
    for _ in range(3):
        lines = torch.multinomial(weights, 16, replacement=True).tolist()
        out = decoded(lines, stop)
        expected = [cut(line, stop) for line in lines]
        assert responses(out) == expected
        assert out.truncated.tolist() == [cut([*line, EOS], stop)[16:] == [EOS] for line in lines]
        ends |= set(map(len, expected))
    assert len(ends) > 5


@pytest.mark.invariant(7)
def test_a_module_stops_at_its_stop_strings_and_gives_them_back() -> None:
    follows = torch.full((len(PIECES) + 2, len(PIECES) + 2), 1e-4)
    for now, then in [("a", "bc"), ("bc", "d"), ("d", "e"), ("e", "f"), ("f", "a"), ("b", "##"), ("##", "<eos>")]:
        follows[ids(now)[0], ids(then)[0]] = 1.0
    module = PPOModule(bigram(follows), tokenizer=TOKENIZER, reward=lambda prompts, responses: [0.0])
    greedy = {"temperature": 0.0, "max_new_tokens": 7}
    assert module.generate(["a", "b"], greedy) == ["bcdefabcd", "##"]
    assert module.generate(["a", "b", "bcd"], {**greedy, "stop": "cd"}) == ["bcd", "##", "efabcd"]
    assert module.generate(["a", "b"], {**greedy, "stop": ["ef", "#"]}) == ["bcdef", "##"]
    assert module.generate(["a"], greedy) == ["bcdefabcd"]


def test_a_tokenizer_that_cannot_write_any_text_is_named() -> None:
    module = SFTModule(tiny_gpt2(), tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match=r"`stop=\['a b'\]` needs a tokenizer that can write any text"):
        module.generate(["a"], {"stop": "a b", "max_new_tokens": 4})
