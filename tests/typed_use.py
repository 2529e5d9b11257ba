"""What a type checker says of the public names; `mypy` reads this file and nothing runs it.

A line with `type: ignore` must be an error of the kind it names, or mypy reports the comment as unused.
"""

from collections.abc import Iterator
from typing import assert_type

from torch import Tensor

import twotower

model = twotower.load("hybrid", dtype="float32", device="cpu")
assert_type(model, twotower.TwoTower)
params = twotower.SamplingParams(mode="verified", max_new_tokens=8, stop=("\n",))

[out] = twotower.generate(model, ["a"], params)
assert_type(out, twotower.Generation)
assert_type(out.stats.tokens_per_denoiser_call, float)
assert_type(twotower.stream(model, "a", params), Iterator[twotower.StepOutput])
assert_type([step.block for step in twotower.stream(model, "a")], list[twotower.BlockView | None])

engine = twotower.Engine(model, twotower.EngineConfig(max_num_requests=2))
assert_type(engine.generate(["a"], [params]), list[twotower.Generation])
assert_type(engine.stats(), twotower.EngineStats)

state = model.prefill([[1]])
assert_type(state, twotower.ContextState)
assert_type(state.next_logits, Tensor | None)
assert_type(model.denoise([[3] * 16], state), Tensor)

twotower.lod  # type: ignore[attr-defined]
twotower.load("hybrid", dtyp="float32")  # type: ignore[call-arg]
twotower.SamplingParams(mode="verifed")  # type: ignore[arg-type]
twotower.SamplingParams("verified")  # type: ignore[call-arg]
