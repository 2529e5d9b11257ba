"""A step that can't fit into memory is refused before it runs."""

import dataclasses
import re
import resource
import subprocess
import sys
import warnings

import pytest
import torch

from twotower.config import TwoTowerConfig
from twotower.errors import SettingError
from twotower.planning.machine import DeviceMemory
from twotower.training.config import DenoisingConfig, NextTokenConfig, TrainConfig
from twotower.training.run import room
from twotower.training.run.estimate import estimate
from twotower.training.run.ranks import Ranks
from twotower.training.run.room import check_room

LENGTH = 128


@pytest.fixture(scope="module")
def config(tiny) -> TwoTowerConfig:
    return tiny("M*-E", hidden_size=64).config


@pytest.fixture
def free(monkeypatch):
    """free(bytes): the memory that there is."""
    return lambda count: monkeypatch.setattr(room, "device_memory", lambda _: DeviceMemory("cpu", 1 << 50, int(count)))


def needed(config, run, what) -> tuple[int, int]:
    found = estimate(config, run, what, row_length=LENGTH, num_ranks=1).memory
    return found.gradients + run.batch_size * LENGTH * 92, found.activations


@pytest.mark.parametrize("what", [DenoisingConfig(), NextTokenConfig()])
def test_steps_that_surely_fit_pass_others_warn_and_those_that_cant_are_refused(config, what, free) -> None:
    run = TrainConfig(batch_size=64)
    kept, computed = needed(config, run, what)
    free(kept + 1.71 * computed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_room(config, run, what, Ranks(), row_length=LENGTH)
    free(kept + 1.5 * computed)
    with pytest.warns(UserWarning, match=r"64 rows of 128 tokens at a time needs about .* may be too little"):
        check_room(config, run, what, Ranks(), row_length=LENGTH)
    free(kept + 0.9 * computed)
    with pytest.raises(SettingError, match=r"batch_size is 64, must be less; .* \(--micro-batch-size\) \d+") as raised:
        check_room(config, run, what, Ranks(), row_length=LENGTH)
    fitting = int(re.search(r"micro-batch-size\) (\d+)", str(raised.value))[1])
    assert 1 <= fitting < 64
    for size, fits in ((fitting, True), (fitting + 1, False)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            check_room(config, dataclasses.replace(run, micro_batch_size=size), what, Ranks(), row_length=LENGTH)
        assert (not told) == fits


def test_where_not_even_a_row_fits_other_settings_are_named(config, free) -> None:
    free(1000)
    run = TrainConfig(batch_size=8, micro_batch_size=2)
    with pytest.raises(SettingError, match=r"micro_batch_size is 2, must be less; .*\(--recompute\) or bf16"):
        check_room(config, run, DenoisingConfig(), Ranks(), row_length=LENGTH)


def test_only_the_hosts_memory_is_counted(config, free) -> None:
    free(1000)
    check_room(config, TrainConfig(), DenoisingConfig(), Ranks(device=torch.device("meta")), row_length=LENGTH)


def test_a_rank_counts_its_own_rows(config, free) -> None:
    run = TrainConfig(batch_size=64)
    kept, computed = needed(config, run, DenoisingConfig())
    free(kept + 0.9 * computed)
    check_room(config, run, DenoisingConfig(), Ranks(0, 4), row_length=LENGTH)


@pytest.mark.slow
def test_the_command_refuses_a_batch_that_would_be_killed(tmp_path) -> None:
    """In a process whose memory ends at 6 GiB."""
    (tmp_path / "a.txt").write_text("Once upon a time there was a mouse. " * 3000)
    command = [sys.executable, "-m", "twotower", "train", "stories", tmp_path / "a.txt", tmp_path / "run"]

    def limited(*options: str) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

        more = ["--row-length", "64", "--steps", "1", "--warmup-steps", "0", *options]
        return subprocess.run([*command, *more], capture_output=True, text=True, preexec_fn=limit, check=False)

    failed = limited("--batch-size", "100000")
    told = " ".join(failed.stderr.split())
    assert failed.returncode == 2, told
    assert "--batch-size is 100000, must be less; a step over 100,000 rows of 64 tokens at a time needs about" in told
    assert not list((tmp_path / "run").glob("state/*"))
    fitting = re.search(r"--micro-batch-size\) ([\d,]+)", told)
    assert fitting is not None, told
    assert int(fitting[1].replace(",", "")) > 10
    assert limited("--batch-size", "16").returncode == 0
