"""The table of families: a family that opens has numbers, another one the reason."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "families.py"


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("families", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_family_is_compared_in_every_form(families, tmp_path):
    row = families.compare("Qwen 3", tmp_path)
    assert row["verified is ar"]
    assert row["difference"] < 1e-5
    assert row["gguf"] < 1e-5


@pytest.mark.slow
def test_a_family_that_is_not_opened_has_the_reason(families, tmp_path, monkeypatch):
    monkeypatch.setitem(families.MODELS, "XGLM", ("xglm", {}))
    assert "positions of sines" in families.compare("XGLM", tmp_path)["error"]
