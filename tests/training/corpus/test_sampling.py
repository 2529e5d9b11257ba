import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError
from twotower.training.corpus.sampling import SampleConfig, beginnings, keep_settings, sample_rows, sample_shard
from twotower.training.corpus.shards import Corpus


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
def test_rows_are_sampled_up_to_the_prefix_and_greedy_after_it(pattern: str, tiny: Callable) -> None:
    model = tiny(pattern)
    rows = sample_rows(model, beginnings(model, 5), length=20, prefix=8, seed=1).ids
    assert rows.shape == (5, 20)
    assert bool((rows[:, 0] == 1).all())
    assert len({tuple(row) for row in rows[:, :8].tolist()}) == 5
    greedy = [g.token_ids for g in generate(model, rows[:, :8].tolist(), SamplingParams(mode="ar", max_new_tokens=12))]
    for row, expected in zip(rows[:, 8:].tolist(), greedy, strict=True):
        usable = next((i for i, t in enumerate(expected) if t == 3), len(expected))
        assert row[:usable] == expected[:usable]


@pytest.mark.parametrize("prefix", [1, 20])
def test_the_mask_and_the_unknown_token_never_occur(
    prefix: int, tiny: Callable, byte_tokenizer: tokenizers.Tokenizer
) -> None:
    model = tiny("*", vocab_size=6)  # a third of six words
    model.tokenizer = byte_tokenizer
    with torch.no_grad():
        model.context_lm_head.weight[3] = 9 * model.context_lm_head.weight[4]
    rows = sample_rows(model, beginnings(model, 40), length=20, prefix=prefix, seed=1).ids
    assert not bool(((rows == 0) | (rows == 3)).any())


def test_token_0_is_one_like_others_where_it_is_not_the_unknown(
    tiny: Callable, byte_tokenizer: tokenizers.Tokenizer
) -> None:
    model = tiny("*", vocab_size=6)
    raw = json.loads(byte_tokenizer.to_str())
    raw["model"]["unk_token"] = None
    for model.tokenizer in (None, tokenizers.Tokenizer.from_str(json.dumps(raw))):
        assert bool((sample_rows(model, beginnings(model, 40), length=20, prefix=20, seed=1).ids == 0).any())
    ending = tiny("*", vocab_size=6, eos_token_id=0)  # GPT-2's, which is its unknown token too
    ending.tokenizer = byte_tokenizer
    assert bool((sample_rows(ending, beginnings(ending, 40), length=20, prefix=20, seed=1).ids == 0).any())


def test_rows_end_with_their_text(tiny: Callable) -> None:
    model = tiny("*", vocab_size=6, eos_token_id=(5, 2))
    ids, lengths = sample_rows(model, [[1, 5, 4], [1]] * 20, length=12, prefix=12, seed=0)
    assert 12 in lengths.tolist()
    assert len(set(lengths.tolist())) > 3
    for n, (row, own) in enumerate(zip(ids.tolist(), lengths.tolist(), strict=True)):
        start = 1 if n % 2 else 3  # an end in a prompt ends nothing
        ends = [i for i in range(start, 12) if row[i] in (2, 5)]
        assert own == (ends[0] + 1 if ends else 12)
        assert row[own:] == [1] * (12 - own)


def test_prompts_are_continued_as_generate_does(tiny: Callable) -> None:
    model = tiny("M*-E", eos_token_id=7)
    prompts = [[1, 9, 10], [11], [12, 13, 14, 15, 16]]
    ids, lengths = sample_rows(model, prompts, length=16, prefix=1, seed=0)
    for prompt, row, length in zip(prompts, ids.tolist(), lengths.tolist(), strict=True):
        params = SamplingParams(mode="ar", max_new_tokens=16 - len(prompt))
        expected = generate(model, [prompt], params)[0].token_ids
        assert row[: len(prompt)] == prompt
        usable = next((i for i, t in enumerate(expected) if t in (3, 7)), len(expected))
        assert usable > 3
        assert row[len(prompt) :][:usable] == expected[:usable]
        assert length >= len(prompt) + usable


def test_sampling_follows_the_context_tower(tiny: Callable) -> None:
    model = tiny("*", vocab_size=6)
    rows = sample_rows(model, beginnings(model, 4000), length=2, prefix=2, seed=0).ids
    logits = model.context_logits([[1]])[0, 0]
    logits[3] = -torch.inf
    frequencies = rows[:, 1].bincount(minlength=6) / 4000
    assert (frequencies - logits.softmax(-1)).abs().max() < 0.032  # 4 standard deviations of 0.008


