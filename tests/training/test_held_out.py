import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.training.corpus.shards import Corpus, CorpusBatch, CorpusRows, write_shard
from twotower.training.held_out import answer, measure, questions
from twotower.training.objectives.protocol import Measured
from twotower.training.run.ranks import Ranks


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    ids = np.arange(35).reshape(7, 5)
    write_shard(tmp_path / "0.safetensors", CorpusRows(ids, np.ones_like(ids), ids * 0))
    return Corpus(tmp_path, vocab_size=40)


@pytest.mark.parametrize("at_once", [1, 2, 7, 100])
def test_every_row_counts_once(at_once: int, corpus: Corpus) -> None:
    seen: list[int] = []

    def objective(batch: CorpusBatch) -> dict[str, Measured]:
        seen.extend(batch.ids[:, 0].tolist())
        return {"first": Measured(float(batch.ids[:, 0].sum()), len(batch.ids)), "none": Measured(0.0, 0.0)}

    assert measure(corpus, at_once, Ranks(), objective) == {"first": 15.0, "none": 0.0}
    assert sorted(seen) == [0, 5, 10, 15, 20, 25, 30]


def test_fewer_rows_than_ranks_raise(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="has 7 rows, must have one for each of 8 ranks"):
        measure(corpus, 1, Ranks(0, 8), lambda batch: {})


def test_questions_are_whole_documents_with_a_prompt(tmp_path: Path, tiny: Callable) -> None:
    """BOS is 1, EOS 2. The row: the rest of a document, a question, its answer and two EOS, a text, a cut document."""
    ids = np.array([[8, 9, 2, 1, 5, 6, 7, 2, 2, 1, 9, 2, 1, 5, 6]])
    document = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3]])
    scored = np.array([[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1]])
    write_shard(tmp_path / "0.safetensors", CorpusRows(ids, scored, document))
    corpus, config = Corpus(tmp_path, vocab_size=40), tiny("*", eos_token_id=2).config
    assert list(questions(corpus, config)) == [([1, 5], [6, 7, 2])]
    endless = dataclasses.replace(config, eos_token_id=None)
    assert list(questions(corpus, endless)) == [([1, 5], [6, 7, 2, 2]), ([1, 5], [6])]


def test_answers_are_those_that_decoding_gives(tmp_path: Path, tiny: Callable) -> None:
    model = tiny("M*", block_size=4)
    prompts = [[1, 5 + i, 9, 7 + i] for i in range(6)]
    params = SamplingParams(max_new_tokens=8, block_size=4)
    results = generate(model, prompts, params)
    ids = np.array([prompt + result.token_ids for prompt, result in zip(prompts, results, strict=True)])
    ids[:2, -1] = (ids[:2, -1] + 1) % 40
    scored = np.broadcast_to(np.arange(12) >= 4, ids.shape)
    write_shard(tmp_path / "0.safetensors", CorpusRows(ids, scored, ids * 0))
    corpus = Corpus(tmp_path, vocab_size=40)
    calls = sum(result.stats.denoiser_calls for result in results)
    expected = {"tokens_per_nfe": 48 / calls, "exact_match": 4 / 6}
    assert answer(model, corpus, 4, Ranks()) == pytest.approx(expected)
    parts: list[Sequence[float]] = []

    class OneOfSeveral(Ranks):
        """One of several ranks, run alone: records what it would add up with the others."""

        def total(self, values: Sequence[float]) -> list[float]:
            parts.append(values)
            return [1.0] * 3

    for rank in range(7):  # the last has no question
        answer(model, corpus, 4, OneOfSeveral(rank, 7))
    assert [sum(column) for column in zip(*parts, strict=True)] == [4, 48, calls]
    ids[:, 0] = 9  # no BOS: continued from somewhere
    write_shard(tmp_path / "none" / "0.safetensors", CorpusRows(ids, scored, ids * 0))
    assert answer(model, Corpus(tmp_path / "none", vocab_size=40), 4, Ranks()) == {}
