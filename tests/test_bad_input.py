"""What users get wrong: every message names the argument, the value it got, and what would do."""

import functools
import re
from datetime import timedelta

import pytest
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from transformers import BertConfig, GPT2Model, T5Config

from lightning_rlhf import (
    ConversationDataModule,
    ModelSpec,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    SFTModule,
)
from lightning_rlhf.batches import PromptBatch
from lightning_rlhf.data.tokens import padded
from tests.networks import ARCHITECTURES, POSITIONS, network, tiny_gpt2, word_tokenizer
from tests.training import PROMPTS, bare_trainer, fit, module_of

LONG = " ".join("abcdefghij" * 6)  # 60 tokens: with a response of up to six, more than the model's 64 positions


def complains(message, error=ValueError):
    return pytest.raises(error, match=re.escape(message))


def ppo(*args, **arguments):
    return module_of(PPOModule, *args, **arguments)


def no_score(prompts, responses):
    raise AssertionError("it must not come to that")


# --- data -------------------------------------------------------------------------------------------------------------


DATA = [(PromptDataModule, "prompts"), (ConversationDataModule, "rows"), (PreferenceDataModule, "preferences")]


@pytest.mark.parametrize(("data", "name"), DATA)
def test_no_rows(data, name):
    with complains(f"`{name}` is empty: give at least one row."):
        data([])


@pytest.mark.parametrize(("data", "name"), DATA)
def test_a_file_that_is_missing(data, name):
    with complains(f"`{name}='data/missing.jsonl'`: there is no such file (looked in ", FileNotFoundError):
        data("data/missing.jsonl")


def test_a_prompt_that_is_too_long_is_named_before_anything_is_written():
    room = POSITIONS - 6
    with complains(f"`prompts[1]` has 60 tokens, and the model has room for {room}: shorten it or leave it out, as "):
        fit(ppo(reward=no_score), prompts=["a", LONG, "b"])


def test_a_text_that_is_too_long_is_named_before_anything_is_learnt():
    data = ConversationDataModule(["a", f"{LONG} a b c d"])
    with complains(f"`rows[1]` has 65 tokens, and the model has room for {POSITIONS}: shorten it or leave it out, as "):
        bare_trainer(max_epochs=1).fit(SFTModule(tiny_gpt2(), tokenizer=word_tokenizer()), datamodule=data)


TOO_LONG = (
    "`prompts`: number 1 of the batch has 60 tokens, which with `max_new_tokens=6` is more than the policy's 64 "
    "positions: shorten it or leave it out."
)


def test_a_prompt_that_is_too_long_through_a_loader_of_ones_own():
    def collate(prompts):
        ids = [word_tokenizer()(prompt)["input_ids"] for prompt in prompts]
        tokens, mask = padded(ids, 0, "left")
        return PromptBatch(prompt_tokens=tokens, prompt_mask=mask, prompts=prompts)

    with complains(TOO_LONG):
        bare_trainer(max_epochs=1).fit(ppo(reward=no_score), DataLoader(["a", LONG], batch_size=2, collate_fn=collate))


def test_a_prompt_that_is_too_long_to_be_answered():
    module = ppo()
    with complains(TOO_LONG):
        module.generate(["a", LONG])
    module.generate(["a", LONG], {"max_new_tokens": 4})


def test_a_prompt_that_is_no_text():
    with complains("`prompts[1]`: `prompt=3` must be text, or a list of chat messages"):
        fit(ppo(reward=no_score), prompts=["a", 3])
    with complains("`prompt=3` must be text, or a list of chat messages"):
        ppo().generate([3])


def test_chat_messages_for_a_tokenizer_without_a_template():
    chat = [{"role": "user", "content": "a"}]
    with complains("`prompts[0]`: `prompt` is a list of chat messages, and the tokenizer has no chat template: set"):
        fit(ppo(reward=no_score), prompts=[chat])


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(39)
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], "`reward` 'cats' returned 2 scores for 3 responses: it must return one for each, in order."),
        ([1.0, float("nan"), 1.0], "`reward` 'cats' gave nan for response 1 ("),
        ([1.0, 1.0, float("inf")], "`reward` 'cats' gave inf for response 2 ("),
        ([None, 1.0, 1.0], "`reward` 'cats' gave None for response 0 ("),
        (None, "`reward` 'cats' returned None: it must return a list with one score per response."),
    ],
)
def test_a_reward_that_does_not_fit(scores, message):
    def cats(prompts, responses):
        return scores

    with complains(message):
        fit(ppo(reward=cats), prompts=["a", "b", "c"])


