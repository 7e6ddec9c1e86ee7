"""Sequence classifiers as rewards, beside what transformers' own forward says of one text at a time."""

import functools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf import GRPOModule, ModelSpec, PPOModule, PromptDataModule, RewardModel
from lightning_rlhf.rewards.combine import CombinedReward
from tests.networks import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    ENCODERS,
    EOS,
    PAD,
    USUAL,
    VOCABULARY,
    tiny_gpt2,
    word_tokenizer,
    written,
)
from tests.training import Seen, bare_trainer, fit, module_of

READERS = {name: {**ENCODERS, **ENCODER_DECODERS}[name] for name in ("bert", "roberta", "t5", "bart")}
RESPONSES = ["b c", "d", "e f g h i j k", "", "l m a"]
PROMPTS = ["a", "b c d e", "f", "g h", "i"]


def classifier(config, labels=1, seed=0, **more):
    """A classifier whose logits differ by about 1."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(("bad", "fair", "good")))} if labels > 1 else {}
    config.num_labels = labels
    for key, value in {**names, **more}.items():
        setattr(config, key, value)
    if names:
        config.label2id = {name: i for i, name in names["id2label"].items()}
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                parameter.normal_(std=0.3)
    return model


def gpt2(labels=1, **more):
    return classifier(tiny_gpt2(), labels, **more)


def alone(model, ids):
    """Logits of one text, without padding: transformers then reads the last token there is."""
    own = model.config.pad_token_id
    model.config.pad_token_id = own if model.config.is_encoder_decoder else None
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0]
    finally:
        model.config.pad_token_id = own


def ids_of(text):
    return [ord(word) - ord("a") for word in text.split()]


def texts():
    return [f"{prompt} {response}" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def scored(model, prompts=None, responses=None, **options):
    """With a space after every prompt, which the words' tokenizer wants."""
    tokenizer = options.pop("tokenizer", None) or word_tokenizer()
    prompts = [f"{prompt} " for prompt in PROMPTS] if prompts is None else prompts
    return RewardModel(model, tokenizer=tokenizer, **options)(prompts, RESPONSES if responses is None else responses)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained classifier of three labels with its tokenizer."""
    path = tmp_path_factory.mktemp("judges") / "polite"
    gpt2(3).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


# --- where the score is read ------------------------------------------------------------------------------------------


@pytest.mark.invariant(6, 28)
@pytest.mark.parametrize("batch_tokens", [1, 24, 8192])
@pytest.mark.parametrize("name", [*USUAL, *READERS])
def test_a_score_is_that_of_the_text_alone_whatever_it_is_scored_beside(name, batch_tokens):
    model = classifier({**ARCHITECTURES, **READERS}[name]())
    expected = [float(alone(model, [*ids_of(text), EOS])) for text in texts()]
    assert max(expected) - min(expected) > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = scored(model, append_eos=True, batch_tokens=batch_tokens)
    assert scores == pytest.approx(expected, abs=2e-5)


@pytest.mark.invariant(6)
@pytest.mark.parametrize("name", USUAL)
def test_the_score_is_read_at_the_eos_where_pad_is_eos_too(name):
    tokenizer = word_tokenizer(VOCABULARY - 1, pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    model = classifier(ARCHITECTURES[name](pad_token_id=EOS))
    expected = [float(alone(model, [*ids_of(text), EOS])) for text in texts()]
    assert scored(model, append_eos=True, tokenizer=tokenizer) == pytest.approx(expected, abs=2e-5)
    with torch.no_grad():  # where transformers would have read it
        theirs = float(model(input_ids=torch.tensor([[0, 1, EOS]])).logits)
    assert theirs == pytest.approx(float(alone(model, [0, 1])), abs=1e-5)
    assert model.config.get_text_config().pad_token_id == EOS  # the object's config is as it was


@pytest.mark.invariant(6)
def test_a_pad_that_a_response_ends_with_is_a_token_like_others():
    model = gpt2()
    scores = scored(model, ["a ", "a "], ["b <pad>", "c d e"])
    assert scores == pytest.approx([float(alone(model, [0, 1, PAD])), float(alone(model, [0, 2, 3, 4]))], abs=2e-5)


def test_texts_that_hold_every_token_there_is_are_scored_one_by_one():
    tokenizer = word_tokenizer(5)
    model = classifier(tiny_gpt2(5))
    prompts, responses = ["a b ", "a "], ["c <eos> <pad>", "b"]
    expected = [float(alone(model, [0, 1, 2, 3, 4])), float(alone(model, [0, 1]))]
    assert scored(model, prompts, responses, tokenizer=tokenizer) == pytest.approx(expected, abs=2e-5)


def test_a_tokenizer_without_pad_will_do():
    tokenizer = word_tokenizer(VOCABULARY - 1, pad=False)
    model = gpt2(pad_token_id=None)
    expected = [float(alone(model, ids_of(text))) for text in texts()]
    assert scored(model, tokenizer=tokenizer) == pytest.approx(expected, abs=2e-5)


def test_a_model_that_padding_changes_scores_texts_of_one_length_at_a_time():
    model = gpt2()
    forward = model.forward

    def disturbed(input_ids, attention_mask, **more):
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **more)
        output.logits = output.logits + (attention_mask == 0).sum(1, keepdim=True)
        return output

    model.forward = disturbed
    expected = [float(alone(gpt2(), ids_of(text))) for text in texts()]
    with pytest.warns(UserWarning, match="GPT2ForSequenceClassification cannot be padded on the right"):
        assert scored(model) == pytest.approx(expected, abs=2e-5)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_the_score_is_the_named_labels_logit_or_probability(folder):
    model = gpt2(3)
    logits = [alone(model, ids_of(text)).tolist() for text in texts()]
    for label, number in {"fair": 1, "good": 2, 0: 0}.items():
        read = functools.partial(scored, model, label=label)
        assert read() == pytest.approx([row[number] for row in logits], abs=2e-5)
        expected = [math.exp(row[number]) / sum(map(math.exp, row)) for row in logits]
        assert read(output="probability") == pytest.approx(expected, abs=2e-5)
        assert scored(folder, label=label) == pytest.approx(read(), abs=2e-5)


def test_where_several_labels_can_hold_a_probability_is_a_sigmoid():
    model = gpt2(3, problem_type="multi_label_classification")
    expected = [1 / (1 + math.exp(-float(alone(model, ids_of(text))[1]))) for text in texts()]
    assert scored(model, label="fair", output="probability") == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("label", [None, "Good", 3, -1, "LABEL_0"])
def test_a_label_that_there_is_not_is_refused_with_those_that_there_are(label):
    message = (
        f"`label={label!r}` of the reward model 'GPT2ForSequenceClassification' must be one of 'bad', 'fair', 'good'"
    )
    with pytest.raises(ValueError, match=message):
        scored(gpt2(3), label=label)


def test_one_output_is_a_score_and_no_probability():
    with pytest.raises(
        ValueError, match="`output='probability'`: the reward model .* has one output, which is a score"
    ):
        scored(gpt2(), output="probability")


# --- what is read -----------------------------------------------------------------------------------------------------


def test_its_tokenizer_may_be_another_than_the_policys():
    """Words upside down: what is `a` for one is the last word for the other."""
    from tests.networks import _tokenizer

    words = [chr(ord("a") + i) for i in range(VOCABULARY - 2)]
    tokenizer = _tokenizer(words[::-1], pad=True, eos=True, spaces=True)
    model = gpt2()
    expected = [float(alone(model, [VOCABULARY - 3 - i for i in ids_of(text)])) for text in texts()]
    assert scored(model, tokenizer=tokenizer) == pytest.approx(expected, abs=2e-5)


def test_it_may_read_the_response_alone():
    model = gpt2()
    expected = [float(alone(model, [*ids_of(response), EOS])) for response in RESPONSES]
    assert scored(model, reads="response", append_eos=True) == pytest.approx(expected, abs=2e-5)


def test_an_empty_text_has_no_score():
    with pytest.raises(ValueError, match="'GPT2ForSequenceClassification' finds no token .*: use `append_eos=True`"):
        scored(gpt2(), reads="response")


def pairing():
    """A tokenizer that writes pairs as BERT's does: `a text <eos> another <eos>`, the second one of type 1."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="a:0 $A:0 <eos>:0", pair="a:0 $A:0 <eos>:0 $B:1 <eos>:1", special_tokens=[("<eos>", EOS), ("a", 0)]
    )
    tokenizer.cls_token = "a"
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@torch.no_grad()
def test_it_may_read_prompt_and_response_as_a_pair():
    model = classifier(ENCODERS["bert"]())
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        first, second = [0, *ids_of(prompt), EOS], [*ids_of(response), EOS]
        types = [0] * len(first) + [1] * len(second)
        expected.append(float(model(torch.tensor([first + second]), token_type_ids=torch.tensor([types])).logits))
    assert scored(model, PROMPTS, reads="pair", tokenizer=pairing()) == pytest.approx(expected, abs=2e-5)
    assert scored(model, tokenizer=pairing()) != pytest.approx(expected, abs=1e-3)


CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def test_chat_goes_through_its_own_template():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': 's', 'assistant': 't'}[m.role] }} {{ m.content }} {% endfor %}u"
    )
    model = gpt2()
    rows = [ids_of(f"s {prompt} t {response} u") for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    expected = [float(alone(model, row)) for row in rows]
    assert scored(model, CHATS, tokenizer=tokenizer) == pytest.approx(expected, abs=2e-5)


def test_chat_without_a_template_is_refused_unless_the_response_alone_is_read():
    complaint = "the reward model 'GPT2ForSequenceClassification' has no chat template: .* by `reads='response'`"
    with pytest.raises(ValueError, match=complaint):
        scored(gpt2(), CHATS)
    with pytest.raises(ValueError, match=r"`prompt=\[.*\]` does not fit .* with `reads='pair'` strings"):
        scored(gpt2(), CHATS, reads="pair")
    assert len(scored(gpt2(), CHATS, reads="response", append_eos=True)) == 5


def test_the_space_before_a_response_that_decoding_took_away_is_put_back():
    """As of the tokenizers of LLaMA and T5; here of words, `a` and `b c` are `a b c` and not `ab c`."""
    rollouts = replace(written([[0], [1]], [[1, 2, EOS], [EOS]]), prompts=["a", "b"], responses=["b c", ""])
    model = gpt2()
    scores = CombinedReward(RewardModel(model, tokenizer=word_tokenizer()))(rollouts, word_tokenizer())
    assert scores.total.tolist() == pytest.approx([float(alone(model, row)) for row in ([0, 1, 2], [1])], abs=2e-5)


def test_of_a_text_that_is_too_long_the_end_is_read_and_a_warning_says_so_once():
    model = gpt2()
    reward = RewardModel(model, tokenizer=word_tokenizer(), max_tokens=4)
    prompts = [f"{prompt} " for prompt in PROMPTS]
    expected = [float(alone(model, ids_of(text)[-4:])) for text in texts()]
    complaint = "2 of 5 texts have more than the 4 tokens that the reward model 'GPT2For.*' reads .up to 8."
    with pytest.warns(UserWarning, match=complaint):
        assert reward(prompts, RESPONSES) == pytest.approx(expected, abs=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(prompts, RESPONSES)


@torch.no_grad()
def test_what_is_cut_keeps_its_first_special_token():
    model = classifier(ENCODERS["bert"]())
    rows = [[0, *(ids_of(text) + [EOS])[-5:]] for text in texts()]
    expected = [float(model(torch.tensor([row])).logits) for row in rows]
    with pytest.warns(UserWarning, match="texts have more than the 6 tokens"):
        assert scored(model, tokenizer=pairing(), max_tokens=6) == pytest.approx(expected, abs=2e-5)


def test_positions_and_the_tokenizer_are_limits_too():
    tokenizer = word_tokenizer()
    assert RewardModel(gpt2(), tokenizer=tokenizer).token_limit == 64
    tokenizer.model_max_length = 7
    assert RewardModel(gpt2(), tokenizer=tokenizer).token_limit == 7
    assert RewardModel(gpt2(), tokenizer=tokenizer, max_tokens=5).token_limit == 5


def test_texts_of_alike_length_go_together_within_the_budget():
    model = gpt2()
    shapes = []
    forward = model.forward
    model.forward = lambda input_ids, **more: shapes.append(tuple(input_ids.shape)) or forward(input_ids, **more)
    reward = RewardModel(model, tokenizer=word_tokenizer(), batch_tokens=10)
    reward.load()
    shapes.clear()
    reward([f"{prompt} " for prompt in PROMPTS], RESPONSES)  # of 3, 5, 8, 2 and 4 tokens
    assert shapes == [(1, 8), (2, 5), (2, 3)]


# --- in step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("gpt2", "transformer.h"),
        ("llama", "model.layers"),
        ("bert", "bert.encoder.layer"),
        ("opt", "model.decoder.layers"),
    ],
)
def test_the_blocks_of_a_classifier_are_found(name, blocks):
    model = RewardModel(classifier({**ARCHITECTURES, **READERS}[name]()), tokenizer=word_tokenizer())
    assert model.load().blocks == (f"{blocks}.0", f"{blocks}.1")