def test_temperature_flattens_what_follows_the_prefix(tiny: Callable) -> None:
    model = tiny("*", vocab_size=6)
    settings = {"prompts": beginnings(model, 4000), "length": 2, "prefix": 1, "seed": 0}
    logits = model.context_logits([[1]])[0, 0]
    logits[3] = -torch.inf
    for temperature in (0.5, 2.0):
        rows = sample_rows(model, temperature=temperature, **settings).ids
        frequencies = rows[:, 1].bincount(minlength=6) / 4000
        assert (frequencies - (logits / temperature).softmax(-1)).abs().max() < 0.032  # 4 standard deviations
    assert sample_rows(model, temperature=0.0, **settings).ids[:, 1].unique().tolist() == [int(logits.argmax())]


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_follows_the_text_is_not_scored(temperature: float, tiny: Callable, tmp_path: Path) -> None:
    model = tiny("*", vocab_size=6, eos_token_id=(2, 5))
    config = SampleConfig(rows=100, length=12, temperatures=(temperature,), shortest_prefix=4, longest_prefix=4)
    sample_shard(model, tmp_path, 0, config)
    corpus = Corpus(tmp_path, vocab_size=6)
    ended = 0
    for ids, scored, document in map(corpus.row, range(100)):
        length = int((document == 0).sum())
        start = 1 if temperature == 1 else 4
        assert scored.tolist() == [start <= place < length for place in range(12)]
        assert not {2, 5} & set(ids[: length - 1].tolist())
        ended += length < 12
    assert 0 < ended < 100


def test_prompts_fill_shards_in_order_and_are_not_scored(tiny: Callable, tmp_path: Path) -> None:
    model = tiny("*", eos_token_id=None)
    prompts = [[1] + [4 + n] * n for n in range(5)]
    config = SampleConfig(rows=3, length=8, temperatures=(1.0,), longest_prefix=6)
    for index in range(2):
        sample_shard(model, tmp_path, index, config, prompts)
    corpus = Corpus(tmp_path, vocab_size=40)
    assert len(corpus) == 5
    for n, prompt in enumerate(prompts):
        ids, scored, _ = corpus.row(n)
        assert ids[: n + 1].tolist() == prompt
        assert scored.tolist() == [False] * (n + 1) + [True] * (7 - n)


def test_a_corpus_is_not_gone_on_with_in_another_way(tmp_path: Path) -> None:
    keep_settings(tmp_path / "a", {"seed": 0, "temperatures": (0.0, 1.0)})
    keep_settings(tmp_path / "a", {"seed": 0, "temperatures": (0.0, 1.0)})
    with pytest.raises(ValueError, match=r"a was begun with seed 0, not seed 1; give the same again"):
        keep_settings(tmp_path / "a", {"seed": 1, "temperatures": (0.0, 1.0)})
    (tmp_path / "a" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not JSON"):
        keep_settings(tmp_path / "a", {"seed": 0})
    (tmp_path / "a" / "settings.json").rename(tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match=r"holds shards but no settings\.json"):
        keep_settings(tmp_path, {"seed": 0})


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"rows": 0}, "an integer of at least 1"),
        ({"length": 1}, "an integer of at least 2"),
        ({"temperatures": ()}, "one number or more"),
        ({"temperatures": (0.5, -1)}, "numbers in [0, 100]"),
        ({"shortest_prefix": 0}, "an integer of at least 1"),
        ({"shortest_prefix": 9, "longest_prefix": 8}, "at most longest_prefix, which is 8"),
        ({"longest_prefix": 256}, "below length, which is 256"),
        ({"seed": -1}, "an integer of at least 0"),
    ],
)
def test_bad_settings_raise(change: dict, rule: str) -> None:
    with pytest.raises(SettingError) as raised:
        SampleConfig(**change)
    assert raised.value.name == next(iter(change))
    assert raised.value.rule == rule


def test_prefixes_that_are_not_given_fit_the_rows() -> None:
    assert SampleConfig().prefixes(256) == (6, 159)
    assert SampleConfig().prefixes(5) == (4, 4)


def test_bad_prefixes_raise(tiny: Callable) -> None:
    for prefix in (0, 6):
        with pytest.raises(ValueError, match=rf"prefix is {prefix}, must be in \[1, length=5\]"):
            sample_rows(tiny("*"), [[1]], length=5, prefix=prefix, seed=0)
    with pytest.raises(ValueError, match="no bos_token_id"):
        beginnings(tiny("*", bos_token_id=None), 1)
    for prompt, message in (
        ([], "prompt 2 has 0 tokens, must have 1 to 4"),
        ([1] * 5, "2 has 5 tokens"),
        ([40], "40, must be a token id"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_rows(tiny("*"), [[1], prompt], length=5, prefix=1, seed=0)
