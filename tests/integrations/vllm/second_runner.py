"""An engine of vLLM with its second model runner on a CPU, in a process of its own: its kernels are Triton's, which are
interpreted here, and vLLM asks for Triton once. `python second_runner.py '{"folder": …, "settings": {…}, "loads": …}'`
prints a line of JSON for what each load gave."""

import json
import os
import sys
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import torch
from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.driver import DriverBase


class CpuDriver(DriverBase):
    """What vLLM asks of a driver before it takes Triton for usable."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def serve(engine: Any, load: dict[str, Any], written: dict[str, list[Any]]) -> dict[str, Any]:
    """The tokens of each prompt of a load in its mode, what each step of vLLM gave it, and how its blocks came about;
    at the step that `abort` names first, the request that it names second ends."""
    from vllm import SamplingParams

    names, found, given = [], {}, []
    for prompt, mode in zip(load["prompts"], load["modes"], strict=True):
        common = {"temperature": 0, "max_tokens": load["most"], "ignore_eos": True, "detokenize": False}
        params = SamplingParams(**common | load.get("params", {}), extra_args={"mode": mode} | load.get("extra", {}))
        names.append(engine.add_request(f"{len(names)}", {"prompt_token_ids": prompt}, params))
    lengths = dict.fromkeys(map(str, range(len(names))), 0)
    written.clear()
    while engine.has_unfinished_requests():
        if load.get("abort") and load["abort"][0] == len(given):
            engine.abort_request([names[load["abort"][1]]], internal=True)
        before = dict(lengths)
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                found[output.request_id] = output.outputs[0]
        given.append([lengths[name] - before[name] for name in lengths])
    tops = [found[name].logprobs if name in found else None for name in lengths]
    return {
        "tokens": [list(found[name].token_ids) if name in found else None for name in lengths],
        "given": given,
        "blocks": [written.get(name, []) for name in names],
        "logprobs": [top and [[t.logprob for t in place.values()] for place in top] for top in tops],
        "hits": sum(m.value for m in engine.get_metrics() if m.name == "vllm:prefix_cache_hits"),
        "preemptions": sum(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions"),
    }


def main() -> None:
    """Starts the engine and prints what it gave."""
    from vllm import LLM

    from twotower.integrations.vllm.canvases import Canvases

    asked = json.loads(sys.argv[1])
    written: dict[str, list[Any]] = {}
    step = Canvases.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        full = step(*args, **kwargs)
        for name, block in full.items():
            written.setdefault(name, []).append([block.num_calls, [token.step for token in block.tokens]])
        return full

    Canvases.step = watched  # type: ignore[method-assign]
    common = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 8, "seed": 0}
    common |= {"skip_tokenizer_init": True, "disable_log_stats": False}
    engine = LLM(asked["folder"], **common | asked["settings"]).llm_engine
    assert engine.vllm_config.use_v2_model_runner
    for load in asked["loads"]:
        sys.stdout.write(f"GAVE {json.dumps(serve(engine, load, written))}\n")
        sys.stdout.flush()


# Of every process: vLLM's workers import this file again.
backends.clear()
backends["cpu"] = Backend(BaseBackend, CpuDriver)

if __name__ == "__main__":
    main()
