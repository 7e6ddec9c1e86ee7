"""A reward model that is an adapter beside the policy's, on the one model of both."""

import functools
import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from lightning_rlhf import GRPOModule, ModelSpec, PPOModule, PromptDataModule, RewardModel, RewardModule
from lightning_rlhf.models.adapters import VALUE
from tests.networks import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    ENCODERS,
    EOS,
    network,
    piece_tokenizer,
    tiny_gpt2,
    word_tokenizer,
)
from tests.training import PROMPTS, Seen, bare_trainer, fit, module_of

TEXTS = ["a b c", "d", "e f g a", "b"], ["c d", "a b e f", "g", "k l m"]
ROWS = [[0, 1, 2, 2, 3, EOS], [3, 0, 1, 4, 5, EOS], [4, 5, 6, 0, 6, EOS], [1, 10, 11, 12, EOS]]
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # which PEFT then mends by itself
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # between PEFT and transformers
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

KINDS = {
    "lora": {"peft_type": "LORA", "r": 2, "init_lora_weights": False},
    "dora": {"peft_type": "LORA", "r": 2, "use_dora": True, "init_lora_weights": False},
    "ia3": {"peft_type": "IA3", "init_ia3_weights": False},
}
LORA = KINDS["lora"]


def judge_of(base, adapter=None, tokenizer=None, **spec):
    """A reward model on a model, as it is after training."""
    module = RewardModule(ModelSpec(base, adapter=adapter or LORA, **spec), tokenizer=tokenizer, seed=3)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    module.mean, module.std = 0.3, 0.7
    return module


def written(config, folder, seed=0):
    network(config, seed=seed).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model, a reward model's adapter on it, and the same reward model whole."""
    base, judge, whole = (tmp_path_factory.mktemp(name) for name in ("base", "judge", "whole"))
    module = judge_of(written(tiny_gpt2(layers=3), base))
    module.save_pretrained(judge, merge_adapter=False)
    module.save_pretrained(whole)
    return base, judge, whole


def policy_on(base, adapter=None, **spec):
    return ModelSpec(base, adapter=adapter or {**LORA, "r": 3, "lora_dropout": 0.5}, **spec)


def nothing(prompts, responses):
    return [0.0] * len(responses)


def flags(module):
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


@pytest.mark.invariant(6, 13)
@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", "lora"), ("llama", "lora"), ("opt", "lora"), ("llama", "dora"), ("gpt2", "ia3")]
)
def test_it_scores_as_the_same_reward_model_does_by_itself(name, kind, tmp_path):
    base, adapter = written(ARCHITECTURES[name](), tmp_path / "base"), KINDS[kind]
    judge = judge_of(base, adapter)
    judge.save_pretrained(tmp_path / "judge", merge_adapter=False)
    judge.save_pretrained(tmp_path / "whole")
    policy = policy_on(base, adapter if kind == "ia3" else None)
    module = module_of(PPOModule, policy, tokenizer=None, critic="policy", reward=tmp_path / "judge", kl_coef=0.1)
    module.configure_model()
    module.train()
    before = flags(module)
    (reward,) = module.reward.models
    scores = torch.tensor(reward(*TEXTS))
    assert flags(module) == before
    assert module.policy.training
    assert_close(scores, torch.tensor(RewardModel(tmp_path / "whole")(*TEXTS)), rtol=0, atol=1e-5)
    assert_close(scores, torch.tensor(judge.score(*TEXTS)), rtol=0, atol=1e-5)
    by_peft = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "judge", num_labels=1).eval()
    for row, score in zip(ROWS, scores, strict=True):
        with torch.no_grad():
            logit = by_peft(torch.tensor([row])).logits[0, 0]
        assert float(score) == pytest.approx(float(logit - 0.3) / 0.7, abs=1e-5)
    assert scores.std() > 0.1


def test_it_scores_alike_on_a_quantised_model(wide_folders, tmp_path):
    judge = judge_of(wide_folders["llama"], quantization="nf4")
    judge.save_pretrained(tmp_path, merge_adapter=False)
    module = module_of(
        GRPOModule, policy_on(wide_folders["llama"], quantization="nf4"), reward=tmp_path, tokenizer=None
    )
    module.configure_model()
    assert module.reward.models[0](*TEXTS) == pytest.approx(judge.score(*TEXTS), abs=1e-5)
    module = module_of(GRPOModule, policy_on(wide_folders["llama"]), reward=tmp_path, tokenizer=None)
    with pytest.raises(ValueError, match="is an adapter of a model with quantization='nf4', and the policy's has None"):
        module.configure_model()


