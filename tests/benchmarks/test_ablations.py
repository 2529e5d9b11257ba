"""The ablations: every variant takes something away, and what is measured is what decoding does."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import twotower
from twotower.checkpoints import save
from twotower.config import TwoTowerConfig
from twotower.training.corpus.shards import CorpusBatch, CorpusRows, write_shard
from twotower.training.forward.layout import make_layout
from twotower.training.masks.noise import Corrupted

FILE = Path(__file__).parents[2] / "benchmarks" / "ablations.py"
BOS, EOS, BLOCK = 1, 2, 4
CONFIG = TwoTowerConfig(vocab_size=40, hidden_size=8, pattern="-", intermediate_size=8, block_size=BLOCK)


@pytest.fixture(scope="module")
def ablations():
    spec = importlib.util.spec_from_file_location("ablations", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("start")
    save(tiny(block_size=BLOCK, eos_token_id=EOS), path)
    return path


def row(*documents):
    """Ids, scored and document numbers of (prompt, answer) pairs."""
    ids = [i for prompt, answer in documents for i in (*prompt, *answer)]
    scored = [s for prompt, answer in documents for s in (*[False] * len(prompt), *[True] * len(answer))]
    number = [n for n, (prompt, answer) in enumerate(documents) for _ in (*prompt, *answer)]
    return ids, scored, number


def batch(*rows):
    ids, scored, document = (torch.tensor(part) for part in zip(*rows, strict=True))
    return CorpusBatch(ids, scored, document, torch.arange(len(ids)))


def write_corpus(path, seed):
    """Rows of two documents, whose answers are of 6 tokens."""
    rng = np.random.default_rng(seed)
    documents = [[([BOS, *rng.integers(4, 40, 5)], [*rng.integers(4, 40, 5), EOS]) for _ in "ab"] for _ in range(8)]
    ids, scored, document = (np.array(part) for part in zip(*(row(*pair) for pair in documents), strict=True))
    write_shard(path / "0.safetensors", CorpusRows(ids, scored, document))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 0)


@pytest.fixture
def command(ablations, start, corpus, tmp_path, monkeypatch, capsys):
    def call(*options: object, start: Path = start, corpus: Path = corpus) -> dict:
        paths = (start, corpus, corpus, tmp_path / "runs.jsonl")
        monkeypatch.setattr(sys, "argv", [str(o) for o in ("ablations.py", *paths, "--batch-size", 4, *options)])
        ablations.main()
        return json.loads(capsys.readouterr().out)

    call.runs = tmp_path / "runs.jsonl"
    return call


@pytest.mark.slow
def test_no_variant_is_the_base(command, ablations):
    found = command("--steps", 6, "--learning-rate", 0.01, "--seeds", 1)["variants"]
    assert set(found) == set(ablations.variants(6))
    losses = {name: own["values"]["loss"]["mean"] for name, own in found.items()}
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses)
    ar_right = {name: own["minus_base"]["ar_right"]["mean"] for name, own in found.items()}
    assert {name for name, change in ar_right.items() if change} <= {"tied", "joint"}


@pytest.mark.slow
def test_runs_that_are_there_are_not_made_again(command, ablations, monkeypatch, tiny, tmp_path):
    other_start, other_corpus = tmp_path / "start", write_corpus(tmp_path / "corpus", 1)
    save(tiny(block_size=BLOCK, eos_token_id=EOS, seed=1), other_start)
    first = command("--steps", 2, "--seeds", 1)
    lines = command.runs.read_text().splitlines()
    command.runs.write_text("\n".join(lines[:-1]) + "\n")  # as after a kill
    trained = []
    run = ablations.run
    monkeypatch.setattr(ablations, "run", lambda *a: trained.append(a[-2:]) or run(*a))
    assert command("--steps", 2, "--seeds", 1)["variants"] == first["variants"]
    assert trained == [("distilled", 0)]
    with pytest.raises(ValueError, match=r"runs\.jsonl line 1 is a run with steps 2, not 3; give"):
        command("--steps", 3, "--seeds", 1)
    with pytest.raises(ValueError, match=r"line 1 is a run with start_sha256 \w{16}, not \w{16}"):
        command("--steps", 2, "--seeds", 1, start=other_start)
    with pytest.raises(ValueError, match=r"line 1 is a run with corpus_sha256 \w{16}, not \w{16}"):
        command("--steps", 2, "--seeds", 1, corpus=other_corpus)
    monkeypatch.setattr(ablations, "THRESHOLD", 0.9)
    with pytest.raises(ValueError, match=r"line 1 is a run with threshold 0\.8, not 0\.9"):
        command("--steps", 2, "--seeds", 1)


def test_only_the_seeds_that_are_asked_for_count(command, ablations, monkeypatch):
    monkeypatch.setattr(ablations, "run", lambda *a: {"loss": float(a[-1] ** 2)})
    command("--seeds", 3)
    assert command("--seeds", 2)["variants"]["base"]["values"]["loss"]["mean"] == 0.5
    assert command("--seeds", 5)["variants"]["base"]["values"]["loss"]["mean"] == 6


@pytest.mark.parametrize("seeds", [0, 6])
def test_there_are_intervals_for_1_to_5_seeds(command, seeds, capsys):
    with pytest.raises(SystemExit):
        command("--seeds", seeds)
    assert "choose from 1, 2, 3, 4, 5" in capsys.readouterr().err.replace("'", "")


def test_what_is_taken_away(ablations, ids):
    x = ids(2, 12)
    layout = make_layout(torch.zeros_like(x), BLOCK)
    masked = torch.zeros_like(x, dtype=torch.bool)
    noisy = Corrupted(x, masked, torch.full((2, 12), 0.3), torch.full((2, 12), 0.3), ~masked, layout)
    assert ablations.unseeded(noisy).layout.document_start.tolist() == [[0] * 4 + [4] * 4 + [8] * 4] * 2
    assert ablations.untimed(noisy).told.unique().tolist() == [1.0]
    assert ablations.untimed(noisy).level is noisy.level


def test_blocks_start_with_the_answer_and_only_whole_answers_are_judged(ablations):
    first = ([BOS, 5, 6], [7, 8, EOS, EOS, EOS])
    rows = batch(row(([9, 9], [9, EOS]), first, ([BOS, 5], [7])))  # cut off before the row, whole, cut off after it
    held_out = ablations.answers(rows, CONFIG)
    assert held_out.judged[0].nonzero().flatten().tolist() == [7, 8, 9]
    assert held_out.layout.block_start[0, 7:12].tolist() == [7, 7, 7, 7, 11]
    wrong = torch.zeros(1, 15, dtype=torch.bool)
    wrong[0, 10] = wrong[0, 3] = True  # behind the end, and in another document
    assert ablations.share_right(wrong, held_out) == 1
    wrong[0, 9] = True
    assert ablations.share_right(wrong, held_out) == 0


@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.99])
def test_it_measures_what_decoding_does(ablations, start, ids, threshold):
    model = twotower.load(start, dtype=torch.float32, pack=False)
    prompts = [[BOS, *line] for line in ids(6, 5, seed=3).tolist()]
    params = twotower.SamplingParams(
        mode="diffusion", block_size=BLOCK, max_new_tokens=BLOCK, confidence_threshold=threshold, ignore_eos=True
    )
    done = [twotower.generate(model, [prompt], params)[0] for prompt in prompts]
    answers = [list(g.token_ids) for g in done]
    answers[0][2] = 4 + (answers[0][2] == 4)  # so that one is not what decoding gives
    filler = ([BOS, 4], [EOS])  # after a whole document, whose own end is the block's, comes one that is not judged
    rows = batch(*(row((prompt, [*answer]), filler) for prompt, answer in zip(prompts, answers, strict=True)))
    held_out = ablations.answers(rows, CONFIG)
    found = ablations.measure(model, held_out, lambda noisy: noisy, threshold)
    judged = held_out.judged.any(1)
    assert judged.all()
    assert found["right"] == pytest.approx(5 / 6)
    calls = [g.stats.denoiser_calls for g in done]
    assert found["passes"] == pytest.approx((sum(calls) + len(calls)) / (2 * len(calls)))  # the fillers take one each


def test_the_context_towers_own_share_is_the_same_whatever_the_denoiser_sees(ablations, start, ids):
    model = twotower.load(start, dtype=torch.float32, pack=False)
    prompts = [[BOS, *line] for line in ids(4, 7, seed=5).tolist()]
    greedy = twotower.SamplingParams(mode="ar", max_new_tokens=BLOCK, ignore_eos=True)
    answers = [list(twotower.generate(model, [prompt], greedy)[0].token_ids) for prompt in prompts]
    answers[0][1] = 4 + (answers[0][1] == 4)
    rows = batch(*(row((p, a), ([BOS, 4], [EOS])) for p, a in zip(prompts, answers, strict=True)))
    held_out = ablations.answers(rows, CONFIG)
    for change in (lambda noisy: noisy, ablations.unseeded):
        assert ablations.measure(model, held_out, change, 0.8)["ar_right"] == pytest.approx(3 / 4)


def test_leading_places_are_counted_up_to_the_first_wrong_one(ablations):
    held_out = ablations.answers(batch(row(([BOS, 5], [6, 7, 8, 9, 6, EOS]), ([BOS], [5]))), CONFIG)
    right = torch.tensor([[False, False, True, True, False, True, True, True, False, False]])
    assert ablations.leading(right, held_out) == pytest.approx((2 + 2) / 6)


def test_intervals(ablations):
    found = ablations.summary([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["half_width_95"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert ablations.summary([1.0]) == {"mean": 1.0, "half_width_95": None}
    made = (("base", 0, 1.0), ("base", 1, 2.0), ("a", 0, 3.0), ("a", 1, 4.0))
    runs = [{"variant": name, "seed": seed, "measures": {"loss": loss}} for name, seed, loss in made]
    assert ablations.summaries(runs)["a"]["minus_base"]["loss"] == {"mean": 2.0, "half_width_95": 0.0}
