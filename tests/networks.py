"""Tokenizers and configs of tiny networks, built from nothing, that tests of all rooms share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, islice, product
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.models.policy import NextToken

if TYPE_CHECKING:
    from transformers import GPT2Config, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 24
EOS, PAD = VOCABULARY - 2, VOCABULARY - 1
POSITIONS = 64


def word_tokenizer(size: int = VOCABULARY, pad: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """So many tokens: the words a, b, ... z, aa, ab, ... between spaces, and last of all `<eos>` and then `<pad>`."""
    words = ("".join(letters) for length in count(1) for letters in product(ascii_lowercase, repeat=length))
    return _tokenizer(list(islice(words, size - pad - eos)), pad, eos, spaces=True)


def piece_tokenizer(
    pieces: Sequence[str], pad: bool = True, eos: bool = True, spaces: bool = False
) -> PreTrainedTokenizerFast:
    """The pieces in order, then `<eos>` and `<pad>`; text is cut into single letters, tokens are joined as they are.

    A piece of several letters is thus written by a model only. Hugging Face's stop strings need the letters a to f.
    """
    return _tokenizer(list(pieces), pad, eos, spaces)


def _tokenizer(tokens: list[str], pad: bool, eos: bool, spaces: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {name: f"<{name[:3]}>" for name, wanted in {"eos_token": eos, "pad_token": pad}.items() if wanted}
    vocabulary = {token: index for index, token in enumerate([*tokens, *special.values()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    if spaces:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **special
    )


def tiny_gpt2(vocabulary: int = VOCABULARY, width: int = 16, layers: int = 2, **more: Any) -> GPT2Config:
    """A GPT-2 that goes with :func:`word_tokenizer`; its dropout is transformers' 0.1 unless set."""
    from transformers import GPT2Config

    more = {"n_head": 2, "n_positions": POSITIONS, **more}
    return GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, **_special(vocabulary), **more)


def network(config: PretrainedConfig, seed: int = 0, spread: float = 3.0) -> PreTrainedModel:
    """A model whose logits differ by about `spread`, where transformers' own beginning is all but uniform.

    Every weight but those of norms is drawn anew; in evaluation mode, single precision.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name and parameter.dim() == 2:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(vocabulary, (4, 8))
        more = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
        logits = model(input_ids=tokens, **more).logits
        model.get_output_embeddings().weight.mul_(spread / logits.std())
    return model


def bigram(probabilities: Tensor) -> PreTrainedModel:
    """A GPT-2 without dropout that looks one token back: row i of the table is what follows token i.

    Token i is embedded as 1 at i and -1 at i + n, of 2n numbers, and the final norm multiplies that by the root of n
    before the head reads it. Positions, attention and the rest add nothing.
    """
    from transformers import AutoModelForCausalLM

    n = len(probabilities)
    config = tiny_gpt2(
        n, width=2 * n, layers=1, tie_word_embeddings=False, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    body = model.transformer
    with torch.no_grad():
        body.wte.weight.copy_(torch.cat([torch.eye(n), -torch.eye(n)], dim=1))
        for parameter in [body.wpe.weight, *body.h[0].attn.c_proj.parameters(), *body.h[0].mlp.c_proj.parameters()]:
            parameter.zero_()
        logits = probabilities.log().clamp(min=-1e4)
        model.lm_head.weight.copy_(torch.cat([logits.T, torch.zeros(n, n)], dim=1) / n**0.5)
    return model


class Scripted:
    """A policy that says what is written for it, whatever is drawn: the first token of a prompt names its line.

    The value before token t of line i is 100 i + t. Where a line has come to its end, token 20 follows, which must
    never be seen.
    """

    def __init__(self, lines: Sequence[Sequence[int]], prompt_width: int) -> None:
        self.lines = lines
        self.prompt_width = prompt_width
        self.batch_sizes: list[int] = []

    def check_room(self, prompt_mask: torch.Tensor, max_new_tokens: int) -> None:
        """There always is some."""

    def begin(self, prompt_tokens: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor, None]:
        return prompt_tokens, prompt_mask, None

    def next_token(self, tokens: Tensor, mask: Tensor, cache: Any) -> NextToken:
        assert cache is None
        assert tokens.shape == mask.shape
        self.batch_sizes.append(len(tokens))
        t = tokens.shape[1] - self.prompt_width
        logits = torch.zeros(len(tokens), VOCABULARY)
        values = torch.zeros(len(tokens))
        for i in range(len(tokens)):
            line = int(tokens[i][mask[i]][0])
            logits[i, self.lines[line][t] if t < len(self.lines[line]) else 20] = 1e4
            values[i] = 100.0 * line + t
        return NextToken(logits, values, None)


def written(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int = PAD) -> Rollouts:
    """Prompts and responses as a sampler hands them on; what only it knows is 0."""
    prompt_tokens, prompt_mask = padded(prompts, pad, "left")
    response_tokens, response_mask = padded(responses, pad, "right")
    return Rollouts(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        prompts=[""] * len(prompts),
        response_tokens=response_tokens,
        response_mask=response_mask,
        sampled_mask=response_mask,
        old_logprobs=torch.zeros(response_mask.shape),
        truncated=torch.zeros(len(prompts), dtype=torch.bool),
        responses=[""] * len(prompts),
    )


def random_rows(lengths: Sequence[int], seed: int = 0, below: int = EOS) -> list[list[int]]:
    """Rows of so many random tokens each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(below, (length,), generator=generator).tolist() for length in lengths]


def _special(vocabulary: int) -> dict[str, int]:
    return {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 2, "pad_token_id": vocabulary - 1}


