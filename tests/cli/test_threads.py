"""How many threads a command takes and how they wait, unless the user has said so."""

import os
import subprocess
import sys

import pytest

from twotower.cli import threads


@pytest.fixture
def quota(monkeypatch):
    def give(limit: float | None, allowed: int = 64) -> None:
        monkeypatch.setattr(threads, "core_limit", lambda: limit)
        monkeypatch.setattr(threads, "allowed_cores", lambda: allowed)

    return give


@pytest.mark.parametrize(
    ("limit", "allowed", "taken"),
    [(1.0, 64, "1"), (0.5, 64, "1"), (3.9, 64, "3"), (8.0, 2, None), (2.0, 2, None), (None, 64, None)],
)
def test_threads_are_as_many_as_the_quota_s_cores(quota, limit, allowed, taken):
    quota(limit, allowed)
    environment: dict[str, str] = {}
    threads.settle_threads(environment)
    assert environment.get("OMP_NUM_THREADS") == taken
    assert environment["GOMP_SPINCOUNT"] == threads.SPINS


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_has_set_stays(quota, name):
    quota(1.0)
    environment = {"OMP_NUM_THREADS": "5", name: "active"}
    threads.settle_threads(environment)
    assert environment == {"OMP_NUM_THREADS": "5", name: "active"}


def test_a_command_settles_them_before_pytorch_loads():
    program = """
import sys
from twotower.cli import main, threads
threads.core_limit, threads.allowed_cores = lambda: 1.0, lambda: 64
assert "torch" not in sys.modules
main.app(["doctor", "--help"], standalone_mode=False)
import torch
assert torch.get_num_threads() == 1
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2.0),
        ("0::/seen/by/the/host\n", {"cpu.max": "100000 100000"}, 1.0),
        ("3:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("2:memory:/a\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2.0),
        ("", {}, None),
    ],
)
def test_the_limit_is_the_least_quota_of_the_process_s_groups(tmp_path, groups, files, limit):
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.core_limit(tmp_path, tmp_path / "own") == limit
