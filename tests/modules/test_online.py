import functools
import threading
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_rlhf import ConversationDataModule, PPOModule, PromptDataModule
from lightning_rlhf.batches import PromptBatch
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.functional import linear, spare
from lightning_rlhf.functional.spare import Spare
from lightning_rlhf.models.reference import fingerprint
from lightning_rlhf.modules import online
from tests.networks import PAD, network, tiny_gpt2, word_tokenizer
from tests.training import PROMPTS, Seen, bare_trainer, fit, module_of, sft, share_of_early_letters, weights


def ppo(**arguments):
    return module_of(PPOModule, **arguments)


def of_words(prompts, metadata=None):
    """A batch as a user may make it."""
    vocabulary = word_tokenizer().get_vocab()
    tokens, mask = padded([[vocabulary[word] for word in prompt.split()] for prompt in prompts], PAD, "left")
    return PromptBatch(prompt_tokens=tokens, prompt_mask=mask, prompts=list(prompts), metadata=metadata or {})


class Ledger(Callback):
    """Writes down what happened, in order."""

    def __init__(self):
        self.events, self.weights = [], []

    def on_experience(self, trainer, module, experience):
        self.events.append("experience")
        self.weights.append(weights(module))
        assert trainer is module.trainer
        assert experience.scores.total.shape == (len(experience),)
        assert experience.ref_logprobs is not None
        assert experience.weights is None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.events.append("update")


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_every_callback_that_asks_for_it_sees_experience_once_an_iteration_before_the_updates():
    ledgers = [Ledger(), Ledger()]
    module = ppo()
    module.configure_model()
    start = weights(module)
    fit(module, iterations=2, callbacks=[ledgers[0], Callback(), ledgers[1]])
    for ledger in ledgers:
        assert ledger.events == (["experience"] + ["update"] * 8) * 2
        assert torch.equal(ledger.weights[0], start)
    assert torch.equal(ledgers[0].weights[1], ledgers[1].weights[1])
    assert not torch.equal(ledgers[0].weights[1], start)


def test_what_a_callback_logs_there_is_logged():
    class Logging(Callback):
        def on_experience(self, trainer, module, experience):
            self.log("mine", experience.scores.total.max())
            module.log("the_modules", 3.0)

    seen = fit(ppo(), iterations=1, callbacks=[Logging()])
    assert seen.metrics[0]["mine"] == float(seen.experiences[0].scores.total.max())
    assert seen.metrics[0]["the_modules"] == 3.0


