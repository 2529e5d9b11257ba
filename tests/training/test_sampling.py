import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.training.data import Corpus
from twotower.training.sampling import SampleConfig, sample_rows, sample_shard


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
def test_rows_are_sampled_up_to_the_prefix_and_greedy_after_it(pattern: str, tiny: Callable) -> None:
    model = tiny(pattern)
    rows = sample_rows(model, rows=5, length=20, prefix=8, seed=1)
    assert rows.shape == (5, 20)
    assert bool((rows[:, 0] == 1).all())
    assert len({tuple(row) for row in rows[:, :8].tolist()}) == 5
    greedy = [g.token_ids for g in generate(model, rows[:, :8].tolist(), SamplingParams(mode="ar", max_new_tokens=12))]
    for row, expected in zip(rows[:, 8:].tolist(), greedy, strict=True):
        usable = next((i for i, t in enumerate(expected) if t in (0, 3)), len(expected))
        assert row[:usable] == expected[:usable]


@pytest.mark.parametrize("prefix", [1, 20])
def test_the_mask_and_the_unknown_token_never_occur(prefix: int, tiny: Callable) -> None:
    model = tiny("*", vocab_size=6)  # a third of six words
    rows = sample_rows(model, rows=40, length=20, prefix=prefix, seed=1)
    assert not bool(((rows == 0) | (rows == 3)).any())


def test_sampling_follows_the_context_tower(tiny: Callable) -> None:
    model = tiny("*", vocab_size=6)
    rows = sample_rows(model, rows=4000, length=2, prefix=2, seed=0)
    logits = model.context_logits([[1]])[0, 0]
    logits[[0, 3]] = -torch.inf
    frequencies = rows[:, 1].bincount(minlength=6) / 4000
    assert (frequencies - logits.softmax(-1)).abs().max() < 0.032  # 4 standard deviations of 0.008


def test_temperature_flattens_what_follows_the_prefix(tiny: Callable) -> None:
    model = tiny("*", vocab_size=6)
    settings = {"rows": 4000, "length": 2, "prefix": 1, "seed": 0}
    logits = model.context_logits([[1]])[0, 0]
    logits[[0, 3]] = -torch.inf
    for temperature in (0.5, 2.0):
        rows = sample_rows(model, temperature=temperature, **settings)
        frequencies = rows[:, 1].bincount(minlength=6) / 4000
        assert (frequencies - (logits / temperature).softmax(-1)).abs().max() < 0.032  # 4 standard deviations
    assert sample_rows(model, temperature=0.0, **settings)[:, 1].unique().tolist() == [int(logits.argmax())]


def test_a_shard_depends_on_config_and_index_alone_and_is_written_once(tiny: Callable, tmp_path: Path) -> None:
    model = tiny("*")
    config = SampleConfig(rows=3, length=30, temperatures=(0, 1), longest_prefix=20, seed=1)
    files = [sample_shard(model, tmp_path / "a", index, config) for index in range(6)]
    assert [file.name for file in files] == [f"0000{index}.safetensors" for index in range(6)]
    again = sample_shard(model, tmp_path / "b", 2, config)
    assert files[2].read_bytes() == again.read_bytes()
    before = files[0].stat().st_mtime_ns
    sample_shard(model, tmp_path / "a", 0, dataclasses.replace(config, seed=2))
    assert files[0].stat().st_mtime_ns == before
    corpus = Corpus(tmp_path / "a", vocab_size=40)
    assert (len(corpus), corpus.length) == (18, 30)
    starts = {int(corpus.row(i).scored.argmax()) for i in range(18)}
    assert 1 in starts  # both kinds: scored throughout, and after a prefix
    assert 1 < max(starts) <= 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows is 0, must be at least 1"),
        ({"length": 1}, "length is 1, must be at least 2"),
        ({"temperatures": ()}, "temperatures are"),
        ({"temperatures": (0.5, -1)}, r"must be one or more numbers in \[0, 100\]"),
        ({"shortest_prefix": 0}, "prefixes are 0 to 159"),
        ({"shortest_prefix": 9, "longest_prefix": 8}, "prefixes are 9 to 8"),
        ({"longest_prefix": 256}, "< length=256"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_raise(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleConfig(**change)


def test_bad_prefixes_raise(tiny: Callable) -> None:
    for prefix in (0, 6):
        with pytest.raises(ValueError, match=rf"prefix is {prefix}, must be in \[1, length=5\]"):
            sample_rows(tiny("*"), rows=1, length=5, prefix=prefix, seed=0)
    with pytest.raises(ValueError, match="no bos_token_id"):
        sample_rows(tiny("*", bos_token_id=None), rows=1, length=5, prefix=1, seed=0)
