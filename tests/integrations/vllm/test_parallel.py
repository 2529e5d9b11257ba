"""Tensor parallelism: two processes of vLLM on one machine."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

import twotower

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, settings, prompts, modes = json.loads(sys.argv[1])
    engine = LLM(
        folder, dtype="float32", max_model_len=256, enforce_eager=True, tensor_parallel_size=2,
        skip_tokenizer_init=True, disable_log_stats=False, **settings,
    )
    common = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False, "logprobs": 1}
    params = [SamplingParams(**common, extra_args=mode and {"mode": mode}) for mode in modes]
    outputs = engine.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
    places = [zip(output.outputs[0].logprobs, output.outputs[0].token_ids) for output in outputs]
    print("LOGPROBS", json.dumps([[place[token].logprob for place, token in one] for one in places]))
    drafted = sum(m.value for m in engine.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    print("DRAFTED", int(drafted))
"""
DENOISER = {"additional_config": {"twotower": {"denoiser": True}}}
DRAFTER = "twotower.integrations.vllm.drafter.TwoTowerDrafter"
DRAFTS = {"speculative_config": {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 16}}


@pytest.fixture
def run(tmp_path):
    """run(folder, settings, prompts, modes): what the program above printed, both streams."""
    (tmp_path / "program.py").write_text(PROGRAM)  # a file: vLLM's processes import it again

    def one(folder, settings, prompts, modes=None):
        asked = [str(folder), settings, prompts, modes or [None] * len(prompts)]
        command = [sys.executable, tmp_path / "program.py", json.dumps(asked)]
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return one


@pytest.fixture
def printed():
    """printed(ran, name): what a line of the program's says behind a name."""

    def of(ran, name):
        found = [line for line in ran.stdout.splitlines() if line.startswith(f"{name} ")]
        assert found, ran.stdout
        return json.loads(found[0].removeprefix(f"{name} "))

    return of


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("name", ["stories", "hybrid"])
def test_two_processes_give_our_tokens(name, run, printed, checkpoint, expected, prompts) -> None:
    ids = prompts(4)
    ran = run(checkpoint(name), {}, ids)
    assert printed(ran, "TOKENS") == expected(name, ids, 40)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("name", ["stories", "hybrid", "llama", "M*-"])
def test_a_denoiser_in_two_processes_gives_our_tokens(name, run, printed, checkpoint, expected, prompts) -> None:
    ids = prompts(6)
    ran = run(checkpoint(name), DENOISER | DRAFTS, ids, ["diffusion", "verified", "ar"] * 2)
    found = printed(ran, "TOKENS")
    assert found[0::3] == expected(name, ids[0::3], 40, "diffusion")
    assert found[1::3] == expected(name, ids[1::3], 40)
    assert found[2::3] == expected(name, ids[2::3], 40)
    assert name == "M*-" or printed(ran, "DRAFTED") > 0  # random towers agree by chance alone
    params = twotower.SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True)
    ours = twotower.generate(twotower.load(checkpoint(name), dtype="float32"), ids[0::3], params)
    for theirs, one in zip(printed(ran, "LOGPROBS")[0::3], ours, strict=True):
        # float32, and other kernels for both towers
        assert theirs == pytest.approx([math.log(p) for p in one.confidences], abs=2e-4)