def test_a_coefficient_that_a_callback_sets_holds_in_the_next_iteration():
    class Raise(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            module.kl_coef *= 2

    metrics = fit(ppo(kl_coef=0.5), iterations=3, callbacks=[Raise()]).metrics
    assert [of_iteration["kl/coef"] for of_iteration in metrics] == [0.5, 1.0, 2.0]


def test_early_stopping_sees_what_is_logged():
    stopping = EarlyStopping("reward/mean", stopping_threshold=-1.0, mode="max")
    assert len(fit(ppo(), iterations=5, callbacks=[stopping]).metrics) == 1


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_every_prompt_gets_its_responses_and_each_of_them_its_metadata():
    calls = []

    def reward(prompts, responses, answer, response_tokens):
        calls.append((prompts, answer))
        assert len(responses) == len(response_tokens) == 6
        return [0.0] * 6

    rows = [{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}]
    module = ppo(reward=reward, responses_per_prompt=3)
    experience = fit(module, iterations=1, prompts=rows).experiences[0]
    ((prompts, answers),) = calls
    assert prompts in (["a b"] * 3 + ["c"] * 3, ["c"] * 3 + ["a b"] * 3)
    assert answers == [{"a b": 1, "c": 2}[prompt] for prompt in prompts]
    groups = [experience.responses[:3], experience.responses[3:]]
    assert all(len(set(group)) > 1 for group in groups)


def test_a_reward_gets_chat_messages_as_they_were_given():
    chat = [{"role": "user", "content": "a b"}]
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "s {{ messages[0]['content'] }}{% if add_generation_prompt %} t{% endif %}"
    calls = []

    def reward(prompts, responses):
        calls.extend(prompts)
        return [0.0 for _ in responses]

    seen = fit(ppo(reward=reward, tokenizer=tokenizer), iterations=1, prompts=[chat] * 2)
    assert calls == [chat, chat]
    assert seen.experiences[0].prompt_tokens.tolist() == [[18, 0, 1, 19]] * 2


def test_responses_are_what_was_sampled_without_special_tokens():
    experience = fit(ppo(), iterations=1).experiences[0]
    letters = "abcdefghijklmnopqrstuv"
    for tokens, mask, response in zip(
        experience.response_tokens, experience.response_mask, experience.responses, strict=True
    ):
        assert response == " ".join(letters[token] for token in tokens[mask].tolist() if token < len(letters))
    assert len(set(experience.responses)) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_loader_of_prompts_works_as_well(workers):
    loader = DataLoader(PROMPTS, batch_size=6, collate_fn=of_words, num_workers=workers)
    plain, ours = ppo(seed=0), ppo(seed=0)
    bare_trainer(max_epochs=2).fit(plain, loader)
    data = PromptDataModule(PROMPTS, batch_size=6, shuffle=False)
    bare_trainer(max_epochs=2).fit(ours, datamodule=data)
    assert fingerprint(plain.policy) == fingerprint(ours.policy)


@pytest.mark.invariant(37)
def test_two_processes_draw_what_one_draws(monkeypatch):
    module = ppo(responses_per_prompt=2)
    module.configure_model()
    whole = module.rollout(of_words(PROMPTS))
    for rank in range(2):
        monkeypatch.setattr("lightning_rlhf.modules.online.world_size", lambda: 2)
        monkeypatch.setattr("lightning_rlhf.modules.online.rank", lambda rank=rank: rank)
        part = module.rollout(of_words(PROMPTS[rank::2]))
        expected = [response for i in range(rank, 6, 2) for response in whole.responses[2 * i : 2 * i + 2]]
        assert part.responses == expected
    assert len(set(whole.responses)) > 6


@pytest.mark.invariant(36)
def test_what_is_written_depends_on_seed_and_iteration_alone():
    modules = [ppo(seed=seed) for seed in (1, 1, 2)]
    responses = []
    for i, module in enumerate(modules):
        module.configure_model()
        module.policy.load_state_dict(modules[0].policy.state_dict())
        torch.manual_seed(i)
        responses.append(module.rollout(of_words(PROMPTS)).responses)
    assert responses[0] == responses[1] != responses[2]
    modules[0].iteration = 1
    assert modules[0].rollout(of_words(PROMPTS)).responses != responses[0]


# --- when things go wrong ---------------------------------------------------------------------------------------------


def fails_at(iteration, failure):
    calls = []

    def judge(prompts, responses):
        calls.append(responses)
        scores = [float(len(response)) for response in responses]
        return failure(scores) if len(calls) == iteration else scores

    return judge


def too_few(scores):
    return scores[:-1]


def not_a_number(scores):
    return [*scores[:2], float("nan"), *scores[3:]]


def explode(scores):
    raise KeyError("answer")


@pytest.mark.invariant(39)
@pytest.mark.parametrize(
    ("failure", "error", "complaint"),
    [
        (too_few, ValueError, "`reward` 'judge' returned 5 scores for 6 responses"),
        (not_a_number, ValueError, r"`reward` 'judge' gave nan for response 2 \('.*'\): it must be finite"),
        (explode, RuntimeError, "`reward` 'judge' raised KeyError: 'answer' .on 6 responses, the first of which is"),
    ],
)
def test_a_reward_that_fails_stops_the_run_and_leaves_its_last_checkpoint_whole(tmp_path, failure, error, complaint):
    keep = ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=8, save_on_train_epoch_end=False)
    module = ppo(reward=fails_at(3, failure))
    trainer = bare_trainer(max_epochs=5, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(error, match=complaint):
        trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=6))
    assert trainer.global_step == 16
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["kept.ckpt"]
    state = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert (state["global_step"], state["lightning_rlhf"]["iteration"]) == (16, 2)
    resumed = ppo(reward=fails_at(0, failure))
    trainer = bare_trainer(max_epochs=3, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(resumed, datamodule=PromptDataModule(PROMPTS, batch_size=6), ckpt_path=tmp_path / "kept.ckpt")
    assert resumed.iteration == 3


@pytest.mark.invariant(39)
@pytest.mark.parametrize("failure", [KeyError("x"), OverflowError("x"), AttributeError("x"), OSError("x")])
def test_whatever_goes_wrong_while_scoring_the_other_processes_are_told(monkeypatch, failure):
    def agree(error, what, rows, device):
        told.append((error, what, rows))
        raise error

    def fail(rollouts, tokenizer):
        raise failure

    told = []
    monkeypatch.setattr("lightning_rlhf.modules.scoring.agree", agree)
    module = ppo()
    monkeypatch.setattr(type(module.reward), "__call__", lambda reward, *args: fail(*args))
    with pytest.raises(type(failure)):
        fit(module, iterations=1)
    assert told == [(failure, "`reward` 'share_of_early_letters'", 6)]


def test_resuming_over_a_plain_loader_is_warned_of_once(tmp_path):
    def loader():
        return DataLoader(PROMPTS, batch_size=6, collate_fn=of_words)

    trainer = bare_trainer(max_epochs=1)
    module = ppo()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bare_trainer(max_epochs=2).fit(ppo(), loader(), ckpt_path=tmp_path / "last.ckpt")
    complaint = "Resumed with a data loader that does not remember its place: an epoch begins anew."
    assert [str(warning.message) for warning in caught].count(complaint) == 1
    bare_trainer(max_epochs=1).fit(module, loader())  # goes on, and nothing is lost


def test_a_divergence_that_was_free_when_the_networks_were_built_cannot_be_charged_later():
    class Charge(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            module.kl_coef = 0.1

    with pytest.raises(ValueError, match="`kl_coef=0.1` was 0 when the networks were built: begin above 0"):
        fit(ppo(kl_coef=0.0), iterations=2, callbacks=[Charge()])


# --- flags of the trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_it_runs_in_other_precisions(precision):
    seen = Seen()
    module = ppo(reward_scaling="running", micro_batch_size=2)
    data = PromptDataModule(PROMPTS, batch_size=6)
    bare_trainer(max_epochs=2, precision=precision, callbacks=[seen]).fit(module, datamodule=data)
    experience = seen.experiences[1]
    for name in ("old_logprobs", "values", "advantages", "returns", "ref_logprobs"):
        assert bool(getattr(experience, name).isfinite().all()), name
    assert experience.scores.total.dtype == torch.float32
    assert all(abs(value) < float("inf") for value in seen.metrics[-1].values())


def test_the_last_batch_of_an_epoch_may_be_smaller():
    module = ppo()
    seen = Seen()
    bare_trainer(max_epochs=2, callbacks=[seen]).fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=4))
    assert [len(experience) for experience in seen.experiences] == [4, 2, 4, 2]


