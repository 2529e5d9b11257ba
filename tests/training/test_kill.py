"""A signal at any moment, kill -9 among them, then the same command again: the same run, bit for bit."""

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


def wait_for_steps(process: subprocess.Popen, out: Path, num_steps: int) -> None:
    metrics = out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < num_steps):
        time.sleep(0.001)


def wait_for_a_write(process: subprocess.Popen, out: Path, num_steps: int) -> None:
    """Waits until a state is being written."""
    wait_for_steps(process, out, num_steps)
    while process.poll() is None and not list(out.glob("state/*.partial")):
        time.sleep(0.0001)


def send_during_run(
    command: list[str],
    out: Path,
    number: signal.Signals,
    wait: Callable[[subprocess.Popen, Path, int], None] = wait_for_steps,
) -> tuple[int, str]:
    """Sends a run a signal at some step; returns its exit status and what it wrote to stderr."""
    # One thread, as in this process, so that sums have the same order
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=one_thread, stderr=subprocess.PIPE, text=True) as process:
        wait(process, out, random.SystemRandom().randrange(1, STEPS - 10))
        process.send_signal(number)
        errors = process.communicate()[1]
    return process.returncode, errors


def assert_like_a_straight_run(inputs: Path, out: str) -> None:
    """Resumes the run in `out`, which then has the bytes of one that was not stopped."""
    for run in (out, "straight"):
        result = CliRunner().invoke(app, arguments(inputs, run))
        assert result.exit_code == 0, result.output
    for name in ("checkpoint", "checkpoint-ema"):
        weights = [(inputs / run / name / "model.safetensors").read_bytes() for run in ("straight", out)]
        assert weights[0] == weights[1]
    assert steps_of(inputs / out) == steps_of(inputs / "straight")
    assert len(steps_of(inputs / out)) == STEPS


def steps_of(out: Path) -> list[str]:
    """The lines of metrics.jsonl without speeds."""
    return [line.rpartition(', "tokens_per_second"')[0] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("wait", [wait_for_steps, wait_for_a_write])
def test_a_killed_run_ends_as_if_it_had_not_been(inputs: Path, wait: Callable) -> None:
    command = [sys.executable, "-m", "twotower", *arguments(inputs, "killed")]
    status, errors = send_during_run(command, inputs / "killed", signal.SIGKILL, wait)
    assert status == -signal.SIGKILL, errors
    assert_like_a_straight_run(inputs, "killed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_loses_no_step_and_says_where_they_are(inputs: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "twotower", *arguments(inputs, "stopped"), "--checkpoint-every", "1000"]
    status, errors = send_during_run(command, inputs / "stopped", number)
    assert status == 128 + number, errors
    step = len(steps_of(inputs / "stopped"))
    state = inputs / "stopped" / "state" / f"step-{step:08d}"
    assert f"stopped by {number.name} after step {step} of {STEPS}: its state is {state}; the same command" in errors
    assert [state] == list(state.parent.iterdir())
    assert_like_a_straight_run(inputs, "stopped")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(inputs: Path) -> None:
    slow = ["--steps", "2", "--batch-size", "40000", "--micro-batch-size", "4"]
    command = [sys.executable, "-m", "twotower", *arguments(inputs, "slow"), *slow]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not (inputs / "slow" / "metrics.jsonl").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # at once after the first: the same signal, as `timeout` sends it
        said = "SIGINT: stopping after this step; a second signal ends at once"
        assert any(said in line for line in process.stderr)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("to_one_rank", [False, True])
def test_ranks_stop_after_the_same_step(inputs: Path, to_one_rank: bool) -> None:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "twotower"]
    for out in ("straight", "stopped"):
        command = [sys.executable, *ranks, *arguments(inputs, out), "--checkpoint-every", "1000"]
        if out == "stopped":
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                wait_for_steps(process, inputs / out, 5)
                (children,) = Path(f"/proc/{process.pid}/task/{process.pid}/").glob("children")
                os.kill(int(children.read_text().split()[-1]) if to_one_rank else process.pid, signal.SIGTERM)
                errors = process.communicate()[1]
            step = len(steps_of(inputs / out))
            assert process.returncode != 0
            assert step < STEPS
            assert f"stopped by SIGTERM after step {step} of {STEPS}" in errors
            assert [f"step-{step:08d}"] == [state.name for state in (inputs / out / "state").iterdir()]
        subprocess.run(command, check=True, capture_output=True)
    weights = [(inputs / run / "checkpoint" / "model.safetensors").read_bytes() for run in ("straight", "stopped")]
    assert weights[0] == weights[1]
    assert steps_of(inputs / "stopped") == steps_of(inputs / "straight")
