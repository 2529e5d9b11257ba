"""Commands that make or read rows refuse those beyond the model's positions unless --past-positions is given."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from twotower.checkpoints import save
from twotower.model.two_tower import TwoTower
from twotower.training.corpus.shards import Corpus

POSITIONS = 12
TRAIN = ("--steps", 1, "--batch-size", 1, "--warmup-steps", 0)


@pytest.fixture(scope="module")
def short(
    tiny: Callable[..., TwoTower], byte_tokenizer: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of 12 positions, a text, a backbone's config of as many, and corpora of 12 and 13 tokens a row."""
    path = tmp_path_factory.mktemp("short")
    model = tiny("llama", vocab_size=260, block_size=4, carried={"max_position_embeddings": POSITIONS})
    model.tokenizer = byte_tokenizer
    save(model, path / "model")
    (path / "a.txt").write_text("a text of more than two rows, or of three")
    (path / "config").mkdir()
    backbone = {"vocab_size": 260, "hidden_size": 16, "hybrid_override_pattern": "-", "intermediate_size": 16}
    config = backbone | {"max_position_embeddings": POSITIONS, "mask_token_id": 3}
    (path / "config" / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def arguments(short: Path) -> dict[str, tuple[object, ...]]:
    """By name, a call up to the option that says how long rows are."""
    return {
        "tokenize": ("tokenize", short / "model", short / "a.txt"),
        "sample": ("sample", short / "model"),
        "train": ("train", short / "model", short / "a.txt"),
        "dry run": ("train", short / "model", short / "none"),
        "pretrain": ("pretrain", short / "config", short / "none"),
    }


@pytest.mark.parametrize(
    ("name", "option", "others"),
    [
        ("tokenize", "--length", ()),
        ("sample", "--length", ("--rows", 1, "--shards", 1)),
        ("train", "--row-length", TRAIN),
        ("dry run", "--row-length", ("--dry-run",)),
        ("pretrain", "--row-length", ("--dry-run",)),
    ],
)
def test_longer_rows_are_refused_unless_asked_for(
    run: Callable, arguments: dict, tmp_path: Path, name: str, option: str, others: tuple
) -> None:
    call = (*arguments[name], tmp_path / "out", *others, option)
    result = run(*call, POSITIONS + 1)
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert f"{option} is 13, must be at most 12, the positions that the model was trained for" in message
    assert "--past-positions" in message
    assert not (tmp_path / "out").exists()
    result = run(*call, POSITIONS + 1, "--past-positions")
    assert result.exit_code == 0, result.output


def test_corpora_of_longer_rows_are_refused_unless_asked_for(run: Callable, short: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    result = run("tokenize", short / "model", short / "a.txt", corpus, "--length", 13, "--past-positions")
    assert result.exit_code == 0, result.output
    for call in (("train", short / "model"), ("pretrain", short / "config")):
        result = run(*call, corpus, tmp_path / call[0], *TRAIN)
        assert result.exit_code == 2
        assert "--row-length is 13, must be at most 12" in " ".join(result.stderr.split())
        assert not (tmp_path / call[0]).exists()
        result = run(*call, corpus, tmp_path / call[0], *TRAIN, "--past-positions")
        assert result.exit_code == 0, result.output


def test_rows_of_which_no_length_is_asked_have_as_many_tokens_as_positions(
    run: Callable, arguments: dict, tmp_path: Path
) -> None:
    for name, others in (("tokenize", ()), ("sample", ("--rows", 1, "--shards", 1)), ("train", TRAIN)):
        result = run(*arguments[name], tmp_path / name, *others)
        assert result.exit_code == 0, result.output
    for folder in ("tokenize", "sample", "train/corpus"):
        assert Corpus(tmp_path / folder, vocab_size=260).length == POSITIONS
