"""Scores of rows, however they are read, beside those of transformers' own forward, one text at a time."""

import pytest
import torch
from transformers import AutoModel

from lightning_rlhf import ModelSpec
from lightning_rlhf.batches import ImitationBatch, PreferenceBatch
from lightning_rlhf.data.preferences import preference_batch
from lightning_rlhf.models.headed import HeadedModel
from lightning_rlhf.models.scorer import Scorer
from lightning_rlhf.models.scorer_loading import has_classifier, load_scorer
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, ENCODERS, EOS, PAD, USUAL, network, random_rows

HEADLESS = ["mamba", "rwkv", "marian", "pegasus"]
"""For which transformers has no sequence classifier."""
CONFIGS = {**ARCHITECTURES, **ENCODERS, **ENCODER_DECODERS}
IN_LINE = ["gpt2", "gpt_neox", "llama", "opt", "mistral", "phi", "gpt_bigcode"]
"""Whose attention can be had row by row."""


def model_of(name, seed=0):
    """A classifier with one output whose scores differ by about 1."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = load_scorer(ModelSpec(CONFIGS[name]()))
        for name_of_weight, parameter in model.named_parameters():
            if "norm" not in name_of_weight and "ln_" not in name_of_weight and parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def scorer_of(name, shares=True):
    scorer = Scorer(model_of(name), PAD)
    scorer.probe()
    scorer.shares = shares
    return scorer.eval()


PROMPTS = random_rows([3, 7, 1], seed=1)
RESPONSES = [
    [[*row, EOS] for row in random_rows(lengths, seed=i)] for i, lengths in enumerate([[2, 5], [4, 1, 9], [6, 3]])
]


def batch():
    return preference_batch(PROMPTS, RESPONSES, PAD)


@torch.no_grad()
def alone(model, tokens):
    """What transformers' forward says of one text without padding."""
    ids = torch.tensor([tokens])
    return float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.invariant(6, 8)
@pytest.mark.parametrize(
    "name", [*USUAL, *IN_LINE[-3:], *ENCODERS, "mixtral", "openai_gpt", "t5", "bart", "mbart", *HEADLESS]
)
def test_a_score_is_that_of_the_text_alone_whatever_is_read_beside_it(name):
    scorer = scorer_of(name)
    expected = [alone(scorer.model, p + r) for p, some in zip(PROMPTS, RESPONSES, strict=True) for r in some]
    assert max(expected) - min(expected) > 0.02
    rows = batch()
    scores = scorer(rows)
    assert scores[rows.is_there].tolist() == pytest.approx(expected, abs=2e-5)
    assert scores[~rows.is_there].tolist() == [0.0, 0.0]
    garbled = batch()
    garbled.prompt_tokens = torch.where(rows.prompt_mask, rows.prompt_tokens, 5)
    garbled.response_tokens = torch.where(rows.response_mask, rows.response_tokens, EOS)
    torch.testing.assert_close(scorer(garbled), scores, rtol=0, atol=2e-6)


@pytest.mark.invariant(1, 6)
@pytest.mark.parametrize("name", IN_LINE)
def test_rows_in_line_and_padded_ones_give_the_same_scores_and_gradients(name):
    def run(in_line):
        scorer = scorer_of(name)
        assert scorer.unpads
        scorer.unpads, scorer.pads = in_line, not in_line  # always, or never
        scores = scorer(batch())
        (scores**2).sum().backward()
        return scores.detach(), torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_LINE)
def test_a_shared_prompt_is_read_once_and_no_padding_at_all(name):
    scorer = scorer_of(name)
    scorer.pads = False
    read = []
    scorer.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape))
    scorer(batch())
    tokens = sum(map(len, PROMPTS)) + sum(len(response) for some in RESPONSES for response in some)
    assert read[0] == (1, tokens)
    read.clear()
    scorer.shares = False  # as where dropout is to differ
    scorer(batch())
    again = sum(len(prompt) * (len(some) - 1) for prompt, some in zip(PROMPTS, RESPONSES, strict=True))
    assert read[0] == (1, tokens + again)


def test_which_models_are_read_how():
    for name in IN_LINE:
        scorer = scorer_of(name)
        assert (scorer.head, scorer.unpads) == ("score", True), name
    for name in [*ENCODERS, "t5", "bart", "marian"]:
        scorer = scorer_of(name)
        assert (scorer.head, scorer.unpads) == (None, False), name
    for name in ("gptj", "bloom", "gemma2", "gpt_neo", "mamba", "rwkv"):
        scorer = scorer_of(name)
        assert (scorer.head, scorer.unpads) == ("score", False), name


def test_transformers_lacks_the_class_for_those_that_get_a_head_of_ours():
    assert not any(has_classifier(CONFIGS[name]()) for name in HEADLESS)
    assert isinstance(model_of("mamba"), HeadedModel)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_model_that_padding_changes_reads_rows_one_by_one(name):
    model = model_of(name)
    forward, widths = model.forward, []

    def disturbed(input_ids, attention_mask):
        widths.append(tuple(input_ids.shape))
        output = forward(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.logits + (attention_mask == 0).sum(1, keepdim=True)
        return output

    model.forward = disturbed
    scorer = Scorer(model, PAD)
    scorer.probe()
    scorer.eval()
    assert not scorer.pads
    widths.clear()
    rows = batch()
    scores = scorer(rows)[rows.is_there]
    assert [height for height, _ in widths] == [1] * 7
    expected = [alone(model_of(name), p + r) for p, some in zip(PROMPTS, RESPONSES, strict=True) for r in some]
    assert scores.tolist() == pytest.approx(expected, abs=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "opt", "t5", "bart"])
def test_a_language_model_keeps_its_weights_under_the_new_head(name):
    language = network(CONFIGS[name]())
    scorer = load_scorer(ModelSpec(language))
    own, weights = scorer.base_model.state_dict(), language.base_model.state_dict()
    shared = own.keys() & weights.keys()
    assert len(shared) > 10
    assert all(torch.equal(own[key], weights[key]) for key in shared)
    assert {key for key in own if key not in weights} == set()


@torch.no_grad()
def test_a_head_of_ours_lies_beside_what_automodel_reads(tmp_path):
    model = model_of("mamba")
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3, EOS]])
    states = AutoModel.from_pretrained(tmp_path)(tokens).last_hidden_state[0, -1]
    from safetensors.torch import load_file

    weight = load_file(tmp_path / "reward_head.safetensors")["weight"]
    assert float(weight[0] @ states) == pytest.approx(alone(model, tokens[0].tolist()), abs=1e-6)


def test_scores_are_in_single_precision_at_least():
    scorer = scorer_of("gpt2").to(torch.bfloat16)
    assert scorer(batch()).dtype == torch.float32
    scorer = scorer.to(torch.float64)
    assert scorer(batch()).dtype == torch.float64


def test_a_batch_of_preferences_can_be_split_and_moved_like_any_other():
    rows = batch().select(torch.tensor([2, 0]))
    assert isinstance(rows, PreferenceBatch)
    assert isinstance(rows.rows(), ImitationBatch)
    assert rows.response_mask.sum(2).tolist() == [[7, 4, 0], [3, 6, 0]]