@pytest.mark.parametrize(("name", "sides"), [("t5", "block"), ("bart", "layers")])
def test_the_blocks_of_both_halves_are_found(name, sides):
    blocks = RewardModel(classifier(READERS[name]()), tokenizer=word_tokenizer()).load().blocks
    ends = [block.split(".", 1)[1] for block in blocks]
    assert sorted(ends) == sorted(f"{half}.{sides}.{i}" for half in ("encoder", "decoder") for i in range(2))


def in_step(needs):
    """A reward model of passes of one text each, how often its network ran, and what it said that it needs."""
    reward = RewardModel(gpt2(), tokenizer=word_tokenizer(), batch_tokens=1)
    passes, said = [], []
    reward.load().model.register_forward_hook(lambda *_: passes.append(1))
    passes.clear()
    reward.most = lambda number: said.append(number) or max(number, needs)
    return reward, passes, said


def test_in_step_it_makes_as_many_passes_as_the_process_that_needs_most():
    prompts = [f"{prompt} " for prompt in PROMPTS]
    reward, passes, said = in_step(needs=8)
    assert reward(prompts, RESPONSES) == scored(gpt2(), prompts)
    assert (len(passes), said) == (8, [5])
    CombinedReward(reward).stand_by()  # without a single text
    assert (len(passes), said) == (16, [5, 0])


