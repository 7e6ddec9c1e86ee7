import functools
import random

import lightning as L
import numpy as np
import pytest
import torch

from lightning_rlhf import ConversationDataModule, PPOModule, PromptDataModule, SFTModule
from lightning_rlhf.models.reference import fingerprint
from tests.networks import POSITIONS, network, tiny_gpt2, word_tokenizer
from tests.training import bare_trainer, module_of, sft, sgd

PROMPTS = ["a b c", "d", "e f g h", "b"]


def sure(**arguments):
    """A policy whose distributions are far from uniform, so that seeds and greed can be told apart."""
    return sft(network(tiny_gpt2()), **arguments)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sft, functools.partial(module_of, PPOModule)], ids=["SFT", "PPO"])
def test_weights_depend_on_the_seed_and_not_on_what_was_drawn_before(make):
    modules = [make(seed=seed) for seed in (1, 1, 2)]
    for i, module in enumerate(modules):
        torch.manual_seed(i)
        module.configure_model()
    one, same, other = (fingerprint(module.policy) for module in modules)
    assert one == same != other


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("make", [sft, functools.partial(module_of, PPOModule)], ids=["SFT", "PPO"])
def test_building_and_writing_leave_the_chance_of_others_alone(make):
    module = make(seed=1)
    before = states()
    module.configure_model()
    assert states() == before
    module.generate(["a b"])
    assert states() == before


def test_building_a_second_time_does_nothing():
    module = module_of(PPOModule)
    module.configure_model()
    policy, reference, weights = module.policy, module.reference, fingerprint(module.policy)
    module.configure_model()
    assert module.policy is policy
    assert module.reference is reference
    assert fingerprint(module.policy) == weights


def test_nothing_is_built_before_it_is_needed():
    module = sft()
    assert not module.is_built
    assert list(module.parameters()) == []


def test_a_model_that_was_passed_stays_as_it_is():
    model = network(tiny_gpt2())
    before = fingerprint(model)
    module = SFTModule(model, tokenizer=word_tokenizer(), optimizer=sgd)
    bare_trainer(max_epochs=1).fit(module, datamodule=ConversationDataModule(["a b c"]))
    assert fingerprint(model) == before != fingerprint(module.policy.decoder.model)
    assert not model.training


def test_the_policy_is_built_in_training_mode_or_lightning_would_leave_dropout_off():
    module = sft()
    module.configure_model()
    assert module.policy.decoder.model.training


def test_the_reference_goes_where_the_policy_goes():
    module = module_of(PPOModule)
    module.configure_model()
    module.to(torch.float64)
    dtypes = {parameter.dtype for parameter in [*module.parameters(), *module.reference.network.parameters()]}
    assert dtypes == {torch.float64}


