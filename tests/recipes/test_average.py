"""The average of checkpoints: every tensor halfway, the first one's other files, and what can't be averaged."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import twotower

SCRIPT = Path(__file__).parents[2] / "recipes" / "stories" / "average.py"


@pytest.fixture
def average(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return call


def test_every_tensor_is_halfway_and_the_checkpoint_opens(average, tiny, tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        twotower.save(tiny(seed=seed), tmp_path / name)
    average(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    a, b, out = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out"))
    assert any(not torch.equal(a[key], b[key]) for key in a)
    for key in a:
        torch.testing.assert_close(out[key].float(), (a[key].float() + b[key].float()) / 2)
    twotower.load(tmp_path / "out")


def test_what_cant_be_averaged_is_refused(average, tiny, tmp_path, capsys) -> None:
    twotower.save(tiny(seed=1), tmp_path / "a")
    twotower.save(tiny("M*", seed=1), tmp_path / "other")
    for arguments, complaint in (
        (("a", "a", "a"), "must be a folder that doesn't exist yet"),
        (("out", "a"), "1 checkpoint, must be at least 2"),
        (("out", "a", "nowhere"), "doesn't exist; give folders"),
        (("out", "a", "other"), "has other tensors than"),
    ):
        with pytest.raises(SystemExit):
            average(*(tmp_path / name for name in arguments))
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