def test_the_reference_may_be_another_model():
    other = network(tiny_gpt2(), seed=3)
    module = ppo(reference=other, kl_coef=0.1, optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    metrics = fit(module, iterations=1).metrics[0]
    assert fingerprint(module.reference.network.decoder.model) == fingerprint(other)
    assert abs(metrics["kl/sequence"]) > 0.1


def test_a_reward_works_while_the_reference_reads():
    threads, events = [], []

    def waits(prompts, responses):
        threads.append(threading.current_thread())
        assert read.wait(timeout=20), "the reference did not read meanwhile"
        read.clear()
        events.append("scored")
        return share_of_early_letters(prompts, responses)

    read = threading.Event()
    module = ppo(reward=waits, reward_in_background=True)
    module.configure_model()
    reference = module.reference.logprobs

    def reads(*args):
        logprobs = reference(*args)
        events.append("read")
        read.set()
        return logprobs

    module.reference.logprobs = reads
    fit(module, iterations=2)
    assert events == ["read", "scored", "read", "scored"]  # the reference read once an iteration
    assert all(thread is not threading.main_thread() for thread in threads)
    alone = ppo()
    fit(alone, iterations=2)
    assert torch.equal(weights(module), weights(alone))


@pytest.mark.invariant(39)
def test_a_reward_that_fails_in_the_background_fails_with_its_own_error():
    def lost(prompts, responses):
        raise KeyError("there is no such film")

    with pytest.raises(RuntimeError, match="`reward` 'lost' raised KeyError: 'there is no such film'"):
        fit(ppo(reward=lost, reward_in_background=True), iterations=1)


def late(prompts, responses):
    """Hundreds of points, where the other reward gives a tenth."""
    return [1000.0 + 300.0 * response.count("v") + len(response) for response in responses]


@pytest.mark.parametrize("which", [True, ["share_of_early_letters", "late"], ["late"]])
def test_rewards_are_normalised_by_name_and_logged_as_they_were_given(which):
    module = ppo(reward=[share_of_early_letters, (late, 0.5)], normalize_rewards=which, reward_clip=None)
    learnt = []
    scale = module.scaled.__class__.__call__

    class Spied(module.scaled.__class__):
        def __call__(self, scores, rollouts):
            learnt.append(scale(self, scores, rollouts))
            return learnt[-1]

    module.scaled.__class__ = Spied
    seen = fit(module, iterations=1)
    (experience,) = seen.experiences
    given = {name: scores.double() for name, scores in experience.scores.by_name.items()}
    expected = 0.5 * (given["late"] - given["late"].mean()) / given["late"].std()
    first = given["share_of_early_letters"]
    expected += first if which == ["late"] else (first - first.mean()) / first.std()
    assert learnt[0].total.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert seen.metrics[0]["reward/late"] == pytest.approx(float(given["late"].mean()), rel=1e-6)
    assert seen.metrics[0]["reward/mean"] == pytest.approx(float((first + 0.5 * given["late"]).mean()), rel=1e-6)


# --- memory and order of what is large --------------------------------------------------------------------------------


def test_rollouts_read_packed_weights_and_come_to_the_same(monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 0)
    found, packs = [], []
    pack = linear.packed
    monkeypatch.setattr("lightning_rlhf.models.linear.packed", lambda *given: packs.append(given) or pack(*given))
    for fewest in (10**6, 1):
        monkeypatch.setattr(online, "FEWEST", fewest)
        seen, module = Seen(), ppo()
        fit(module, iterations=2, callbacks=[seen])
        assert not any("forward" in vars(layer) for layer in module.policy.modules())
        found.append((seen.experiences, weights(module)))
        assert bool(packs) == (fewest == 1)
    (plain, plain_weights), (packed, packed_weights) = found
    for mine, theirs in zip(packed, plain, strict=True):
        assert torch.equal(mine.response_tokens, theirs.response_tokens)
        torch.testing.assert_close(mine.old_logprobs, theirs.old_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_weights, plain_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_memory_that_is_used_again_changes_nothing(monkeypatch, micro_batch_size):
    found, taken = [], []
    for smallest in (10**9, 0):
        monkeypatch.setattr(spare, "SMALLEST", smallest)
        module = ppo(micro_batch_size=micro_batch_size, ent_coef=0.1)
        give = Spare.give
        monkeypatch.setattr(Spare, "give", lambda *a, give=give: (give(*a), taken.append((a[1], a[1] in a[0]._pieces))))
        left = []
        after = LambdaCallback(
            on_train_batch_end=lambda *a, left=left: left.append(dict(a[1].policy.decoder.spare._pieces))
        )
        fit(module, iterations=2, callbacks=[after])
        monkeypatch.setattr(Spare, "give", give)
        found.append(weights(module))
        assert left == [{}, {}], "responses are written next"
        assert all(parameter.grad is None for parameter in module.parameters())
        assert {use for use, is_kept in taken if is_kept} == (set() if smallest else {"exponentials", "gradient"})
    assert torch.equal(*found)


def test_memory_for_the_next_step_of_imitation_is_given_back_at_the_end(monkeypatch):
    monkeypatch.setattr(spare, "SMALLEST", 0)
    held = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            held.append(set(module.policy.decoder.spare._pieces))

    module = sft()
    data = ConversationDataModule([{"prompt": "a b", "response": "c d"}] * 4, batch_size=2)
    bare_trainer(max_epochs=1, callbacks=[Looks()]).fit(module, datamodule=data)
    assert held == [{"exponentials"}] * 2
    assert not module.policy.decoder.spare._pieces


def test_a_gradient_that_somebody_keeps_stays_what_it_was(monkeypatch):
    monkeypatch.setattr(spare, "SMALLEST", 0)

    class Keeps(Callback):
        def __init__(self):
            self.kept, self.copies = [], []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            gradient = module.policy.decoder.model.get_output_embeddings().weight.grad
            self.kept.append(gradient)
            self.copies.append(gradient.clone())

    keeps = Keeps()
    fit(ppo(max_grad_norm=1e9), iterations=2, callbacks=[keeps])
    assert len(keeps.kept) > 2
    assert all(map(torch.equal, keeps.kept, keeps.copies))
