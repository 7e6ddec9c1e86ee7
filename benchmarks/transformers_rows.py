"""How transformers does the work, where it does it at all: generation."""

from __future__ import annotations

import torch

from benchmarks import workload
from benchmarks.worker import Gate
from benchmarks.workload import Case


@torch.no_grad()
def generate(case: Case, gate: Gate) -> None:
    """From prompts to responses, both as text, by ``model.generate``.

    Args:
        case: What is done.
        gate: Where to wait between batches.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = case.network.on_gpu
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(case.folder)
    prompts = case.prompts()
    for start in range(0, len(prompts), workload.BATCH):
        batch = tokenizer(prompts[start : start + workload.BATCH], padding=True, return_tensors="pt").to(device)
        tokens = model.generate(
            **batch,
            max_new_tokens=case.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
        )
        responses = tokens[:, batch["input_ids"].shape[1] :]
        tokenizer.batch_decode(responses, skip_special_tokens=True)
        seconds = gate.since_start()
        lengths = [workload.length_of(response) for response in responses]
        gate.wait(list(zip(batch["attention_mask"].sum(1).tolist(), lengths, strict=True)), generate=seconds)


RUNS = {"generate": generate}
"""How each row is run."""
