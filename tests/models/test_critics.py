"""Values from copies of a policy's top blocks, and from models of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from lightning_rlhf import ModelSpec, RewardModel, RewardModule
from lightning_rlhf.models.branches import ValueBranch
from lightning_rlhf.models.critics import Critic, critic_network, is_classifier
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.freezing import freeze, keep_frozen_blocks
from lightning_rlhf.models.heads import LinearValueHead, ValueHead
from lightning_rlhf.models.outline import outlined
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from tests.networks import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    EOS,
    counting_gpt2,
    deep,
    network,
    random_rows,
    tiny_gpt2,
    word_tokenizer,
    written,
)

PROMPTS, RESPONSES = random_rows([5, 2, 5, 3], seed=1), random_rows([4, 6, 1, 3], seed=2)


def seen(config):
    decoder = decoder_of(network(config))
    probe(decoder)
    decoder.shares = True
    return decoder


def branched(config, num_layers, unfrozen=-1):
    """A policy with a branch that is no longer what it was copied from."""
    decoder = seen(config)
    freeze(decoder, unfrozen)
    torch.manual_seed(3)
    branch = ValueBranch.of(decoder, num_layers, ValueHead(decoder.width))
    keep_frozen_blocks(decoder, num_layers)
    with torch.no_grad():
        for parameter in branch.copies.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Policy(decoder, value_branch=branch).eval()


def plain_values(policy, num_layers):
    """Row by row, by transformers' own forward of a second model that holds the copies."""
    decoder, branch = policy.decoder, policy.value_branch
    second = copy.deepcopy(decoder.model)
    for name, module in zip(branch.names, branch.copies, strict=True):
        parent, _, child = name.rpartition(".")
        setattr(second.get_submodule(parent), child, module)
    values = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        states = []
        handle = second.get_output_embeddings().register_forward_pre_hook(lambda _, args, s=states: s.append(args[0]))
        if decoder.has_encoder:
            read = torch.tensor([[*decoder.prefix, *response[:-1]]])
            second(input_ids=torch.tensor([prompt]), decoder_input_ids=read, use_cache=False)
            first = len(decoder.prefix) - 1
        else:
            second(input_ids=torch.tensor([prompt + response[:-1]]), use_cache=False)
            first = len(prompt) - 1
        handle.remove()
        values.append(branch.value_head(states[0])[0, first:])
    return torch.cat(values)


FAMILIES = {name: deep(name) for name in ("gpt2", "llama", "opt", "bloom", "gpt_neox", "gemma2")}
FAMILIES |= {name: ENCODER_DECODERS[name](**more) for name, more in {
    "t5": {"num_decoder_layers": 4}, "bart": {"decoder_layers": 4},
}.items()}  # fmt: skip


@pytest.mark.invariant(5, 8, 12)
@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_branch_says_what_the_whole_model_with_the_copies_in_it_would(name, num_layers):
    policy, rollouts = branched(FAMILIES[name], num_layers), written(PROMPTS, RESPONSES)
    expected = plain_values(policy, num_layers)
    output = policy(rollouts)
    assert_close(output.values[rollouts.response_mask], expected, rtol=0, atol=2e-5)
    assert output.values[~rollouts.response_mask].abs().max() == 0
    assert_close(policy.values(rollouts), output.values, rtol=0, atol=2e-5)
    own = Policy(policy.decoder)(rollouts)
    assert torch.equal(own.logprobs, output.logprobs)


