"""A calibration beside the weights that it was made for, and beside others."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower.checkpoints.hf.calibration_file import CALIBRATION_FILE, fingerprint, read_calibration, write_calibration
from twotower.checkpoints.hf.two_towers import released_stream, save
from twotower.checkpoints.load import load
from twotower.model.calibration import CalibratedRule, Calibration
from twotower.model.two_tower import TwoTower


def made_for(model: TwoTower, **changes: Any) -> Calibration:
    rule = CalibratedRule(
        risk=0.1, thresholds=((0.5, 1.0), (0.25, 0.0)), shown=0.97, tokens_per_nfe=3.5, held_out=(0.98, None, 1.2)
    )
    fields: dict[str, Any] = {
        "block_size": 2,
        "steps_per_block": 16,
        "confidence": 0.9,
        "prompts": "ö.txt",
        "num_prompts": 100,
        "fingerprint": fingerprint(model.released_tensors().items()),
        "rules": (rule, rule),
    }
    return Calibration(**fields | changes)


@pytest.fixture
def folder(tiny: Callable[..., TwoTower], tmp_path: Path) -> Path:
    model = tiny()
    save(model, tmp_path / "model")
    write_calibration(tmp_path / "model", made_for(model))
    return tmp_path / "model"


def opened(folder: Path, **options: Any) -> TwoTower:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, **options)


def test_it_is_read_back_as_it_was_written(folder: Path, tiny: Callable[..., TwoTower]) -> None:
    assert opened(folder).calibration == made_for(tiny())
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", CALIBRATION_FILE]


def test_a_checkpoint_without_one_has_none(folder: Path) -> None:
    (folder / CALIBRATION_FILE).unlink()
    assert opened(folder).calibration is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_belongs_in_every_dtype_and_file(folder: Path, tmp_path: Path, dtype: str) -> None:
    assert opened(folder, dtype=dtype).calibration is not None
    save(opened(folder, dtype=dtype, pack=False), tmp_path / "copy", max_shard_bytes=4000)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    assert opened(tmp_path / "copy").calibration == opened(folder).calibration
    prints = {fingerprint(released_stream(f)) for f in (folder, tmp_path / "copy")}
    assert len(prints) == 1


def test_other_weights_leave_it_aside_with_a_warning(folder: Path, tiny: Callable[..., TwoTower]) -> None:
    content = (folder / CALIBRATION_FILE).read_bytes()
    save(tiny(seed=1), folder)
    (folder / CALIBRATION_FILE).write_bytes(content)
    with pytest.warns(UserWarning, match=r"made for other weights.*ignored.*twotower calibrate CHECKPOINT PROMPTS"):
        assert load(folder).calibration is None


def test_whoever_knows_that_it_belongs_needs_no_tensors(folder: Path, tiny: Callable[..., TwoTower]) -> None:
    assert read_calibration(folder, None) == made_for(tiny())


def test_saving_changed_weights_drops_it(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, pack=False)
    with torch.no_grad():
        model.denoiser_tower.embeddings.add_(0.01)
    save(model, folder)
    assert opened(folder).calibration is None
    assert not (folder / CALIBRATION_FILE).exists()


def test_another_version_is_left_aside_with_a_warning(folder: Path) -> None:
    change(folder, version=2)
    with pytest.warns(UserWarning, match="has version 2, and this program reads 1: it is ignored"):
        assert load(folder).calibration is None


def change(folder: Path, **changes: Any) -> None:
    file = folder / CALIBRATION_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"rules": [{"risk": 0.1}]},
        {"rules": 3},
        {"rules": [3]},
        {"block_size": 3},
        {"block_size": None},
        {"unknown": 1},
        {"num_prompts": "many"},
    ],
)
def test_a_broken_one_is_an_error_that_names_the_file(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, **changes)
    with pytest.raises(ValueError, match=CALIBRATION_FILE):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("thresholds", [[0.5, 1.5], [0, 0]]), ("thresholds", [[0.5]]), ("shown", "x"), ("shown", 2), ("held_out", [1])],
)
def test_a_broken_rule_is_an_error(folder: Path, field: str, value: Any) -> None:
    rules = json.loads((folder / CALIBRATION_FILE).read_text())["rules"]
    change(folder, rules=[rules[0] | {field: value}])
    with pytest.raises(ValueError, match="twotower calibrate"):
        load(folder)


def test_what_is_no_json_is_an_error(folder: Path) -> None:
    (folder / CALIBRATION_FILE).write_text("{")
    with pytest.raises(ValueError, match=f"{CALIBRATION_FILE} is not JSON"):
        load(folder)
