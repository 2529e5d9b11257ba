"""The levers: every variant learns something else, and what is counted is what decoding did."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from twotower.checkpoints import save
from twotower.decoding.output import Generation, GenerationStats
from twotower.training.corpus.shards import CorpusRows, write_shard

FOLDER = Path(__file__).parents[2] / "benchmarks"
BOS, EOS, BLOCK = 1, 2, 4


@pytest.fixture
def levers(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("levers", FOLDER / "levers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(levers, tiny, byte_tokenizer, tmp_path, monkeypatch, capsys):
    model = tiny(block_size=BLOCK, eos_token_id=EOS, vocab_size=260)
    model.tokenizer = byte_tokenizer
    save(model, tmp_path / "start")
    rng = np.random.default_rng(0)
    ids = np.stack([[*rng.integers(4, 260, 5), EOS] * 4 for _ in range(8)])
    ids[:, ::6] = BOS
    scored, document = np.broadcast_to(np.arange(24) % 6 > 1, ids.shape), np.broadcast_to(np.arange(24) // 6, ids.shape)
    write_shard(tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, scored, document))
    monkeypatch.setattr(levers, "right", lambda model, found, exam: len(found))

    def call(*options):
        paths = (tmp_path / "start", tmp_path / "corpus", tmp_path / "corpus", tmp_path / "runs.jsonl")
        sizes = ("--steps", 6, "--batch-size", 4, "--questions", 3, "--learning-rate", 0.01)
        monkeypatch.setattr(sys, "argv", [str(o) for o in ("levers.py", *paths, *sizes, *options)])
        levers.main()
        return json.loads(capsys.readouterr().out)

    call.runs = tmp_path / "runs.jsonl"
    return call


@pytest.mark.slow
def test_no_lever_is_the_base(command, levers):
    found = command("--seeds", 1)
    losses = [own["values"]["loss"]["mean"] for own in found["variants"].values()]
    assert set(found["variants"]) == set(levers.LEVERS) == set(found["expected"])
    assert len({round(loss, 9) for loss in losses}) == len(losses)
    assert found["answers"] == found["ar_right"] == 3
    assert set(found["untrained"]) == set(found["variants"]["base"]["values"]) - {"loss"}


def test_runs_that_are_there_are_not_made_again(command, levers, monkeypatch):
    made = []
    monkeypatch.setattr(levers, "run", lambda *a: made.append(a[-2:]) or {"loss": float(len(made))})
    first = command("--seeds", 2, "--variants", "base,drafting")
    assert made == [("base", 0), ("drafting", 0), ("base", 1), ("drafting", 1)]
    assert command("--seeds", 2, "--variants", "base,drafting")["variants"] == first["variants"]
    assert len(made) == 4
    assert first["variants"]["drafting"]["minus_base"]["loss"]["mean"] == 1
    with pytest.raises(ValueError, match=r"runs\.jsonl line 1 is a run with threshold 0\.9, not 0\.5; give"):
        command("--threshold", 0.5)


def test_an_unknown_lever_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        command("--variants", "base,magic")
    assert "variants is 'magic', must be one of base, drafting" in capsys.readouterr().err


def test_a_pass_is_one_of_either_tower_after_the_prompt_s(levers):
    def done(tokens, nfes, passes):
        stats = GenerationStats(
            denoiser_calls=nfes, context_calls=passes, seconds_to_first_token=0, seconds_total=0, num_tokens=tokens
        )
        rest = {"text": "", "finish_reason": "stop", "stop_string": None, "commit_steps": [], "confidences": []}
        return Generation(token_ids=[], stats=stats, top=[], **rest)

    assert levers.per_pass([done(12, 2, 3), done(8, 3, 4)]) == 20 / (2 + 2 + 3 + 3)