@pytest.mark.invariant(1, 12)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_gradients_flow_on_into_the_blocks_below_and_not_into_those_that_were_copied(name):
    policy, rollouts = branched(FAMILIES[name], 2), written(PROMPTS, RESPONSES)
    policy(rollouts).values.sum().backward()
    found = {key: value.grad for key, value in policy.named_parameters()}
    policy.zero_grad()
    # The same model, whole: its lower blocks are the policy's, its top ones the copies.
    branch, model = policy.value_branch, policy.decoder.model
    second = copy.deepcopy(model)
    for key, module in zip(branch.names, branch.copies, strict=True):
        second.get_submodule(key).load_state_dict(module.state_dict())
    decoder = decoder_of(second)
    probe(decoder)
    Policy(decoder, value_head=branch.value_head).eval()(rollouts).values.sum().backward()
    copied = {f"{key}.{k}": f"value_branch.copies.{i}.{k}" for i, key in enumerate(branch.names)
              for k, _ in branch.copies[i].named_parameters()}  # fmt: skip
    for key, parameter in second.named_parameters():
        mine = found[copied.get(key, f"decoder.model.{key}")]
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            assert_close(mine, parameter.grad, rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
        if key in copied and not key.startswith("lm_head"):
            untouched = found[f"decoder.model.{key}"]
            assert untouched is None or untouched.abs().max() == 0


@pytest.mark.invariant(12)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize(("unfrozen", "num_layers"), [(1, 2), (2, 1), (0, 2), (2, 2)])
def test_a_branch_begins_with_what_was_kept_of_the_frozen_blocks(name, unfrozen, num_layers):
    policy, rollouts = branched(FAMILIES[name], num_layers, unfrozen), written(PROMPTS, RESPONSES)
    trunk = policy.decoder.trunk
    assert trunk is not None
    assert len(trunk.frozen) == 4 - max(unfrozen, num_layers)
    prompts, mask = rollouts.prompt_tokens, rollouts.prompt_mask
    tokens, begun, cache = policy.begin(prompts, mask)
    written_ = torch.cat([tokens, rollouts.response_tokens[:, :-1]], 1)
    is_there = torch.cat([begun, torch.ones_like(rollouts.response_mask[:, :-1])], 1)
    with torch.no_grad():
        rollouts.trunk = policy.decoder(written_, is_there, keep=1, cache=cache, use_cache=True).trunk
    runs = []
    handle = policy.decoder.model.get_submodule(trunk.frozen[-1]).register_forward_hook(lambda *_: runs.append(1))
    begun_there, alone = policy(rollouts), policy.values(rollouts)
    handle.remove()
    assert len(trunk.frozen) == 1 or not runs
    rollouts.trunk = None
    whole = policy(rollouts)
    assert_close(begun_there.values, whole.values, rtol=0, atol=2e-5)
    assert_close(begun_there.logprobs, whole.logprobs, rtol=0, atol=2e-5)
    assert_close(alone, whole.values, rtol=0, atol=2e-5)


def test_a_branch_of_more_blocks_than_there_are_is_refused():
    with pytest.raises(ValueError, match="`num_value_layers_unfrozen=3`: it is more than the 2 blocks of GPT2LMHead"):
        ValueBranch.of(seen(tiny_gpt2()), 3, ValueHead(16))


def test_a_branch_of_a_model_that_cannot_begin_in_its_middle_is_refused():
    decoder = decoder_of(counting_gpt2(layers=3))
    probe(decoder)
    complaint = (
        r"`num_value_layers_unfrozen=1`: GPT2LMHeadModel cannot begin in its middle\. Use 0 .*, or `critic='policy'`"
    )
    with pytest.raises(ValueError, match=complaint):
        ValueBranch.of(decoder, 1, ValueHead(16))


# --- models of their own ----------------------------------------------------------------------------------------------


@pytest.mark.invariant(5, 8, 17)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "opt"])
def test_a_critic_that_was_a_classifier_gives_its_score_at_the_last_token(name, tmp_path):
    torch.manual_seed(0)
    more = {} if name == "opt" else {"tie_word_embeddings": False}
    config = ARCHITECTURES[name](num_labels=1, **more)
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    for parameter in classifier.parameters():
        nn.init.normal_(parameter, std=0.3)
    classifier.save_pretrained(tmp_path)
    rollouts = written(PROMPTS, RESPONSES)
    rollouts.truncated[:] = True
    for model in (classifier, tmp_path):
        network_, score = critic_network(ModelSpec(model), begins_with_score=True)
        decoder = decoder_of(network_)
        probe(decoder)
        critic = Critic(decoder, LinearValueHead(decoder.width, score=score)).eval()
        assert {id(p) for p in critic.parameters() if p.requires_grad} == {id(p) for p in critic.parameters()}
        with torch.no_grad():
            values = critic(rollouts.with_next_token())
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            with torch.no_grad():
                expected = classifier(torch.tensor([prompt + response])).logits[0, 0]
            assert_close(values[i, len(response)], expected, rtol=0, atol=2e-5)
    values.sum()
    critic(rollouts).sum().backward()
    without = [name for name, p in critic.named_parameters() if p.grad is None]
    assert not without  # or processes under DDP would wait for them


