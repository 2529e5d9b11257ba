"""Towers on two devices, as far as that can be told without any."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from twotower.decoding.params import MODES

PROGRAM = Path(__file__).parent / "absent_devices.py"


@pytest.mark.parametrize("kind", [{"pattern": "M*-"}, {"pattern": "*-", "use_rope": True, "tie_word_embeddings": True}])
def test_towers_on_two_devices_wait_for_nothing_but_the_rounds_results(kind, sizes):
    """Without experts: the reference op of `E` layers reads its routing back."""
    command = [sys.executable, str(PROGRAM), json.dumps(sizes | kind)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["waits"] == []
    assert found["finished"] == 2 * len(MODES) + 1
    assert found["steps per read"] >= len({"ar", "mock_ar", "diffusion", "verified"})