@pytest.mark.invariant(11)
def test_the_reference_is_in_no_list_of_the_modules():
    module = module_of(PPOModule)
    module.configure_model()
    own = {parameter.data_ptr() for parameter in module.reference.network.parameters()}
    assert not own & {parameter.data_ptr() for parameter in module.parameters()}
    assert not own & {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert module.reference.network not in list(module.modules())
    module.train()
    assert not module.reference.network.training


def test_the_tokenizer_may_be_a_folder_or_lie_beside_the_weights(folder):
    for module in (SFTModule(folder), SFTModule(tiny_gpt2(), tokenizer=folder), SFTModule(str(folder), tokenizer=None)):
        assert module.tokenizer.get_vocab() == word_tokenizer().get_vocab()
        assert module.tokenizer is module.tokenizer


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_and_another_something_else():
    module = sure(seed=1)
    one = module.generate(PROMPTS)
    torch.rand(3)
    assert module.generate(PROMPTS) == one
    assert module.generate(PROMPTS, seed=1) == one
    assert module.generate(PROMPTS, seed=2) != one


@pytest.mark.parametrize("temperature", [0, 1])
def test_how_many_prompts_stand_side_by_side_does_not_matter(temperature):
    module = sure()
    responses = [
        module.generate(PROMPTS, {"temperature": temperature, "max_new_tokens": 8}, batch_size=size)
        for size in (1, 3, 9)
    ]
    assert responses[0] == responses[1] == responses[2]
    assert len(set(responses[0])) > 1


@pytest.mark.invariant(2)
def test_greedy_text_is_that_of_transformers_prompt_by_prompt():
    module = sure()
    responses = module.generate(PROMPTS, {"temperature": 0, "max_new_tokens": 8})
    model, tokenizer = network(tiny_gpt2()), word_tokenizer()
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert response == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def test_text_is_written_without_dropout_and_training_goes_on_with_it():
    module = sure()
    module.configure_model()
    assert module.policy.training
    greedy = {"temperature": 0, "max_new_tokens": 8}
    assert module.generate(PROMPTS, greedy) == sure(disable_dropout=True).generate(PROMPTS, greedy)
    assert module.policy.training
    module.eval()
    module.generate(PROMPTS, greedy)
    assert not module.policy.training


def test_the_modules_own_sampling_holds_unless_it_is_changed():
    module = module_of(PPOModule, network(tiny_gpt2()), sampling={"max_new_tokens": 3, "min_new_tokens": 3})
    assert {len(response.split()) for response in module.generate(["a"] * 8)} <= {2, 3}
    longer = module.generate(["a"] * 8, {"max_new_tokens": 20, "min_new_tokens": 10})
    assert min(len(response.split()) for response in longer) > 6


def test_chat_messages_go_through_the_template():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "s {{ messages[0]['content'] }}{% if add_generation_prompt %} t{% endif %}"
    module = sft(network(tiny_gpt2()), tokenizer=tokenizer)
    greedy = {"temperature": 0, "max_new_tokens": 8}
    chat = module.generate([[{"role": "user", "content": "a b"}], "c"], greedy)
    assert chat == module.generate(["s a b t", "c"], greedy)


def test_no_prompts_have_no_responses():
    assert sft().generate([]) == []


def test_a_prompt_alone_is_no_list_of_prompts():
    with pytest.raises(TypeError, match=r"`prompts='a b'` must be a list of prompts: write \['a b'\]"):
        sft().generate("a b")


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_data_gets_the_tokenizer_and_the_room_that_a_response_leaves():
    module = module_of(PPOModule, sampling={"max_new_tokens": 5})
    data = PromptDataModule(PROMPTS, batch_size=4)
    bare_trainer(max_epochs=1).fit(module, datamodule=data)
    assert data.tokenizer is module.tokenizer
    assert data.max_tokens == POSITIONS - 5
    rows = ConversationDataModule(PROMPTS, batch_size=4)
    bare_trainer(max_epochs=1).fit(sft(), datamodule=rows)
    assert rows.max_tokens == POSITIONS


def groups_of(module):
    module.trainer = bare_trainer(max_epochs=1)
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    return {group["name"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}


def test_policy_and_value_head_are_groups_of_one_optimizer():
    module = module_of(PPOModule)
    sizes = groups_of(module)
    assert list(sizes) == ["policy", "value"]
    assert sizes["policy"] == sum(p.numel() for p in network(tiny_gpt2()).parameters())
    assert sizes["value"] == 16 * 32 + 32 + 32 + 1
    assert groups_of(sft()) == {"policy": sizes["policy"]}


def test_what_is_frozen_is_in_no_group():
    module = module_of(PPOModule)
    module.configure_model()
    module.policy.decoder.requires_grad_(False)
    assert list(groups_of(module)) == ["value"]


def test_the_seed_is_what_seed_everything_set_unless_it_is_given():
    L.seed_everything(5, verbose=False)
    assert (sft().seed, sft(seed=3).seed) == (5, 3)
    assert sft().hparams["seed"] == 5
