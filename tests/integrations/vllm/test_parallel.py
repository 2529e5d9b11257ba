"""Tensor parallelism: two processes of vLLM on one machine."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, settings, prompts = json.loads(sys.argv[1])
    engine = LLM(
        folder, dtype="float32", max_model_len=256, enforce_eager=True, tensor_parallel_size=2,
        skip_tokenizer_init=True, additional_config=settings,
    )
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.fixture
def run(tmp_path):
    """run(folder, settings, prompts): what the program above printed, both streams."""
    (tmp_path / "program.py").write_text(PROGRAM)  # a file: vLLM's processes import it again

    def one(folder, settings, prompts):
        command = [sys.executable, tmp_path / "program.py", json.dumps([str(folder), settings, prompts])]
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return one


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("name", ["stories", "hybrid"])
def test_two_processes_give_our_tokens(name, run, checkpoint, expected, prompts) -> None:
    ids = prompts(4)
    ran = run(checkpoint(name), {}, ids)
    found = [line for line in ran.stdout.splitlines() if line.startswith("TOKENS ")]
    assert found, ran.stdout
    assert json.loads(found[0].removeprefix("TOKENS ")) == expected(name, ids, 40)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
def test_the_denoiser_is_refused_in_two_processes(run, checkpoint, prompts) -> None:
    ran = run(checkpoint("llama"), {"twotower": {"denoiser": True}}, prompts(1))
    assert ran.returncode != 0
    assert "the denoiser needs --tensor-parallel-size 1" in ran.stdout