def _config(name: str, **arguments: Any) -> Callable[..., PretrainedConfig]:
    def build(**more: Any) -> PretrainedConfig:
        import transformers

        defaults = {"vocab_size": VOCABULARY, **_special(VOCABULARY)}
        return getattr(transformers, f"{name}Config")(**{**defaults, **arguments, **more})

    build.arguments = arguments
    return build


def deep(name: str, **more: Any) -> PretrainedConfig:
    """An architecture with four blocks instead of two."""
    layers = {"num_hidden_layers": 4, "n_layer": 4, "num_layers": 4}
    known = {key: value for key, value in layers.items() if key in ARCHITECTURES[name].arguments}
    if name == "gpt_neo":
        known["attention_types"] = [[["global", "local"], 2]]
    return ARCHITECTURES[name](**known, **more)


_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
_NEW = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = {**_NEW, "num_key_value_heads": 1}

ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "gpt2": _config("GPT2", **_GPT),
    "gptj": _config("GPTJ", **_GPT, rotary_dim=4),
    "gpt_neox": _config("GPTNeoX", **_NEW),
    "opt": _config(
        "OPT",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=8,
    ),
    "bloom": _config("Bloom", hidden_size=16, n_layer=2, n_head=2),
    "llama": _config("Llama", **_NEW),
    "qwen3": _config("Qwen3", **_GROUPED, head_dim=8),
    "gemma": _config("Gemma", **_GROUPED, head_dim=8),
    "mistral": _config("Mistral", **_GROUPED, sliding_window=8),
    "phi": _config("Phi", **_NEW),
    "gemma2": _config("Gemma2", **_GROUPED, head_dim=8, sliding_window=8),
    "gpt_neo": _config(
        "GPTNeo",
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=POSITIONS,
    ),
    "gpt_bigcode": _config("GPTBigCode", **_GPT),
    "mixtral": _config("Mixtral", **_GROUPED, num_local_experts=4),
    "openai_gpt": _config("OpenAIGPT", **_GPT),
    "rwkv": _config("Rwkv", hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, context_length=POSITIONS),
    "mamba": _config("Mamba", hidden_size=16, num_hidden_layers=2),
}
"""Tiny decoder-only networks with the special ids of :func:`word_tokenizer`: ten usual ones, four more, three odd."""

_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": PAD}
_BART = {"d_model": 16, "decoder_start_token_id": EOS, "max_position_embeddings": POSITIONS}
_BART |= {"forced_eos_token_id": None}  # transformers would end with it what is cut off
for _side in ("encoder", "decoder"):
    _BART |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 2, f"{_side}_ffn_dim": 32}

ENCODER_DECODERS: dict[str, Callable[..., PretrainedConfig]] = {
    "t5": _config("T5", **_T5),
    "t5_gated": _config("T5", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": _config("MT5", **_T5),
    "bart": _config("Bart", **_BART),
    "mbart": _config("MBart", **_BART),
    "pegasus": _config("Pegasus", **_BART),
    "marian": _config("Marian", **_BART),
}
"""Tiny encoder-decoders with the same ids; what is written begins behind `<pad>` or `<eos>`."""

ENCODERS: dict[str, Callable[..., PretrainedConfig]] = {
    "bert": _config("Bert", **_NEW),
    "roberta": _config("Roberta", **{**_NEW, "max_position_embeddings": POSITIONS + PAD + 1}),  # its first is PAD + 1
    "modernbert": _config("ModernBert", **_NEW, cls_token_id=0),
}
"""Tiny encoders with the same ids."""

WIDE: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: tiny_gpt2(width=64),
    "gpt_neox": lambda: ARCHITECTURES["gpt_neox"](hidden_size=64, intermediate_size=128),
    "gptj": lambda: ARCHITECTURES["gptj"](n_embd=64),
    "llama": lambda: ARCHITECTURES["llama"](hidden_size=64, intermediate_size=128),
    "qwen3": lambda: ARCHITECTURES["qwen3"](hidden_size=64, intermediate_size=128),
    "gemma": lambda: ARCHITECTURES["gemma"](hidden_size=64, intermediate_size=128),
    "opt": lambda: ARCHITECTURES["opt"](hidden_size=64, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": lambda: ARCHITECTURES["bloom"](hidden_size=64),
    "t5": lambda: ENCODER_DECODERS["t5"](d_model=64, d_kv=16, d_ff=64),
    "bart": lambda: ENCODER_DECODERS["bart"](d_model=64),
}
"""Ten families wide enough to be quantised, since four-bit weights are rounded in groups of 64."""

USUAL = list(ARCHITECTURES)[:10]
MORE = list(ARCHITECTURES)[10:14]
ODD = list(ARCHITECTURES)[14:]


def with_soft_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The model, of T5's kind with smaller queries.

    T5 does not scale its scores, so that with weights of this size attention is one-hot: in some places it would have
    no gradient, and in others single precision is 6e-5 off in the logits.
    """
    for key, parameter in model.named_parameters():
        if key.endswith("Attention.q.weight"):
            parameter.data.mul_(0.1)
    return model


class Counting(nn.Module):
    """A block that must have been told how many ran before it."""

    def __init__(self, block: nn.Module, ran: list[int]) -> None:
        super().__init__()
        self.block, self.ran = block, ran

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.ran.append(1)
        return self.block(states * len(self.ran) ** 0.5, *args, **kwargs)


def counting_gpt2(**more: Any) -> PreTrainedModel:
    """A GPT-2 that computes something else where its lower blocks do not run."""
    model, ran = network(tiny_gpt2(**more)), []
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = Counting(block, ran)
    model.register_forward_pre_hook(lambda *_: ran.clear())
    return model