def test_what_fails_before_it_lets_the_other_processes_go_on():
    reward, passes, said = in_step(needs=8)

    def fails(prompts, responses):
        raise KeyError("here")

    with pytest.raises(RuntimeError, match="'fails' raised KeyError"):
        CombinedReward([reward, fails, reward])(written([[1]], [[2]]), word_tokenizer())
    assert passes == []
    assert len(said) == 2
    assert min(said) > 10**9
    with pytest.raises(ValueError, match="finds no token"):
        reward([""], [""])
    assert len(said) == 3
    assert said[2] == said[0]

    elsewhere, passes, said = in_step(needs=said[0])
    rollouts = replace(written([[1]], [[2]]), responses=["b"])
    results = CombinedReward([elsewhere, (share, 1.0)])(rollouts, word_tokenizer())
    assert passes == []  # and the run is about to end
    assert list(results.by_name) == ["GPT2ForSequenceClassification", "share"]


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_named_by_the_last_part_of_its_folder_or_hub_name(folder):
    assert RewardModel(folder).name == "polite"
    assert RewardModel("org/judge-7b").name == "judge-7b"
    assert RewardModel(gpt2(), name="manners").name == "manners"
    rewards = CombinedReward([RewardModel(folder, label="good"), (RewardModel(folder, label="bad"), -1.0)])
    assert rewards.name == "polite, polite_2"