def test_an_adapter_that_peft_trained_scores_as_it_does_there(folders, tmp_path):
    base = folders[0]
    torch.manual_seed(1)
    classifier = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    peft = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)).eval()
    peft.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    module = module_of(PPOModule, policy_on(base), reward=RewardModel(tmp_path, reads="apart"), tokenizer=None)
    module.configure_model()
    for row, score in zip(ROWS, module.reward.models[0](*TEXTS), strict=True):
        with torch.no_grad():
            assert score == pytest.approx(float(peft(torch.tensor([row])).logits[0, 0]), abs=1e-5)


@pytest.mark.parametrize("cls", [PPOModule, GRPOModule])
def test_a_run_with_it_is_the_run_with_the_whole_reward_model_and_holds_the_model_once(cls, folders):
    base, judge, whole = folders
    more = {"critic": policy_on(base)} if cls is PPOModule else {"group_size": 2}
    runs = {}
    for name, reward in (("shared", judge), ("alone", whole)):
        rewards = [RewardModel(reward, name="judge"), (nothing, 0.5)]
        module = module_of(cls, policy_on(base), tokenizer=None, reward=rewards, kl_coef=0.1, **more)
        module.configure_model()
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        runs[name] = module, fit(module, iterations=2), before
    for shared, alone in zip(runs["shared"][1].metrics, runs["alone"][1].metrics, strict=True):
        assert {n: v for n, v in shared.items() if "time" not in n and "speed" not in n} == pytest.approx(
            {n: v for n, v in alone.items() if "time" not in n and "speed" not in n}, rel=1e-3, abs=1e-4
        )
    module, seen, before = runs["shared"]
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    model = module.policy.decoder.model
    size = sum(parameter.numel() for parameter in network(tiny_gpt2(layers=3)).parameters())
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) == size
    trained = {name for name, trains in flags(module).items() if trains}
    assert not any("reward_adapter" in name for name in trained)
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= trained
    for adapter in ("default", VALUE) if cls is PPOModule else ("default",):
        own = {name for name in trained if f".{adapter}." in name}
        assert len(changed & own) >= 0.8 * len(own) > 0
    held = {"default", "reference", "reward_adapter_0"} | ({VALUE} if cls is PPOModule else set())
    assert {name.split(".")[-2] for name, _ in model.named_parameters() if "lora_" in name} == held