def test_a_reward_that_cannot_be_imported():
    with complains("`reward='my_reward.score'` must be a callable or the dotted name of one that can be imported"):
        ppo(reward="my_reward.score")


# --- modules ----------------------------------------------------------------------------------------------------------


def test_an_unknown_argument():
    with complains("`clip_rnage=0.1` is no argument of PPOModule: did you mean `clip_range`?", TypeError):
        ppo(clip_rnage=0.1)
    with complains("`kl_coeff=0.1` is no argument of SFTModule: it takes ", TypeError):
        SFTModule(tiny_gpt2(), kl_coeff=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_epochs": 0}, "`num_epochs=0` must be at least 1."),
        ({"minibatch_size": 0}, "`minibatch_size=0` must be at least 1."),
        ({"micro_batch_size": 0}, "`micro_batch_size=0` must be at least 1."),
        ({"micro_batch_tokens": 0}, "`micro_batch_tokens=0` must be at least 1."),
        (
            {"micro_batch_tokens": 64, "micro_batch_size": 2},
            "`micro_batch_size=2` and `micro_batch_tokens=64` say how much a backward pass takes: leave one",
        ),
        ({"importance_cap": 0.0, "recompute_logprobs": True}, "`importance_cap=0.0` must be positive, or None"),
        ({"importance_cap": 2.0}, "`importance_cap=2.0` compares the sampler with the pass that trains: set"),
        ({"responses_per_prompt": 0}, "`responses_per_prompt=0` must be at least 1."),
        ({"averaging": "mean"}, "`averaging='mean'` must be 'tokens', 'responses' or 'length'."),
        ({"max_grad_norm": 0.0}, "`max_grad_norm=0.0` must be positive, or None for no limit."),
        ({"target_kl": -1.0}, "`target_kl=-1.0` must be positive, or None for no limit."),
        ({"reward_clip": 0.0}, "`reward_clip=0.0` must be positive, or None to clip nothing."),
        ({"reward_scaling": "std"}, "`reward_scaling='std'` must be 'running', 'first' or None."),
        ({"gamma": 1.5}, "`gamma=1.5` must lie between 0 and 1."),
        ({"gae_lambda": -0.1}, "`gae_lambda=-0.1` must lie between 0 and 1."),
        ({"dual_clip": 0.5}, "`dual_clip=0.5` must be above 1, or None: it bounds a ratio from above."),
        ({"trunk_gib": -1.0}, "`trunk_gib=-1.0` must not be negative; 0 keeps nothing."),
        ({"reward": []}, "`reward=[]` names no reward: give at least one callable."),
    ],
)
def test_a_number_or_name_out_of_range(arguments, message):
    with complains(message):
        ppo(**arguments)


@pytest.mark.invariant(22)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl_in": "both"}, "`kl_in='both'` must be 'reward' or 'loss': the divergence is charged once."),
        ({"kl_estimator": "k3"}, "`kl_estimator='k3'` goes with `kl_in='loss'`: the reward is charged k1."),
        ({"kl_in": "loss"}, "`kl_estimator='k1'` does nothing with `kl_in='loss'`, since its expected gradient is 0: "),
        ({"kl_coef": -0.1}, "`kl_coef=-0.1` must not be negative: it is the price of leaving the reference."),
        ({"kl_coef": float("nan")}, "`kl_coef=nan` must not be negative"),
        ({"kl_coef": 0, "reference": "sft"}, "`reference='sft'` would be read by nothing at `kl_coef=0`: leave one"),
    ],
)
def test_a_divergence_that_nothing_would_read_or_two_things_would(arguments, message):
    with complains(message):
        ppo(**arguments)