def test_its_weights_are_frozen_without_dropout_and_of_its_own_type(folder):
    reward = RewardModel(ModelSpec(folder, dtype="bfloat16"), label="good")
    network = reward.load().model
    assert not network.training
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_an_object_finds_the_tokenizer_that_lies_beside_its_weights(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    reward = RewardModel(model, label="good")
    assert reward(["a "], ["b"]) == RewardModel(folder, label="good")(["a "], ["b"])
    assert reward.classifier.model is model


@pytest.mark.parametrize(
    ("build", "error", "complaint"),
    [
        (
            lambda: scored(gpt2(), output="logits"),
            ValueError,
            "`output='logits'` must be one of 'logit', 'probability'",
        ),
        (
            lambda: scored(gpt2(), reads="prompt"),
            ValueError,
            "`reads='prompt'` must be one of 'both', 'pair', 'resp",
        ),
        (lambda: scored(gpt2(), max_tokens=0), ValueError, "`max_tokens=0` must be at least 1"),
        (lambda: scored(gpt2(), batch_tokens=0), ValueError, "`batch_tokens=0` must be at least 1"),
        (lambda: RewardModel(tiny_gpt2()), TypeError, "`model=GPT2Config` must be a trained classifier"),
        (lambda: RewardModel(ModelSpec(gpt2())), TypeError, "must be a trained classifier: .* or the object itself"),
        (lambda: RewardModel(gpt2())(["a"], ["b"]), ValueError, "`tokenizer=None` must be given where a reward model"),
        (
            lambda: scored(gpt2(), tokenizer=word_tokenizer(30)),
            ValueError,
            "`tokenizer` of the reward model .* has 30 tokens, and the model 24 rows",
        ),
        (
            lambda: scored(gpt2(), tokenizer=word_tokenizer(eos=False), append_eos=True),
            ValueError,
            "`append_eos=True` of the reward model 'GPT2.*' needs a tokenizer with an EOS",
        ),
        (
            lambda: scored(AutoModelForCausalLM.from_config(tiny_gpt2())),
            TypeError,
            "`model=GPT2LMHeadModel` gives no logits per sequence: .* loaded as ...ForSequenceClassification",
        ),
        (
            lambda: scored(ModelSpec("org/judge", num_layers_unfrozen=1)),
            ValueError,
            "`reward.num_layers_unfrozen=1` is a policy's, and a reward model reads none of it: leave it out",
        ),
        (lambda: scored("./nowhere"), ValueError, "`model='./nowhere'` looks like a folder, and there is none"),
        (
            lambda: scored("nobody-has-this"),
            ValueError,
            r"`reward='nobody-has-this'` cannot be read as a sequence classifier .* as in 'my_reward.score'",
        ),
    ],
)
def test_what_is_no_reward_model_is_refused(build, error, complaint):
    with pytest.raises(error, match=complaint):
        build()


def test_a_language_model_has_no_trained_head(tmp_path):
    AutoModelForCausalLM.from_config(tiny_gpt2()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for \['score.weight'\]: it was never trained to score"):
        scored(tmp_path)


# --- as the reward of a module ----------------------------------------------------------------------------------------


def module(cls=PPOModule, **arguments):
    return module_of(cls, **arguments)


def test_a_name_that_can_be_imported_is_a_function_and_any_other_a_model(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "v1.2").mkdir(exist_ok=True)
    rewards = ["tests.training.share_of_early_letters", str(folder), "polite", "org/judge.v2", "v1.2", folder, gpt2()]
    names = [
        "share_of_early_letters",
        "polite",
        "polite_2",
        "judge.v2",
        "v1.2",
        "polite_3",
        "GPT2ForSequenceClassification",
    ]
    combined = CombinedReward(rewards)
    assert list(combined.weight_by_name) == names
    assert len(combined.models) == 6


@pytest.mark.parametrize("cls", [PPOModule, GRPOModule])
def test_a_reward_model_scores_what_a_policy_writes_and_is_in_no_checkpoint(tmp_path, folder, cls):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    reward = [RewardModel(folder, label="good", append_eos=True), (share, 2.0)]
    run = module(cls, reward=reward, optimizer=functools.partial(torch.optim.SGD, lr=0.01))
    trainer = bare_trainer(max_epochs=1)
    seen = Seen()
    trainer.callbacks.append(seen)
    trainer.fit(run, datamodule=PromptDataModule(["a b c", "d", "e f"], batch_size=3))
    (experience,) = seen.experiences
    for i, score in enumerate(experience.scores.by_name["polite"].tolist()):
        mine = float(alone(model, [*ids_of(f"{experience.prompts[i]} {experience.responses[i]}"), EOS])[2])
        assert score == pytest.approx(mine, abs=2e-5)
    assert seen.metrics[0]["reward/polite"] == pytest.approx(
        float(experience.scores.by_name["polite"].mean()), abs=1e-5
    )
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert all(name.startswith("policy.") for name in saved["state_dict"])
    assert not any("score" in name for name, _ in run.named_parameters())


def share(prompts, responses):
    return [float("a" in response) for response in responses]


def test_a_checkpoint_knows_its_reward_model(tmp_path, folder):
    reward = [[RewardModel(folder, label="good", output="probability"), 0.5], "tests.rewards.test_model.share"]
    run = module(reward=reward)
    trainer = bare_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(run, datamodule=PromptDataModule(["a", "b"], batch_size=2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = PPOModule.load_from_checkpoint(
        tmp_path / "one.ckpt", policy=tiny_gpt2(initializer_range=0.3), tokenizer=word_tokenizer()
    )
    assert loaded.reward.weights == [0.5, 1.0]
    (model,) = loaded.reward.models
    assert (model.label, model.output, model.name) == ("good", "probability", "polite")
    assert model(["a "], ["b"]) == run.reward.models[0](["a "], ["b"])


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_the_trainers_precision_does_not_reach_it(folder, precision, in_background):
    reward = RewardModel(folder, label="good")
    seen = fit(module(reward=reward, reward_in_background=in_background), iterations=1, precision=precision)
    (experience,) = seen.experiences
    prompts = [f"{prompt} " for prompt in experience.prompts]
    assert {parameter.dtype for parameter in reward.classifier.model.parameters()} == {torch.float32}
    assert experience.scores.total.tolist() == pytest.approx(reward(prompts, experience.responses), abs=1e-6)


def test_it_goes_where_the_policy_goes_unless_told_where_to_stay(folder):
    run = module(reward=[RewardModel(folder, label="good"), RewardModel(folder, label="good", device="cpu")])
    run.configure_model()
    run.to("meta")
    assert [model.classifier.device.type for model in run.reward.models] == ["meta", "cpu"]


def test_a_folder_that_is_missing_is_said_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(PPOModule, "rollout", lambda *args: pytest.fail("it wrote"))
    with pytest.raises(ValueError, match="`model='./nowhere'` looks like a folder"):
        fit(module(reward="./nowhere"), iterations=1)


def test_a_quantised_classifier_is_taken_as_it_is(tmp_path):
    from transformers import BitsAndBytesConfig

    classifier(tiny_gpt2(width=64), 3).save_pretrained(tmp_path)  # its kernel on CPUs wants 64
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["score"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    reward = RewardModel(model, label="good", tokenizer=word_tokenizer())
    seen = fit(module(reward=reward), iterations=1)
    (experience,) = seen.experiences
    assert "Params4bit" in kinds
    mine = [
        float(alone(model, ids_of(f"{p} {r}"))[2])
        for p, r in zip(experience.prompts, experience.responses, strict=True)
    ]
    assert experience.scores.total.tolist() == pytest.approx(mine, abs=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_classifier_is_quantised_as_its_spec_says_but_for_its_head(tmp_path, quantization):
    classifier(tiny_gpt2(width=64), 3).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    reward = RewardModel(ModelSpec(tmp_path, quantization=quantization), label="good")
    kinds = {name: type(parameter).__name__ for name, parameter in reward.load().model.named_parameters()}
    assert set(kinds.values()) >= {"Params4bit" if quantization == "nf4" else "Int8Params"}
    assert kinds["score.weight"] == "Parameter"
    assert reward.plain()["init_args"]["model"]["quantization"] == quantization
    prompts = [f"{prompt} " for prompt in PROMPTS]
    expected = torch.tensor(RewardModel(tmp_path, label="good")(prompts, RESPONSES))
    both = torch.stack([torch.tensor(reward(prompts, RESPONSES)), expected])
    assert 0.8 < float(torch.corrcoef(both)[0, 1]) < 0.99999
