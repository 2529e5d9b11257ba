import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "own"))


@pytest.fixture
def corpus(run: Any, checkpoint: Path, tmp_path: Path) -> Path:
    run("sample", checkpoint, tmp_path / "corpus", "--shards", 2, "--rows", 8, "--length", 40)
    return tmp_path / "corpus"


def test_counts_are_kept_with_the_checkpoint_and_become_its_drafter(run: Any, folder: Path, corpus: Path) -> None:
    (folder / "generation_config.json").write_text('{"max_new_tokens": 12}')
    told = run("ngrams", folder, corpus, "--order", 4).stdout
    assert "contexts of up to 3 tokens" in told
    assert "verified drafts from ngram unless told otherwise" in told
    assert json.loads((folder / "generation_config.json").read_text()) == {"max_new_tokens": 12, "drafter": "ngram"}
    ask = ("generate", "abc", "--model", folder, "--mode", "verified", "--ignore-eos", "--json")
    done, other = (json.loads(run(*ask, *more).stdout) for more in ((), ("--drafter", "denoiser")))
    assert done["token_ids"] == other["token_ids"]
    assert list(done["drafts"]) in ([], ["ngram"])
    assert list(other["drafts"]) == ["denoiser"]
    content = (folder / "ngrams.npz").read_bytes()
    run("ngrams", folder, corpus, "--order", 4, "--drafter", "prompt,ngram")
    assert (folder / "ngrams.npz").read_bytes() == content
    assert json.loads((folder / "generation_config.json").read_text())["drafter"] == "prompt,ngram"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--drafter", "ngrams"), "--drafter is 'ngrams', must be one of denoiser, ngram, prompt"),
        (("--order", "1"), "--order is 1, must be an integer in [2, 16]"),
        (("--size-mib", "0"), "size is 0, must be an integer of at least 1"),
    ],
)
def test_bad_options_are_told(run: Any, folder: Path, corpus: Path, options: tuple, message: str) -> None:
    failed = run("ngrams", folder, corpus, *options)
    assert failed.exit_code == 2
    assert message in " ".join(failed.stderr.split())
    assert not (folder / "ngrams.npz").exists()


def test_another_models_corpus_is_refused(run: Any, folder: Path, corpus: Path, tmp_path: Path) -> None:
    assert "is no directory" in run("ngrams", folder, tmp_path / "none").stderr
    assert "holds no .safetensors shard" in run("ngrams", folder, tmp_path).stderr


@pytest.mark.parametrize("command", ["train", "ngrams"])
def test_a_corpus_of_another_vocabulary_is_refused(run: Any, folder: Path, tmp_path: Path, command: str) -> None:
    file = folder / "tokenizer.json"
    written = tmp_path / "corpus"
    (tmp_path / "a.txt").write_text("abc " * 40)
    assert run("tokenize", folder, tmp_path / "a.txt", written, "--length", 16).exit_code == 0
    file.write_text(file.read_text().replace('"a":', '"\\u0001":'))
    out = [tmp_path / "run"] if command == "train" else []
    failed = run(command, folder, written, *out)
    assert failed.exit_code != 0
    assert "was made with another vocabulary than this checkpoint's" in " ".join(failed.stderr.split())


@pytest.mark.parametrize("command", ["calibrate", "ngrams"])
def test_what_comes_with_the_package_is_not_written_into(
    run: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    failed = run(command, "hybrid", corpus)
    assert failed.exit_code == 2
    told = " ".join(failed.stderr.split())
    assert "hybrid is a checkpoint that comes with the package" in told
    [copied] = re.findall(r"copy it first, as with: cp -r (\S+) my-hybrid", told)
    assert (Path(copied) / "config.json").is_file()
    shutil.copytree(copied, tmp_path / "hybrid")  # then the name is that of a folder
    assert "comes with the package" not in run(command, "hybrid", corpus).stderr
