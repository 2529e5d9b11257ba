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


def serve(engine: Any, load: list[dict[str, Any]], written: dict[str, list[Any]]) -> dict[str, Any]:
    """What each request of a load got: its tokens, how many in each step of vLLM, its log-probabilities, and how its
    blocks came about. Some come at a step that they name as `start`, and end so many steps later as `patience` says."""
    from vllm import SamplingParams

    names, found, given = dict[int, str](), dict[str, Any](), list[list[int]]()
    lengths = dict.fromkeys(map(str, range(len(load))), 0)
    written.clear()
    while len(names) < len(load) or engine.has_unfinished_requests():
        for number, asked in enumerate(load):
            start, patience = asked.get("start", 0), asked.get("patience")
            if start == len(given):
                common = {"temperature": 0, "ignore_eos": True, "detokenize": False} | asked["params"]
                params = SamplingParams(**common, extra_args={"mode": asked["mode"]} | asked.get("extra", {}))
                names[number] = engine.add_request(str(number), {"prompt_token_ids": asked["ids"]}, params)
            if patience is not None and start + patience == len(given):
                engine.abort_request([str(number)])
        before = dict(lengths)
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                found[output.request_id] = output
        given.append([lengths[name] - before[name] for name in lengths])
    outputs = [found.get(name) for name in lengths]
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    return {
        "tokens": [None if one is None else list(one.outputs[0].token_ids) for one in outputs],
        "given": given,
        "blocks": [written.get(names[number], []) for number in range(len(load))],
        "logprobs": [_numbers(one and one.outputs[0].logprobs) for one in outputs],
        "prompt_logprobs": [_numbers(one and one.prompt_logprobs) for one in outputs],
        "hits": counters["vllm:prefix_cache_hits"],
        "preemptions": counters["vllm:num_preemptions"],
    }


def _numbers(places: Any) -> Any:
    """vLLM's log-probabilities at each place as [[token, rank, number], …], or None where there are none."""
    return places and [place and [[i, one.rank, one.logprob] for i, one in place.items()] for place in places]


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
