"""Towers on two devices, as far as that can be told without any."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine

PROGRAM = Path(__file__).parent / "absent_devices.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"pattern": "M*-"}, {"pattern": "*-", "use_rope": True, "tie_word_embeddings": True}])
def test_towers_on_two_devices_wait_for_nothing_but_the_rounds_results(kind, sizes):
    """Without experts: the reference op of `E` layers reads its routing back."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices that are made in Python")
    command = [sys.executable, str(PROGRAM), json.dumps(sizes | kind)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["waits"] == []
    assert found["finished"] == 2 * len(MODES) + 1
    assert found["steps per read"] >= len({"ar", "mock_ar", "diffusion", "verified"})


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
def test_finished_blocks_are_absorbed_while_others_denoise(apart, tiny, monkeypatch):
    """Work that waits for a device waits for all that was launched there before: with commits apart, the denoiser has
    its work before the context tower has any, and none of it needs the context tower's."""
    model, calls = tiny("M*-E"), []
    score, denoise = model.score, model.denoiser_logits
    monkeypatch.setattr(model, "score", lambda *args: (calls.append("context"), score(*args))[1])
    monkeypatch.setattr(model, "denoiser_logits", lambda *args: (calls.append("denoiser"), denoise(*args))[1])
    prompts = [[5] * (1 + i) for i in range(4)]
    params = [SamplingParams(max_new_tokens=40, block_size=5 + i, confidence_threshold=0.3) for i in range(4)]
    engine = Engine(model, EngineConfig(commits_apart=apart))
    names, results, rounds = [engine.add(p, s) for p, s in zip(prompts, params, strict=True)], {}, []
    while engine.has_work:
        calls.clear()
        results |= {event.request_id: event.result for event in engine.step() if event.result}
        rounds.append(tuple(calls))
    assert [results[name].token_ids for name in names] == [g.token_ids for g in generate(model, prompts, params)]
    both = [order for order in rounds if len(set(order)) == 2]
    assert both
    assert all((order[-1] == "context") == apart for order in both)
    assert max(order.count("denoiser") for order in rounds) == 1
