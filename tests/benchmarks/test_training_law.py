"""The law of training: it finds the numbers that made its points, and the command measures checkpoints that exist."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from twotower.checkpoints import save
from twotower.training.corpus.shards import CorpusRows, write_shard

FILE = Path(__file__).parents[2] / "benchmarks" / "training_law.py"


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("training_law", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("num", [3, 4, 6])
def test_a_law_is_found_again_from_its_points(module, num):
    law = module.Law(floor=1.1, scale=300.0, exponent=0.4)
    tokens = np.geomspace(3e6, 1e8, num).tolist()
    found = module.fitted(tokens, [law.at(n) for n in tokens])
    assert found.floor == pytest.approx(1.1, abs=2e-3)
    assert found.exponent == pytest.approx(0.4, abs=5e-3)
    assert found.at(1e9) == pytest.approx(law.at(1e9), abs=2e-3)


def test_two_points_have_no_law(module):
    with pytest.raises(ValueError, match="2 checkpoints, must be at least 3"):
        module.fitted([1e6, 2e6], [2.0, 1.9])


def test_without_a_point_to_leave_out_there_is_no_range(module):
    points = [{"tokens": n, "loss": 1 + n**-0.2, "tokens_per_nfe": 1 + n} for n in (1e6, 3e6, 1e7)]
    assert module.forecast(points, 1e9)["forecast_range"] is None
    points.append({"tokens": 4e7, "loss": 1.2, "tokens_per_nfe": 9.0})
    told = module.forecast(points, 1e9)
    assert told["forecast_range"][0] <= told["forecast"] <= told["forecast_range"][1]


def test_tokens_per_nfe_are_forecast_by_their_line_over_the_loss(module):
    law = module.Law(floor=1.0, scale=300.0, exponent=0.4)
    points = [{"tokens": n, "loss": law.at(n), "tokens_per_nfe": 3 - law.at(n)} for n in (4e6, 1e7, 2e7, 4e7)]
    told = module.forecast(points, 1e9)
    assert told["forecast_tokens_per_nfe"] == pytest.approx(3 - law.at(1e9), abs=5e-3)


def test_the_command_measures_every_checkpoint(module, tiny, byte_tokenizer, tmp_path, monkeypatch, capsys):
    for seed in range(3):
        model = tiny(seed=seed, vocab_size=260)
        model.tokenizer = byte_tokenizer
        save(model, tmp_path / str(seed))
    ids = np.random.default_rng(0).integers(4, 260, (4, 40))
    write_shard(tmp_path / "held" / "0.safetensors", CorpusRows(ids, np.ones_like(ids, bool), np.zeros_like(ids)))
    arguments = [f"{10 ** (6 - seed)}={tmp_path / str(seed)}" for seed in range(3)]
    plot = tmp_path / "law.png"
    monkeypatch.setattr(
        sys, "argv", [str(FILE), str(tmp_path / "held"), *arguments, "--questions", "2", "--plot", str(plot)]
    )
    module.main()
    found = json.loads(capsys.readouterr().out)
    assert [point["tokens"] for point in found["points"]] == [1e4, 1e5, 1e6]
    assert all(point["tokens_per_nfe"] >= 1 and point["loss"] > 0 for point in found["points"])
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a", "b", "c"], "must be TOKENS=CHECKPOINT"),
        (["1e6=a", "x=b", "2e6=c"], "'x=b'"),
        (["1=a", "2=b"], "at least 3"),
    ],
)
def test_what_is_no_checkpoint_with_tokens_is_refused(module, monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr(sys, "argv", [str(FILE), "held", *arguments])
    with pytest.raises(SystemExit):
        module.main()
    assert complaint in capsys.readouterr().err