@pytest.mark.invariant(17)
@pytest.mark.filterwarnings("ignore:Mamba.* cannot be")
@pytest.mark.parametrize("name", ["gpt2", "mamba"])  # of which transformers has a classifier, and has none
def test_a_critic_that_was_a_reward_model_s_export_gives_its_score(name, tmp_path):
    torch.manual_seed(0)
    teacher = RewardModule(ARCHITECTURES[name](), tokenizer=word_tokenizer())
    teacher.configure_model()
    for parameter in teacher.policy.parameters():
        nn.init.normal_(parameter, std=0.3)
    teacher.mean, teacher.std = 3.0, 0.5
    teacher.save_pretrained(tmp_path)
    expected = RewardModel(tmp_path)(["a b c"], ["d e"])[0]
    outline = dict(outlined(ModelSpec(tmp_path), scores=True).named_parameters())
    assert {n: (p.shape, p.is_meta) for n, p in outline.items()} == {
        n: (p.shape, True) for n, p in teacher.policy.decoder.model.named_parameters()
    }
    rollouts = written([[0, 1, 2]], [[3, 4, EOS]])
    rollouts.truncated[:] = True
    for model in (tmp_path, teacher.policy.decoder.model):
        spec = ModelSpec(model)
        assert is_classifier(spec)
        network_, score = critic_network(spec, begins_with_score=True)
        decoder = decoder_of(network_)
        probe(decoder)
        with torch.no_grad():
            value = Critic(decoder, LinearValueHead(decoder.width, score=score)).eval()(rollouts.with_next_token())
        assert float(value[0, 3]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart", "gptj"])
def test_everything_of_a_critic_gets_a_gradient(name):
    config = ENCODER_DECODERS[name]() if name in ENCODER_DECODERS else ARCHITECTURES[name]()
    decoder = seen(config)
    critic = Critic(decoder, ValueHead(decoder.width))
    critic(written(PROMPTS, RESPONSES)).sum().backward()
    assert not [key for key, p in critic.named_parameters() if p.requires_grad and p.grad is None]


def test_a_classifier_whose_score_is_no_linear_function_of_the_last_state_is_refused():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(ENCODER_DECODERS["t5"](num_labels=1))
    with pytest.raises(ValueError, match="`critic=T5ForSequenceClassification` does not read its score off"):
        critic_network(ModelSpec(model), True)


def test_a_classifier_of_several_labels_needs_a_new_head():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_gpt2(num_labels=3))
    with pytest.raises(ValueError, match="`critic=GPT2ForSequenceClassification` has 3 labels, of which none is a val"):
        critic_network(ModelSpec(model), True)
    assert critic_network(ModelSpec(model), False)[1] is None


def test_a_linear_head_is_one_product_by_hand():
    head = LinearValueHead(2)
    with torch.no_grad():
        head.out.weight.copy_(torch.tensor([[2.0, -1.0]]))
        head.out.bias.fill_(0.5)
    assert_close(head(torch.tensor([[[3.0, 1.0], [0.0, 4.0]]])), torch.tensor([[5.5, -3.5]]), rtol=0, atol=1e-6)
