"""What tests of several modules begin with."""

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A policy with its tokenizer, as a Hugging Face folder that no test writes to."""
    from tests.networks import network, tiny_gpt2, word_tokenizer

    path = tmp_path_factory.mktemp("policy")
    network(tiny_gpt2()).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path
