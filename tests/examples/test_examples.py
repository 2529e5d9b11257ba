"""Every example runs as its user would run it, in a process of its own, and prints what it promises."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Beside `twotower` and the standard library: PyTorch, whose tensors it takes, and what the example is about.
ALLOWED = {"twotower", "torch", "openai", *sys.stdlib_module_names}

# Arguments that make a run short, and text that its output must hold.
RUNS = {
    "commit_rule": (["--blocks", "1"], "16 tokens in "),
    "compare_modes": (["--repeats", "1"], "verified                 4 of   4"),
    "inspect_steps": (["--tokens", "16"], "ended by 'length' after 16 tokens"),
    "many_requests": (["--tokens", "8"], "[verified, waited "),
    "openai_client": ([], "total_tokens=37"),
    "score_texts": ([], "'Lily. She loved to play outside.': log-probability "),
    "stream_steps": (["--tokens", "16"], "  0% masked  "),
    "train_denoiser": (["--steps", "5"], "step    5  loss "),
}


def test_every_example_is_run() -> None:
    assert {file.stem for file in EXAMPLES} == RUNS.keys()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short_and_uses_public_names_only(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 70
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert "twotower" in modules or "openai" in modules
    assert {name for name in modules if name.startswith("twotower.")} == set(), "examples use the public names"
    assert {name.partition(".")[0] for name in modules} <= ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example_prints_what_it_promises(name: str, tmp_path: Path) -> None:
    arguments, expected = RUNS[name]
    # The sources beside this test, not an installed copy; sums on one thread, as everywhere in the tests
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    call = [sys.executable, ROOT / "examples" / f"{name}.py", *arguments]
    done = subprocess.run(
        call, capture_output=True, encoding="utf-8", timeout=240, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
