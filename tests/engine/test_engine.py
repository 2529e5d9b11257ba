"""The engine against `generate`: any schedule gives each request what it gets alone."""

from collections.abc import Callable

from twotower.decoding.generate import generate
from twotower.decoding.params import MODES, SamplingParams
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine


def test_results_are_those_of_generate(tiny: Callable) -> None:
    model = tiny("M*-E")
    prompts = [[4 + (i * 7 + j) % 30 for j in range(1 + 9 * i)] for i in range(2 * len(MODES))]
    params = [
        SamplingParams(mode=mode, max_new_tokens=9 + i, block_size=6, temperature=temperature, seed=i)
        for i, (temperature, mode) in enumerate((t, m) for t in (0.0, 1.0) for m in MODES)
    ]
    engine = Engine(
        model, EngineConfig(max_num_requests=4, prompt_chunk=16, state_bytes=1 << 20, snapshot_bytes=1 << 16)
    )
    for ours, (prompt, p) in zip(engine.generate(prompts, params), zip(prompts, params, strict=True), strict=True):
        alone = generate(model, [prompt], p)[0]
        assert ours.token_ids == alone.token_ids
        assert ours.commit_steps == alone.commit_steps
        assert ours.finish_reason == alone.finish_reason
        assert ours.stats.denoiser_calls == alone.stats.denoiser_calls
        assert ours.stats.context_calls == alone.stats.context_calls
    engine.clear_cache()
    assert engine.stats().bytes_used == 0
    assert not engine.has_work
