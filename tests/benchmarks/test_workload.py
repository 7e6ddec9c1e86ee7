"""The work that systems are compared on is what it says it is."""

import pytest
import torch

from benchmarks import sizes, texts, workload
from benchmarks.sizes import SIZES
from benchmarks.workload import EOS, PAD, Case
from lightning_rlhf import SFTModule
from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.data.tokens import padded

SMALL = SIZES["small"]


def lengths_written(lengths: workload.Lengths, rows: int) -> torch.Tensor:
    """How long so many responses of the small network are."""
    module = SFTModule(workload.network(SMALL, lengths), tokenizer=workload.tokenizer(SMALL))
    module.configure_model()
    tokens, mask = padded(module.tokenizer(texts.prompts(SMALL, rows))["input_ids"], PAD, "left")
    uniforms = row_uniforms(0, "test", (), range(rows), SMALL.max_new_tokens)
    sampling = module.sampling.but({"max_new_tokens": SMALL.max_new_tokens})
    return module.decode(tokens, mask, uniforms, sampling).mask.sum(1)


@pytest.mark.parametrize("width", [128, 256])
def test_a_ragged_network_ends_one_token_in_24_whatever_the_text(width):
    size = sizes.Size(width, 2, 2, 4096)
    tokens = torch.randint(3, size.vocabulary, (4, 32))
    with torch.no_grad():
        logits = workload.network(size, "ragged")(input_ids=tokens).logits
    probability = logits.softmax(-1)[..., EOS]
    assert float(probability.mean()) == pytest.approx(1 / 24, rel=0.02)
    assert float(probability.std() / probability.mean()) < 0.02


def test_ragged_responses_have_the_mean_of_a_geometric_distribution_cut_at_64():
    lengths = lengths_written("ragged", 96).double()
    p = 1 / 24
    mean = sum(t * p * (1 - p) ** (t - 1) for t in range(1, 64)) + 64 * (1 - p) ** 63  # 22.4
    assert 22 < mean < 23
    assert abs(float(lengths.mean()) - mean) < 3 * 18 / 96**0.5  # of which the standard deviation is 18
    assert lengths.unique().numel() > 20


def test_full_responses_are_all_cut_off():
    assert lengths_written("full", 6).tolist() == [64] * 6


def test_the_networks_are_as_large_as_they_are_said_to_be():
    blocks = {name: round(size.block_parameters / 1e6, 1) for name, size in SIZES.items()}
    heads = {name: round(size.width * size.vocabulary / 1e6, 1) for name, size in SIZES.items()}
    assert blocks == {"small": 3.1, "base": 25.2, "qwen3-0.6b": 440.4}
    assert heads == {"small": 2.1, "base": 25.7, "qwen3-0.6b": 155.6}
    matrices = [p for p in workload.network(SMALL, "full").transformer.h.parameters() if p.dim() == 2]
    assert sum(p.numel() for p in matrices) == SMALL.block_parameters


def test_tokens_and_words_are_one_to_one():
    tokenizer = workload.tokenizer(SMALL)
    assert len(tokenizer) == SMALL.vocabulary
    assert tokenizer("w3 w4 w8191 nonsense")["input_ids"] == [3, 4, 8191, workload.UNK]
    assert tokenizer.decode([3, 4, EOS, PAD], skip_special_tokens=True) == "w3 w4"
    assert tokenizer(["w3", "w3 w4"], padding=True)["input_ids"] == [[PAD, 3], [3, 4]]


def test_prompts_and_examples_are_seeded_and_have_the_lengths_that_they_should():
    tokenizer = workload.tokenizer(SMALL)
    prompts = texts.prompts(SMALL, 200)
    assert texts.prompts(SMALL, 300)[:200] == prompts
    assert texts.prompts(SMALL, 200, seed=1) != prompts
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    assert (min(lengths), max(lengths)) == (32, 64)
    responses = [row["response"] for row in texts.examples(SMALL, 400)]
    lengths = [len(ids) + 1 for ids in tokenizer(responses)["input_ids"]]  # EOS is put there by the systems
    assert (min(lengths), max(lengths)) == (32, 96)
    assert workload.UNK not in {token for ids in tokenizer(responses)["input_ids"] for token in ids}


def test_pairs_have_the_lengths_of_examples():
    tokenizer, pairs = workload.tokenizer(SMALL), texts.pairs(SMALL, 300)
    assert texts.pairs(SMALL, 400)[:300] == pairs
    for key, limits in {"prompt": (32, 64), "chosen": (31, 95), "rejected": (31, 95)}.items():
        lengths = [len(ids) for ids in tokenizer([pair[key] for pair in pairs])["input_ids"]]
        assert (min(lengths), max(lengths)) == limits
    assert len(Case("reward", "small", "full", "", 1, iterations=3).pairs()) == 96


def test_the_reward_is_the_share_of_the_lower_half():
    assert workload.reward([[3, 4, 5000, 6], [4095], [4096], []], SMALL) == [0.75, 1.0, 0.0, 0.0]


def test_a_response_counts_up_to_its_first_eos():
    assert workload.length_of(torch.tensor([5, 6, EOS, EOS, PAD])) == 3
    assert workload.length_of([5, 6, 7]) == 3


def test_an_iteration_has_32_responses_in_every_row():
    def case(row):
        return Case(row, "small", "full", "", 1, iterations=3)

    assert [len(case(row).prompts()) for row in ("ppo", "grpo", "grpo_mu", "generate")] == [96, 12, 12, 96]
    assert len(case("sft").examples()) == 96
    steps = {row: case(row).epochs * 32 // case(row).minibatch_size for row in ("ppo", "grpo", "grpo_mu", "sft")}
    assert steps == {"ppo": 16, "grpo": 1, "grpo_mu": 16, "sft": 1}
