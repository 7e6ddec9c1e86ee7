"""The modules on encoder-decoders, of whose halves they know nothing."""

import functools
import logging
import re

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM

from lightning_rlhf import ConversationDataModule, GRPOModule, ModelSpec, PPOModule, PromptDataModule, SFTModule
from lightning_rlhf.models.adapter_reference import AdapterReference
from tests.networks import ENCODER_DECODERS, EOS, POSITIONS, network, with_soft_attention, word_tokenizer
from tests.training import PROMPTS, bare_trainer, fit, module_of, sgd, weights

BOS = 21
ROWS = [
    {"prompt": "a b c", "response": "c b a"},
    {"prompt": "d", "response": "d"},
    {"prompt": "e f", "response": "f e"},
    {"prompt": "b a a c", "response": "c a a b k"},
]


def like_t5():
    """Ends every text."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    return tokenizer


def like_bart():
    """Begins and ends every text; its BOS is the last word."""
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "v"
    special = [("<eos>", EOS), ("v", BOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="v $A <eos>", special_tokens=special)
    return tokenizer


TOKENIZERS = {"t5": like_t5, "bart": like_bart}


def network_of(name, **more):
    return network(ENCODER_DECODERS[name](**more))


def online(cls, name, num_layers_unfrozen=-1, model=None, **arguments):
    policy = ModelSpec(network_of(name) if model is None else model, num_layers_unfrozen=num_layers_unfrozen)
    return module_of(cls, policy, tokenizer=TOKENIZERS.get(name, word_tokenizer)(), **arguments)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prompt"), [("t5", [0, 1, 2, EOS]), ("bart", [BOS, 0, 1, 2, EOS])])
def test_prompts_have_all_special_tokens_and_responses_their_end_alone(name, prompt):
    imitator = SFTModule(network_of(name), tokenizer=TOKENIZERS[name](), optimizer=sgd)
    batches, read = [], []
    data = ConversationDataModule(ROWS, batch_size=4, shuffle=False)
    collate = data.collate
    data.collate = lambda items: batches.append(collate(items)) or batches[-1]
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(imitator, datamodule=data)
    (batch,) = batches
    assert batch.prompt_tokens[0][batch.prompt_mask[0]].tolist() == prompt
    assert batch.response_tokens[0][batch.response_mask[0]].tolist() == [2, 1, 0, EOS]

    module = online(PPOModule, name)
    seen = fit(module, iterations=1, prompts=["a b c"])
    assert seen.experiences[0].prompt_tokens.tolist() == [prompt]
    begin = module.policy.begin
    module.policy.begin = lambda tokens, mask: read.append(tokens.tolist()) or begin(tokens, mask)
    module.generate(["a b c"])
    bare_trainer().validate(module, torch.utils.data.DataLoader(["a b c"]), verbose=False)
    assert read == [[prompt]] * 2


def test_a_text_without_a_prompt_is_refused_since_an_encoder_would_have_nothing_to_read():
    module = SFTModule(network_of("t5"), tokenizer=like_t5())
    with pytest.raises(ValueError, match=r"`rows\[1\]`: `text` has no prompt, .*: give 'prompt' and 'response'"):
        bare_trainer(max_epochs=1).fit(module, datamodule=ConversationDataModule([ROWS[0], "a b"]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a " * 63, "response": "b"}, "has 65 tokens, and the model has room for 64"),
        ({"prompt": "a", "response": "b " * 63}, "has 64 tokens of response, and the model has room for 63"),
    ],
)
def test_each_half_has_its_own_room(row, message):
    fits = {"prompt": "a " * 62, "response": "b " * 62}

    def learn(rows):
        module = SFTModule(network_of("bart"), tokenizer=like_bart(), optimizer=sgd)
        bare_trainer(max_epochs=1).fit(module, datamodule=ConversationDataModule(rows))

    learn([fits])
    with pytest.raises(ValueError, match=message):
        learn([fits, row])
    module = online(PPOModule, "bart")
    with pytest.raises(ValueError, match=rf"`prompts\[0\]` has 65 tokens, and the model has room for {POSITIONS}"):
        fit(module, prompts=["a " * 63])
    fit(module, iterations=1, prompts=["a " * 62])


# --- imitation --------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(3, 7)
@pytest.mark.parametrize("name", ["t5", "mt5", "bart", "pegasus", "marian"])
def test_imitation_learns_what_transformers_would(name):
    """Its own loss on labels, one row after the other, and plain SGD."""
    tokenizer = TOKENIZERS.get(name, word_tokenizer)()
    model = network_of(name, **dict.fromkeys(("dropout", "dropout_rate"), 0.0))
    module = SFTModule(model, tokenizer=tokenizer, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    data = ConversationDataModule(ROWS, validation=ROWS, batch_size=4, shuffle=False)
    trainer = bare_trainer(max_epochs=1, num_sanity_val_steps=0)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total, count = torch.zeros(()), 0
    for row in ROWS:
        labels = torch.tensor([*tokenizer(row["response"], add_special_tokens=False)["input_ids"], EOS])
        prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        total = total + model(input_ids=prompt, labels=labels[None]).loss * len(labels)
        count += len(labels)
    (total / count).backward()
    optimizer.step()
    assert before["val/policy/loss"] == pytest.approx(float(total.detach()) / count, abs=1e-5)
    expected = dict(model.named_parameters())
    for key, parameter in module.policy.decoder.model.named_parameters():
        torch.testing.assert_close(parameter, expected[key], rtol=0, atol=1e-6, msg=key)


# --- learning online --------------------------------------------------------------------------------------------------


@pytest.mark.invariant(9, 10, 14)
@pytest.mark.parametrize("num_layers_unfrozen", [-1, 1])
@pytest.mark.parametrize(
    ("cls", "name"), [*((PPOModule, name) for name in ENCODER_DECODERS), (GRPOModule, "t5"), (GRPOModule, "bart")]
)
def test_without_learning_nothing_moves_and_the_ratio_is_one(cls, name, num_layers_unfrozen):
    module = online(cls, name, num_layers_unfrozen, optimizer=functools.partial(torch.optim.SGD, lr=0.0), kl_coef=0.1)
    seen = fit(module, iterations=1, prompts=PROMPTS[:4])
    metrics = seen.metrics[0]
    assert metrics["policy/sampler_gap"] < 1e-5
    assert metrics["policy/clip_fraction"] == 0.0
    assert metrics["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    assert seen.experiences[0].trunk is None if num_layers_unfrozen == -1 else seen.experiences[0].trunk is not None
    assert all(abs(value) < float("inf") for value in metrics.values())


@pytest.mark.invariant(12, 30)
@pytest.mark.parametrize(("cls", "name"), [(PPOModule, "t5"), (GRPOModule, "bart")])
def test_neither_kept_states_nor_micro_batches_change_weights(cls, name):
    deep = {"t5": {"num_decoder_layers": 3}, "bart": {"decoder_layers": 3}}[name]
    found = []
    for more in ({}, {"trunk_gib": 0.0}, {"micro_batch_size": 1}, {"micro_batch_tokens": 20, "trunk_gib": 0.0}):
        module = online(cls, name, 1, network_of(name, **deep), kl_coef=0.1, minibatch_size=64, **more)
        seen = fit(module, iterations=2, prompts=PROMPTS[:4])
        assert (seen.experiences[0].trunk is None) == ("trunk_gib" in more)
        found.append(weights(module))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)
    module = online(cls, name, 1, network_of(name, **deep))
    module.configure_model()
    before = weights(module)
    assert float((found[0] - before).abs().max()) > 1e-3


@pytest.mark.invariant(18)
@pytest.mark.parametrize("name", ["t5", "t5_gated", "mt5", "bart", "pegasus"])
def test_an_export_is_a_folder_that_transformers_reads_alone(name, tmp_path):
    model = network_of(name)
    model.generation_config.forced_bos_token_id = 5
    module = online(PPOModule, name, model=model)
    fit(module, iterations=1, prompts=PROMPTS[:4])
    module.save_pretrained(tmp_path / "out")
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    own = module.policy.decoder.model.eval()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        logits = [each(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits for each in (saved, own)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert not torch.equal(saved.lm_head.weight, model.lm_head.weight)
    assert 0.1 in (getattr(saved.config, "dropout", None), getattr(saved.config, "dropout_rate", None))
    again = online(PPOModule, name, model=str(tmp_path / "out"))
    again.configure_model()
    assert again.policy.decoder.prefix == module.policy.decoder.prefix
    assert again.generate(["a b"], {"temperature": 0}) == module.generate(["a b"], {"temperature": 0})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # between PEFT and transformers
@pytest.mark.invariant(9, 10, 13, 18)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_adapter_learns_in_both_halves_and_peft_reads_it(name, tmp_path):
    network_of(name).save_pretrained(tmp_path / "model")
    spec = ModelSpec(tmp_path / "model", adapter={"peft_type": "LORA", "r": 2, "target_modules": "all-linear"})
    module = module_of(PPOModule, spec, tokenizer=TOKENIZERS[name](), kl_coef=0.1)
    module.configure_model()
    assert isinstance(module.reference, AdapterReference)
    before = {key: parameter.detach().clone() for key, parameter in module.policy.named_parameters()}
    seen = fit(module, iterations=2, prompts=PROMPTS[:4])
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    assert seen.metrics[0]["policy/sampler_gap"] < 1e-5
    assert abs(seen.metrics[1]["kl/sequence"]) > 1e-4
    changed = {key for key, parameter in module.policy.named_parameters() if not torch.equal(parameter, before[key])}
    assert all(".lora_" in key or key.startswith("value_head.") for key in changed)
    assert {half for half in ("encoder.", "decoder.block", "decoder.layers") for key in changed if half in key} == {
        "encoder.",
        "decoder.block" if name == "t5" else "decoder.layers",
    }

    module.save_pretrained(tmp_path / "adapter")
    module.save_pretrained(tmp_path / "merged", merge_adapter=True)
    by_peft = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        own, *others = (
            each(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits
            for each in (module.policy.decoder.model.eval(), by_peft, merged)
        )
    for other in others:
        torch.testing.assert_close(other, own, rtol=0, atol=1e-5)


@pytest.mark.invariant(9, 10, 13)
@pytest.mark.parametrize(("name", "more"), [("t5", {"d_kv": 16, "d_ff": 64}), ("bart", {})])
def test_an_adapter_on_quantised_halves_is_merged_into_what_they_are(name, more, tmp_path, caplog):
    # Weights are rounded in groups of 64.
    with_soft_attention(network_of(name, d_model=64, **more)).save_pretrained(tmp_path / "model")
    lora = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
    spec = ModelSpec(tmp_path / "model", adapter=lora, quantization="nf4")
    module = module_of(PPOModule, spec, tokenizer=TOKENIZERS[name](), kl_coef=0.1)
    seen = fit(module, iterations=1, prompts=PROMPTS[:4])
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=2e-5)
    assert seen.metrics[0]["policy/sampler_gap"] < 1e-5
    with caplog.at_level(logging.INFO):
        module.save_pretrained(tmp_path / "merged", merge_adapter=True)
    (said,) = re.findall(r"differ from those of the quantised one by (\S+) at most", caplog.text)
    assert float(said) < 1e-4
    tokens = torch.arange(12).reshape(2, 6)
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = [
            each(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits
            for each in (merged, module.policy.decoder.model.eval())
        ]
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5)


def test_what_is_written_can_be_measured_and_predicted():
    module = online(PPOModule, "bart", metric_fn=lambda prompts, responses: {"of": [len(p) for p in prompts]})
    data = PromptDataModule(validation=PROMPTS, predict=PROMPTS, batch_size=4)
    (measured,) = bare_trainer().validate(module, datamodule=data, verbose=False)
    assert measured["val/of"] == pytest.approx(sum(map(len, PROMPTS)) / len(PROMPTS))
    rows = [row for batch in bare_trainer().predict(module, datamodule=data) for row in batch]
    assert [row["prompt"] for row in rows] == PROMPTS
