"""`twotower doctor`: facts of this machine and of odd ones, and a word on each that slows decoding down."""

import copy
import json
import os

import pytest

from twotower.backends import choose
from twotower.backends.native.build import Kernels
from twotower.cli import doctor

HEALTHY = {
    "cpu": {"cores": 8, "usable_cores": 8, "instructions": ["avx2"]},
    "backend": {"compiler": "/usr/bin/gcc", "kernels": "kernels.so", "slowed_by": None},
    "threads": {
        "torch_threads": 8,
        "OMP_NUM_THREADS": None,
        "cores_used_by_others": 0.1,
        "busiest_process": "init (1)",
    },
    "devices": {"gpus": [], "nvidia_driver": None, "torch_lacks": []},
}


@pytest.mark.slow
def test_the_text_shows_every_fact_and_the_json_says_the_same(run):
    shown, printed = run("doctor"), json.loads(run("doctor", "--json").stdout)
    assert shown.exit_code == 0
    assert isinstance(printed.pop("advice"), list)
    for section, facts in printed.items():
        assert f"{section}\n" in shown.stdout
        for name in facts:
            assert f"  {name if name.isupper() else name.replace('_', ' ')}: " in shown.stdout
    assert printed["versions"]["torch"] is not None
    assert printed["cpu"]["cores"] == os.cpu_count()


def test_a_machine_that_tells_nothing_is_no_defect(run, monkeypatch):
    monkeypatch.setattr(doctor, "_read", lambda file: "")
    monkeypatch.setattr(
        choose, "kernels", lambda: Kernels(None, problem="there is no C compiler", remedy="install gcc")
    )
    monkeypatch.delattr(os, "sched_getaffinity")
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["threads"]["load_average"] is None
    assert found["threads"]["cores_used_by_others"] is None
    assert any("install gcc" in line for line in found["advice"])


def test_other_processes_show_in_the_load():
    cores, _ = doctor._other_load()
    assert cores is None or 0 <= cores <= os.cpu_count() + 0.5  # ticks are 10 ms long, and 0.3 s are watched


def test_a_container_s_quota_bounds_the_cores(monkeypatch):
    monkeypatch.setattr(doctor, "core_limit", lambda: 1.5)
    assert doctor._cpu()["cgroup_limit_cores"] == 1.5
    assert doctor._cpu()["usable_cores"] == 1


def test_a_healthy_machine_needs_no_advice():
    assert doctor.advise(HEALTHY) == []


@pytest.mark.parametrize(
    ("section", "facts", "advice"),
    [
        ("backend", {"slowed_by": "there is no C compiler; install gcc"}, "there is no C compiler"),
        ("threads", {"torch_threads": 1, "OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS is 1 of 8 cores; set it to 8"),
        ("threads", {"torch_threads": 64}, "torch runs 64 threads on 8 usable cores"),
        ("threads", {"cores_used_by_others": 1.0}, "other processes take 1.0 of 8 cores, most of all init (1)"),
        ("devices", {"torch_lacks": ["oneDNN"]}, "torch is built without oneDNN"),
        ("devices", {"nvidia_driver": "535"}, "torch finds no GPU"),
    ],
)
def test_what_slows_decoding_down_is_told_with_a_remedy(section, facts, advice):
    found = copy.deepcopy(HEALTHY)
    found[section] |= facts
    [line] = doctor.advise(found)
    assert advice in line
    assert "; " in line
