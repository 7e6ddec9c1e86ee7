import functools
import os

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import ConversationDataModule, ModelSpec, PPOModule, PromptDataModule, SFTModule
from lightning_rlhf.models.reference import fingerprint
from tests.networks import network, tiny_gpt2, word_tokenizer
from tests.training import bare_trainer, fit, module_of, sft, sgd, share_of_early_letters

PROMPTS = ["a b c", "d", "e f g h", "b"]


@pytest.mark.invariant(18)
def test_an_export_is_a_folder_that_transformers_reads_alone(tmp_path):
    module = module_of(PPOModule, network(tiny_gpt2()))
    fit(module, iterations=1)
    module.save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == word_tokenizer().get_vocab()
    assert model.config.resid_pdrop == 0.1
    assert module.policy.decoder.model.config.resid_pdrop == 0.0
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        # To rounding: it has the activations as transformers writes them out.
        torch.testing.assert_close(model(ids).logits, module.policy.decoder.model(ids).logits, rtol=0, atol=1e-5)
    saved = model.state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in module.policy.decoder.model.state_dict().items())


def test_an_export_leaves_other_files_of_its_folder_alone_and_nothing_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "config.json").write_text("stale")
    sft().save_pretrained("out")
    names = set(os.listdir("out"))
    assert {"notes.txt", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert AutoModelForCausalLM.from_pretrained("out").config.n_embd == 16
    assert os.listdir(tmp_path) == ["out"]


def test_an_export_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch):
    module = sft(network(tiny_gpt2()))
    module.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(module.tokenizer, "save_pretrained", fail)
    with torch.no_grad():
        module.policy.decoder.model.get_output_embeddings().weight.zero_()
    with pytest.raises(OSError, match="disk full"):
        module.save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def trained(module, path, data):
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_a_checkpoint_of_sft_rebuilds_its_module(tmp_path, folder):
    module = SFTModule(ModelSpec(folder), optimizer=sgd, lr_scheduler=functools.partial(StepLR, step_size=1), seed=4)
    checkpoint = trained(module, tmp_path / "sft.ckpt", ConversationDataModule(["a b c"]))
    assert checkpoint["hyper_parameters"]["policy"]["model"] == str(folder)
    loaded = SFTModule.load_from_checkpoint(tmp_path / "sft.ckpt")
    assert fingerprint(loaded.policy) == fingerprint(module.policy) != fingerprint(network(tiny_gpt2()))
    assert loaded.hparams == module.hparams
    assert loaded.seed == 4
    bare_trainer(max_epochs=1).fit(loaded, datamodule=ConversationDataModule(["a b c"]))  # its schedule is read too


def test_a_checkpoint_of_ppo_rebuilds_its_module_where_the_reward_can_be_imported(tmp_path, folder):
    arguments = {
        "sampling": {"max_new_tokens": 4, "min_new_tokens": 2},
        "clip_range": (0.1, 0.3),
        "reward_scaling": "running",
    }
    module = PPOModule(folder, reward=[(share_of_early_letters, np.float32(0.5))], optimizer=sgd, **arguments)
    module.kl_coef = np.float64(0.25)  # as a callback may have it
    checkpoint = trained(module, tmp_path / "ppo.ckpt", PromptDataModule(PROMPTS, batch_size=4))
    assert checkpoint["hyper_parameters"]["reward"] == [["tests.training.share_of_early_letters", 0.5]]
    loaded = PPOModule.load_from_checkpoint(tmp_path / "ppo.ckpt")
    assert loaded.reward.rewards[0].function is share_of_early_letters
    assert loaded.reward.weights == [0.5]
    assert (loaded.clip_range, loaded.sampling) == ((0.1, 0.3), module.sampling)
    assert (loaded.iteration, loaded.kl_coef) == (1, 0.25)
    assert loaded.scaled.state_dict() == module.scaled.state_dict()
    assert fingerprint(loaded.policy) == fingerprint(module.policy)
    assert fingerprint(loaded.reference.network) == fingerprint(module.reference.network)
    assert loaded.generate(["a b"]) == module.generate(["a b"])


def test_what_a_checkpoint_cannot_hold_is_passed_when_it_is_loaded(tmp_path):
    module = module_of(PPOModule, reward=lambda prompts, responses: [len(response) for response in responses])
    checkpoint = trained(module, tmp_path / "ppo.ckpt", PromptDataModule(PROMPTS, batch_size=4))
    assert not {"policy", "tokenizer", "reward"} & set(checkpoint["hyper_parameters"])
    with pytest.raises(TypeError, match="policy"):
        PPOModule.load_from_checkpoint(tmp_path / "ppo.ckpt", reward=share_of_early_letters)
    loaded = PPOModule.load_from_checkpoint(
        tmp_path / "ppo.ckpt", reward=share_of_early_letters, policy=tiny_gpt2(), tokenizer=word_tokenizer()
    )
    assert fingerprint(loaded.policy) == fingerprint(module.policy)
    # A reference that came from a config is in the checkpoint.
    assert fingerprint(loaded.reference.network) == fingerprint(module.reference.network)
    assert loaded.hparams["minibatch_size"] == 4


def test_training_does_not_go_on_against_another_reference_than_the_checkpoint_s(tmp_path, folder):
    module = PPOModule(folder, reward=share_of_early_letters, optimizer=sgd, sampling={"max_new_tokens": 4})
    trained(module, tmp_path / "ppo.ckpt", PromptDataModule(PROMPTS, batch_size=4))
    network(tiny_gpt2(), seed=1).save_pretrained(tmp_path / "other")
    word_tokenizer().save_pretrained(tmp_path / "other")
    loaded = PPOModule.load_from_checkpoint(tmp_path / "ppo.ckpt", policy=tmp_path / "other")
    with pytest.raises(ValueError, match="`reference` is not the one that the checkpoint was trained against"):
        bare_trainer(max_epochs=1).fit(loaded, datamodule=PromptDataModule(PROMPTS, batch_size=4))
