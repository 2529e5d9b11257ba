"""kill -9 at any moment, then the same command again: the same run, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from twotower.checkpoints import save
from twotower.cli.main import app
from twotower.training.corpus.shards import CorpusRows, write_shard

STEPS = 40
OPTIONS = ["--batch-size", 4, "--warmup-steps", 3, "--checkpoint-every", 2, "--dtype", "float32", "--ema-decay", 0.9]


def arguments(folder: Path, out: str) -> list[str]:
    found = ["train", folder / "model", folder / "corpus", folder / out, "--steps", STEPS, *OPTIONS]
    return [str(argument) for argument in found]


@pytest.fixture
def inputs(tiny: Callable, tmp_path: Path) -> Path:
    save(tiny("M*", block_size=4), tmp_path / "model")
    ids = np.random.default_rng(0).integers(4, 40, (30, 24))
    write_shard(tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, np.ones_like(ids), ids * 0))
    return tmp_path


def kill_during_run(folder: Path, out: str, after: int) -> None:
    """Ends a run by SIGKILL some time after a number of steps."""
    metrics = folder / out / "metrics.jsonl"
    command = [sys.executable, "-m", "twotower", *arguments(folder, out)]
    one_thread = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # one thread, as in this process, so that sums have the same order
    with subprocess.Popen(command, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < after):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(inputs: Path) -> None:
    after = random.SystemRandom().randrange(1, STEPS - 10)
    kill_during_run(inputs, "killed", after)
    for run in ("killed", "straight"):
        assert CliRunner().invoke(app, arguments(inputs, run)).exit_code == 0
    for name in ("checkpoint", "checkpoint-ema"):
        weights = [(inputs / run / name / "model.safetensors").read_bytes() for run in ("straight", "killed")]
        assert weights[0] == weights[1], f"killed after step {after}"
    lines = [(inputs / run / "metrics.jsonl").read_text().splitlines() for run in ("straight", "killed")]
    numbers = [[line.rpartition(', "tokens_per_second"')[0] for line in part] for part in lines]
    assert numbers[0] == numbers[1], f"killed after step {after}"
    assert len(numbers[0]) == STEPS
