import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from twotower.training.run.checkpointing import (
    Checkpoints,
    latest_state,
    read_progress,
    read_tensors_,
    stored_groups,
)
from twotower.training.run.ranks import Ranks


def tensors(value: float, rows: int = 3) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": {"a.b": torch.full((rows, 2), value)}, "step": {"a.b": torch.tensor(value)}}


def test_a_state_is_read_as_it_was_when_saving_began(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks())
    saved = tensors(1.0)
    checkpoints.save(5, saved, {"step": 5, "run": {}, "loss": 0.1})
    saved["weights"]["a.b"].zero_()  # training changes the tensors while they are being written
    checkpoints.finish()
    state = latest_state(tmp_path)
    assert state is not None
    assert read_progress(state) == {"step": 5, "run": {}, "loss": 0.1}
    assert stored_groups(state) == {"weights", "step"}
    read = tensors(0.0)
    read_tensors_(state, read, Ranks())
    assert torch.equal(read["weights"]["a.b"], torch.ones(3, 2))
    assert read["step"]["a.b"] == 1


def test_only_the_newest_whole_state_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks())
    assert latest_state(tmp_path) is None
    for step in (1, 2, 10):
        checkpoints.save(step, tensors(step), {"step": step, "run": {}})
    names = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert "step-00000002" in names  # whole until the next is
    checkpoints.finish()
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000010"]


def test_what_a_kill_leaves_half_written_is_no_state(tmp_path: Path) -> None:
    killed = Checkpoints(tmp_path, Ranks())
    killed.save(3, tensors(3), {"step": 3, "run": {}})  # and never finished
    assert killed._pending is not None
    killed._pending.future.result()  # unlike this one, a killed process does not go on writing beside the next
    latest = latest_state(tmp_path)
    assert latest is None
    again = Checkpoints(tmp_path, Ranks())
    again.save(3, tensors(3), {"step": 3, "run": {}})
    again.finish()
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000003"]


FULL_DISK = """
import sys, resource, torch
from pathlib import Path
from twotower.training.run.checkpointing import Checkpoints
from twotower.training.run.ranks import Ranks
checkpoints = Checkpoints(Path(sys.argv[1]), Ranks())
if len(sys.argv) == 2:
    checkpoints.save(1, {"weights": {"a": torch.ones(100)}}, {"step": 1, "run": {}})
    checkpoints.finish()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
checkpoints.save(2, {"weights": {"a": torch.ones(100_000)}}, {"step": 2, "run": {}})
try:
    checkpoints.finish()
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_state_before(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True)
    assert "the state of step 2 could not be written" in done.stdout
    assert "the state before it, step-00000001, is whole" in done.stdout
    state = latest_state(tmp_path)
    assert state is not None
    read = {"weights": {"a": torch.zeros(100)}}
    read_tensors_(state, read, Ranks())
    assert state.name == "step-00000001"
    assert torch.equal(read["weights"]["a"], torch.ones(100))


@pytest.mark.slow
def test_a_full_disk_at_the_first_state_promises_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, tmp_path, "first"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "make room and call again: there is none before it to go on from" in done.stdout
    assert latest_state(tmp_path) is None


def test_a_state_of_other_tensors_raises(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks())
    checkpoints.save(1, tensors(1), {"step": 1, "run": {}})
    checkpoints.finish()
    state = latest_state(tmp_path)
    assert state is not None
    with pytest.raises(ValueError, match=r"another model .*: weights.a.b is \(3, 2\) there, \(4, 2\) here; choose"):
        read_tensors_(state, tensors(1, rows=4), Ranks())
    with pytest.raises(ValueError, match=r"weights.other is missing there, \(1,\) here"):
        read_tensors_(state, {"weights": tensors(1)["weights"] | {"other": torch.ones(1)}}, Ranks())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["progress.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_a_damaged_state_is_passed_over_or_named(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    for step in (1, 2):  # a kill between naming the second and deleting the first leaves both
        checkpoints = Checkpoints(tmp_path / str(step), Ranks())
        checkpoints.save(step, tensors(step), {"step": step, "run": {}})
        checkpoints.finish()
    folder, first = tmp_path / "2", tmp_path / "1" / "state" / "step-00000001"
    damage(folder / "state" / "step-00000002" / name)
    with pytest.raises(ValueError, match=rf"step-00000002 is damaged \(.*{name}.*\); restore it, or delete .*state to"):
        latest_state(folder)
    first.rename(folder / "state" / first.name)
    with pytest.warns(UserWarning, match=r"step-00000002 is damaged \(.*\); going on from step-00000001"):
        state = latest_state(folder)
    assert state == folder / "state" / first.name
    again = Checkpoints(folder, Ranks())
    again.save(2, tensors(2), {"step": 2, "run": {}})
    again.finish()
    state = latest_state(folder)
    assert state is not None
    assert state.name == "step-00000002"
