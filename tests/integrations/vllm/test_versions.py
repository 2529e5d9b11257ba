"""The plugin beside a vLLM that it was not made for: it must not stand in the way of other models."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

OTHER_VLLM = """
import sys
from importlib import metadata
version = metadata.version
metadata.version = lambda name: "0.40.1" if name == "vllm" else version(name)
sys.modules["vllm"] = None  # importing anything of it is an ImportError
from twotower.integrations.vllm import register
register()
register()
from transformers import AutoConfig
print(AutoConfig.from_pretrained(sys.argv[1]).architectures)
"""
CONFIG = {"model_type": "nemotron_h", "vocab_size": 32, "hidden_size": 8, "hybrid_override_pattern": "-"}


def read(folder, architecture):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"architectures": [architecture]}))
    return subprocess.run([sys.executable, "-c", OTHER_VLLM, str(folder)], capture_output=True, text=True, check=False)


def test_other_models_open_as_before_and_nothing_of_vllm_is_imported(tmp_path) -> None:
    done = read(tmp_path, "NemotronHForCausalLM")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['NemotronHForCausalLM']"


def test_two_towers_are_refused_in_a_sentence(tmp_path) -> None:
    done = read(tmp_path, "NemotronHTwoTowerForCausalLM")
    assert done.returncode == 1
    assert "vLLM is 0.40.1, must be at least 0.32 and below 0.33" in done.stderr