@pytest.mark.invariant(36)
def test_no_checkpoint_holds_it_and_a_resumed_run_equals_an_uninterrupted_one(folders, tmp_path):
    base, judge, _ = folders
    data = {"prompts": PROMPTS, "batch_size": 6, "seed": 5}
    modules, seen = [], []
    for ckpt_path in (None, tmp_path / "epoch=0.ckpt"):
        module = module_of(PPOModule, policy_on(base), tokenizer=None, critic="policy", reward=str(judge), kl_coef=0.1)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        seen.append(Seen())
        trainer = bare_trainer(max_epochs=3, callbacks=[keep, seen[-1]], enable_checkpointing=True)
        trainer.fit(module, datamodule=PromptDataModule(**data), ckpt_path=ckpt_path)
        modules.append(module)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {name for name, trains in flags(modules[0]).items() if trains}
    assert saved["hyper_parameters"]["reward"] == str(judge)
    for later, expected in zip(seen[1].metrics, seen[0].metrics[1:], strict=True):
        assert all(later[n] == expected[n] for n in expected if not n.startswith(("time/", "speed/")))
    first, second = (dict(module.named_parameters()) for module in modules)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Which reward a run goes on with is the user's to say, as for any other.
    module = module_of(PPOModule, policy_on(base), tokenizer=None, critic="policy", kl_coef=0.1)
    trainer = bare_trainer(max_epochs=2)
    trainer.fit(module, datamodule=PromptDataModule(**data), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_the_policy_alone_is_exported(folders, tmp_path):
    base, judge, _ = folders
    module = module_of(PPOModule, policy_on(base), tokenizer=None, reward=judge)
    module.configure_model()
    module.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors" or path.is_dir()) == [
        "adapter_model.safetensors"
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(complaint, policy, reward, cls=PPOModule, **arguments):
    module = module_of(cls, policy, **{"tokenizer": None, "reward": reward, **arguments})
    with pytest.raises(ValueError, match=complaint):
        module.configure_model()


def test_policies_that_cannot_share_their_model_are_refused(folders, tmp_path):
    base, judge, _ = folders
    refused(
        "`reward=.*judge.* is an adapter, which shares the policy's model, and that is about to be trained", base, judge
    )
    other = written(tiny_gpt2(layers=3), tmp_path / "other", seed=1)
    refused("is an adapter of a model with model='.*base.*', and the policy's has '.*other'", policy_on(other), judge)
    refused("with dtype='float32', and the policy's has 'bfloat16'", policy_on(base, dtype="bfloat16"), judge)
    refused("with model='.*', and the policy's has None", policy_on(tiny_gpt2()), judge, tokenizer=word_tokenizer())
    t5 = written(ENCODER_DECODERS["t5"](), tmp_path / "t5")
    refused("T5ForConditionalGeneration has an encoder, whose policy and reward model read", policy_on(t5), judge)
    refused(
        "is an adapter of type LORA with `bias='none'`, and PEFT holds only .* is IA3",
        policy_on(base, KINDS["ia3"]),
        judge,
    )
    pissa = {"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa"}
    refused("The policy's adapter began with `init_lora_weights='pissa'`, which takes", policy_on(base, pissa), judge)


def test_an_adapter_that_reads_other_tokens_is_refused(folders, tmp_path):
    base, judge, _ = folders
    backwards = piece_tokenizer("vutsrqponmlkjihgfedcba", spaces=True)
    judge_of(base, tokenizer=backwards).save_pretrained(tmp_path, merge_adapter=False)
    refused("has another tokenizer: 'a' is its token 21, and the policy's 0", policy_on(base), tmp_path)
    module = module_of(PPOModule, policy_on(base), reward=judge, tokenizer=word_tokenizer(23, pad=False))
    module.configure_model()  # a PAD is not read


def test_folders_that_are_no_reward_models_are_refused(folders, tmp_path):
    base = folders[0]
    policy = module_of(PPOModule, policy_on(base), tokenizer=None)
    policy.save_pretrained(tmp_path / "policy")
    refused(
        "is an adapter with no head, where a reward model has one head with one", policy_on(base), tmp_path / "policy"
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(tmp_path / "three")
    word_tokenizer().save_pretrained(tmp_path / "three")
    refused(r"is an adapter with heads of \[3\] outputs, where a reward model", policy_on(base), tmp_path / "three")
    smaller = judge_of(written(tiny_gpt2(width=8), tmp_path / "small"))
    smaller.save_pretrained(tmp_path / "narrow", merge_adapter=False)
    (tmp_path / "narrow" / "reward.json").unlink()
    config = json.loads((tmp_path / "narrow" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "narrow" / "adapter_config.json").write_text(json.dumps(config))
    refused("(?s)`reward='.*narrow'` is not of this model: .*size mismatch", policy_on(base), tmp_path / "narrow")


def test_where_it_would_work_is_where_the_policy_is(folders):
    base, judge, _ = folders
    reward = RewardModel(judge, device="cpu")
    refused("`device='cpu'`: the reward model 'judge.*' is an adapter, which is where", policy_on(base), reward)
    refused(
        "`reward_in_background=True`: the reward model 'judge.*' is an adapter on the policy's",
        policy_on(base),
        judge,
        reward_in_background=True,
    )
    refused("`output='probability'`: the reward model", policy_on(base), RewardModel(judge, output="probability"))
    with pytest.raises(ValueError, match="`reward='judge.*'` is an adapter, which scores within an online module"):
        RewardModel(judge)(*TEXTS)


def test_what_no_policy_could_bear_is_not_written_as_an_adapter(tmp_path):
    save = functools.partial(RewardModule.save_pretrained, folder=tmp_path / "out", merge_adapter=False)
    module = judge_of(tiny_gpt2(), tokenizer=word_tokenizer())
    with pytest.raises(
        ValueError, match="`merge_adapter=False`: the model of the adapter is a GPT2Config, which no pol"
    ):
        save(module)
    module = judge_of(written(tiny_gpt2(), tmp_path / "gpt2"), {**LORA, "target_modules": ["c_attn", "score"]})
    with pytest.raises(ValueError, match="`merge_adapter=False`: GPT2ForSequenceClassification has no head of transf"):
        save(module)
    torch.manual_seed(0)
    bert = AutoModelForSequenceClassification.from_config(ENCODERS["bert"](num_labels=1))
    bert.save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="`merge_adapter=False`: BertForSequenceClassification has no head of transfo"):
        save(judge_of(tmp_path / "bert", {**LORA, "target_modules": ["query"]}))


def test_a_model_that_writes_from_other_states_than_a_classifier_reads_is_refused(tmp_path):
    """BERT as a decoder has a layer between its last states and its head."""
    base = written(ENCODERS["bert"](is_decoder=True), tmp_path / "bert")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    peft = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    peft.save_pretrained(tmp_path / "judge")
    word_tokenizer().save_pretrained(tmp_path / "judge")
    policy = policy_on(base, {"peft_type": "LORA", "r": 2, "target_modules": ["query"]})
    refused("reads other states than those that BertLMHeadModel writes from", policy, tmp_path / "judge")
