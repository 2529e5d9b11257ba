"""The steps that benchmarks/training_pass.py times against one another are the same step."""

import importlib.util
from pathlib import Path

import pytest
import torch

from twotower.config import TwoTowerConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "training_pass.py"


@pytest.fixture(scope="module")
def training_pass():
    spec = importlib.util.spec_from_file_location("training_pass", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_boundary_states_and_a_dense_mask_give_the_same_gradients(training_pass, sizes):
    config = TwoTowerConfig(pattern="M*-EM*-E", **sizes)
    model, case = training_pass.random_model(config), training_pass.make_case(config, 64, 16)
    found = {}
    for name, step in {
        "boundary": training_pass.boundary_step,
        "seeded": lambda *a: training_pass.seeded_step(*a, recompute=False),
        "recompute": lambda *a: training_pass.seeded_step(*a, recompute=True),
    }.items():
        model.zero_grad(set_to_none=True)
        step(model, case)
        found[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(found["boundary"]) > 20
    for name in ("seeded", "recompute"):
        assert found[name].keys() == found["boundary"].keys()
        for parameter, gradient in found[name].items():
            other = found["boundary"][parameter]
            torch.testing.assert_close(
                gradient, other, rtol=0, atol=1e-4 * float(other.abs().max()) + 1e-7, msg=parameter
            )