@pytest.mark.parametrize(
    ("sampling", "error", "message"),
    [
        ({"max_tokens": 3}, TypeError, "`sampling` knows no ['max_tokens']: it takes ['max_new_tokens', "),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens=0` must be at least 1."),
        ({"temperature": -1}, ValueError, "`temperature=-1` must be positive, or 0 for the likeliest token."),
        ({"temperature": 0}, ValueError, "`sampling.temperature=0` takes the likeliest token, on which nothing can be"),
        ({"top_p": 0.0}, ValueError, "`top_p=0.0` must lie in (0, 1], or be None for all tokens."),
    ],
)
def test_a_sampling_that_cannot_be(sampling, error, message):
    with complains(message, error):
        ppo(sampling=sampling)
    if sampling.get("temperature") != 0:
        with complains(message, error):
            ppo().generate(["a"], sampling)


def test_one_prompt_where_a_list_is_wanted():
    with complains("`prompts='a b'` must be a list of prompts: write ['a b'].", TypeError):
        ppo().generate("a b")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr_scheduler": "square"}, ValueError, "`lr_scheduler='square'` must be one of ['constant', 'cosine', "),
        ({"optimizer": "adamw"}, ValueError, "`optimizer='adamw'` must be a callable or the dotted name of one"),
        ({"optimizer": {"lr": 1.0}}, TypeError, "`optimizer={'lr': 1.0}` must be a factory, or a dict with 'class_"),
        (
            {"lr_scheduler": functools.partial(StepLR, step_size=1), "warmup_updates": 3},
            ValueError,
            "`warmup_updates=3` goes with a named `lr_scheduler`: a factory has its own.",
        ),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_made(arguments, error, message):
    with complains(message, error):
        fit(ppo(reward=no_score, **arguments))


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "runs/ppo/last"])
def test_a_folder_that_is_missing(name):
    message = f"`model='{name}'` looks like a folder, and there is none: check the path."
    with complains(message):
        PPOModule(name, reward=no_score).generate(["a"])
    with complains(message):
        fit(PPOModule(name, reward=no_score))
    with complains(message):
        ppo(reference=name).configure_model()


@pytest.mark.parametrize("policy", [tiny_gpt2(), network(tiny_gpt2()), ModelSpec(tiny_gpt2())])
def test_a_model_without_a_name_needs_a_tokenizer(policy):
    with complains("`tokenizer=None` must be given where the model is a config or an object: pass one."):
        SFTModule(policy).generate(["a"])


def test_what_is_no_decoder():
    with complains("`policy=T5ForConditionalGeneration` has no start token, behind which a response would begin: set "):
        ppo(T5Config(d_model=8, num_layers=1, num_heads=1, d_ff=8)).configure_model()
    with complains("`model=GPT2Model` has no language-modelling head: load it as ...ForCausalLM, or as "):
        ppo(GPT2Model(tiny_gpt2())).configure_model()
    with complains("`model=3` must be a hub name, a folder, a transformers config or a PreTrainedModel.", TypeError):
        ppo(3).configure_model()


@pytest.mark.filterwarnings("ignore:If you want to use `BertLMHeadModel`")
def test_a_model_that_looks_ahead():
    config = BertConfig(vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with complains("looks at tokens that come later, so that it cannot write"):
        ppo(config).configure_model()


def test_a_type_that_weights_cannot_have():
    with complains("`dtype='int8'` must be a floating-point type such as 'float32' or 'bfloat16'."):
        ppo(ModelSpec(tiny_gpt2(), dtype="int8")).configure_model()


def config_without_special_tokens():
    config = tiny_gpt2(initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


def test_a_tokenizer_without_eos():
    with complains("`tokenizer` has no EOS token, so that no response could end: set `tokenizer.eos_token`"):
        ppo(config_without_special_tokens(), tokenizer=word_tokenizer(eos=False)).generate(["a"])


@pytest.mark.invariant(3)
def test_a_tokenizer_without_pad_works_and_eos_fills():
    tokenizer = word_tokenizer(pad=False)
    module = ppo(config_without_special_tokens(), tokenizer=tokenizer, sampling={"max_new_tokens": 20})
    experience = fit(module, iterations=2).experiences[0]
    assert experience.prompt_tokens[~experience.prompt_mask].unique().tolist() == [tokenizer.eos_token_id]
    ended = ~experience.truncated
    lengths = experience.response_mask.sum(1)
    last = experience.response_tokens.gather(1, lengths[:, None] - 1).squeeze(1)
    assert ended.any()
    assert last[ended].unique().tolist() == [tokenizer.eos_token_id]
    rows = ConversationDataModule(["a b c", "d"])
    bare_trainer(max_epochs=1).fit(SFTModule(tiny_gpt2(), tokenizer=tokenizer), datamodule=rows)


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"gradient_clip_val": 0.5},
            "`Trainer(gradient_clip_val=0.5)` does not reach the updates of PPOModule: give it `max_grad_norm=0.5` "
            "instead.",
        ),
        (
            {"accumulate_grad_batches": 4},
            "`Trainer(accumulate_grad_batches=4)` does not reach the updates of PPOModule: give it a "
            "`micro_batch_size` smaller than `minibatch_size` instead.",
        ),
    ],
)
def test_flags_that_cannot_reach_updates_by_hand(flags, message):
    with complains(message):
        fit(ppo(reward=no_score), **flags)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            ModelCheckpoint(train_time_interval=timedelta(minutes=5)),
            "`ModelCheckpoint(train_time_interval=datetime.timedelta(seconds=300))` would never save PPOModule: use "
            "`lightning_rlhf.callbacks.RolloutCheckpoint(train_time_interval=...)`.",
        ),
        (
            GradientAccumulationScheduler({0: 2}),
            "`GradientAccumulationScheduler` does not work with the updates of PPOModule: give the module a "
            "`micro_batch_size` smaller than `minibatch_size`.",
        ),
        (
            StochasticWeightAveraging(0.1),
            "`StochasticWeightAveraging` does not work with the updates of PPOModule: leave it out, and let "
            "`lr_scheduler` take the learning rate down.",
        ),
        (LearningRateFinder(), "`LearningRateFinder` does not work with the updates of PPOModule: leave it out, and"),
        (BatchSizeFinder(), "`BatchSizeFinder` does not work with the updates of PPOModule: leave it out: memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_of_lightnings_that_take_a_batch_for_an_update(callback, message):
    with complains(message):
        fit(ppo(reward=no_score), callbacks=[callback], enable_checkpointing=isinstance(callback, ModelCheckpoint))


@pytest.mark.parametrize("make", [ppo, lambda: SFTModule(tiny_gpt2(), tokenizer=word_tokenizer())], ids=["PPO", "SFT"])
def test_fsdp1(monkeypatch, make):
    trainer = bare_trainer(max_epochs=1)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", FSDPStrategy())
    module = make()
    module.trainer = trainer
    with complains(
        "`Trainer(strategy='fsdp')` is FSDP1, which cannot train these modules: use `strategy='rlhf_fsdp2'`"
    ):
        module.configure_callbacks()


def test_data_before_there_is_a_tokenizer():
    with complains("`tokenizer` is not set: fit with an RLHF module, which brings its own, or set `datamodule.token"):
        PromptDataModule(["a"]).train_dataloader()


def test_data_that_another_module_learns_from_is_refused():
    conversations = ConversationDataModule([{"prompt": "a", "response": "b"}], batch_size=1)
    with pytest.raises(TypeError, match="yields ImitationBatch, and PPOModule learns from PromptBatch: use PromptData"):
        bare_trainer(max_epochs=1).fit(module_of(PPOModule), datamodule=conversations)
    module = SFTModule(tiny_gpt2(), tokenizer=word_tokenizer())
    with pytest.raises(
        TypeError, match="yields PromptBatch, and SFTModule learns from ImitationBatch: use Conversation"
    ):
        bare_trainer(max_epochs=1).fit(module, datamodule=PromptDataModule(["a b"], batch_size=1))


def saved(folder, module, data, **flags):
    """A checkpoint of a short run."""
    trainer = bare_trainer(max_epochs=1, **flags)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "other.ckpt")
    return folder / "other.ckpt"


def test_a_checkpoint_of_another_kind_of_module_is_refused(tmp_path):
    texts = ConversationDataModule(["a b c"])
    of_sft = saved(tmp_path, SFTModule(tiny_gpt2(), tokenizer=word_tokenizer()), texts)
    for coefficient in (0.0, 0.1):  # without a reference, and with one
        with complains(
            "`ckpt_path` is a checkpoint of SFTModule, and PPOModule cannot go on from it: to begin with its weights, "
            "export them with `save_pretrained` and pass the folder as `policy`."
        ):
            module = module_of(PPOModule, kl_coef=coefficient)
            bare_trainer(max_epochs=2).fit(module, datamodule=PromptDataModule(PROMPTS), ckpt_path=of_sft)
    of_ppo = saved(tmp_path, module_of(PPOModule), PromptDataModule(PROMPTS))
    with complains("`ckpt_path` is a checkpoint of PPOModule, and SFTModule cannot go on from it: to begin with"):
        module = SFTModule(tiny_gpt2(), tokenizer=word_tokenizer())
        bare_trainer(max_epochs=2).fit(module, datamodule=texts, ckpt_path=of_ppo)


def test_a_checkpoint_that_no_module_of_ours_wrote_is_refused(tmp_path):
    path = saved(tmp_path, BoringModel(), None)
    with complains("`ckpt_path` was not written by a module of lightning_rlhf, and PPOModule cannot go on from it"):
        bare_trainer(max_epochs=2).fit(module_of(PPOModule), datamodule=PromptDataModule(PROMPTS), ckpt_path=path)


@pytest.mark.parametrize(
    ("policy", "difference"),
    [
        (tiny_gpt2(width=32), "`policy.decoder.model.transformer.wte.weight` is (24, 32) here and (24, 16) there"),
        (tiny_gpt2(layers=3), "it has `policy.decoder.model.transformer.h.2.ln_1.weight`, and the checkpoint does not"),
        (tiny_gpt2(layers=1), "the checkpoint has `policy.decoder.model.transformer.h.1.ln_1.weight`, and it does not"),
        (ARCHITECTURES["llama"](), "it has `policy.decoder.model.model.embed_tokens.weight`, and the checkpoint does"),
    ],
    ids=["width", "more layers", "fewer layers", "architecture"],
)
def test_a_checkpoint_of_another_policy_is_refused(tmp_path, policy, difference):
    path = saved(tmp_path, ppo(), PromptDataModule(PROMPTS))
    with complains(f"`policy` is not the network that `ckpt_path` holds: {difference}") as caught:
        bare_trainer(max_epochs=2).fit(ppo(policy), datamodule=PromptDataModule(PROMPTS), ckpt_path=path)
    assert len(str(caught.value)) < 300
    assert str(caught.value).endswith("or begin a new run without `ckpt_path`.")


def test_a_checkpoint_of_a_policy_of_which_something_else_trained_is_refused(tmp_path):
    class Partly(PPOModule):
        def build(self):
            super().build()
            self.policy.decoder.model.transformer.wte.requires_grad_(False)

    path = saved(tmp_path, ppo(), PromptDataModule(PROMPTS))
    with complains("holds: 31 of its parameters train, and 32 did before. Resume with the model that the run began"):
        module = module_of(Partly)
        bare_trainer(max_epochs=2).fit(module, datamodule=PromptDataModule(PROMPTS), ckpt_path=path)


def test_no_prompts_at_a_time_is_refused():
    with pytest.raises(ValueError, match="`batch_size=0` must be at least 1"):
        module_of(PPOModule).generate(["a"], batch_size=0)


def test_nothing_that_trains():
    module = SFTModule(ModelSpec(tiny_gpt2(), num_layers_unfrozen=0), tokenizer=word_tokenizer())
    with complains("`num_layers_unfrozen=0` leaves SFTModule nothing to train: unfreeze a block."):
        bare_trainer(max_epochs=1).fit(module, datamodule=ConversationDataModule(["a b"]))


def test_a_reference_that_is_to_be_frozen_in_part():
    with complains("`reference.num_layers_unfrozen=1` would be read by nothing: a reference is frozen whole."):
        ppo(reference=ModelSpec(tiny_gpt2(), num_layers_unfrozen=1))
