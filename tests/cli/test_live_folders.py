"""A folder that one call writes to, and a second call on it, whichever of the commands that is."""

import os

import numpy as np

from twotower.training.corpus.shards import CorpusRows, write_shard
from twotower.training.run.lock import locked


def test_a_second_call_on_a_folder_that_is_being_written_is_refused_and_takes_nothing(run, checkpoint, tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    ids = np.random.default_rng(0).integers(4, 260, (8, 12))
    write_shard(corpus / "0.safetensors", CorpusRows(ids, np.ones_like(ids), ids * 0))
    training = ("train", checkpoint, corpus, out, "--batch-size", 2, "--warmup-steps", 0)
    assert run(*training, "--steps", 1).exit_code == 0
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with locked(out):
        for command in (
            (*training, "--steps", 9),
            ("train", checkpoint, corpus, out, "--export-only"),
            ("pretrain", checkpoint, corpus, out),
            ("sample", checkpoint, out, "--length", 12),
            ("init", checkpoint, out),
        ):
            result = run(*command)
            assert result.exit_code == 2, result.output
            assert f"is being written by process {os.getpid()} on this machine" in " ".join(result.stderr.split())
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == files
