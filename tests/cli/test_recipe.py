"""Recipes: values from a file, overridden by the command line; every shipped one passes its dry run."""

from pathlib import Path

import pytest

from twotower.checkpoints.load import DEFAULT_CHECKPOINT
from twotower.cli import train
from twotower.cli.prepare import TrainingInputs

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "file", sorted(RECIPES.glob("*/*train.yaml")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_shipped_recipes_pass_their_dry_run(run, file, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    model = DEFAULT_CHECKPOINT if file.parent.name == "stories" else file.parent
    result = run("pretrain" if file.stem == "pretrain" else "train", model, "--recipe", file, "--dry-run")
    assert result.exit_code == 0, result.output
    expected = {
        "stories": "parameters: 15,907,680, of which 8,162,496 are trained",
        "nemotron-30b": "blocks: 32 from step 0, 32 from step 120000, 16 from step 200000",
    }
    assert expected.get(file.parent.name, "FLOPs: about") in result.stdout


def test_the_published_run_is_of_its_size(run, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    printed = run("train", "--recipe", RECIPES / "nemotron-30b" / "train.yaml", "--dry-run").stdout
    assert "parameters: 63,185,902,848, of which 31,607,962,560 are trained" in printed
    assert "tokens: 2,100,0" in printed
    assert "of each of 256 ranks" in printed


@pytest.fixture
def seen(monkeypatch):
    """The settings that a run would have had."""
    found = []

    def stop(objective, corpus, config, folder, ranks, **others):
        found.append((config, objective.config, folder))
        raise ValueError("seen")

    monkeypatch.setattr(train, "Trainer", stop)
    return found


def test_what_is_given_wins_over_the_recipe(run, checkpoint, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_corpus", lambda *arguments: None)
    monkeypatch.setattr(train, "prepare", lambda model, *others: TrainingInputs(model, {"corpus": Path("there")}))
    recipe = tmp_path / "a.yaml"
    lines = ("model: nowhere", "corpus: there", "out: result", "steps: 7", "learning_rate: 3e-4", "bf16: true",
             "phases: '0:8,3:4'", "reduction: example_mean", "warmup_steps: 0", "complementary: true")  # fmt: skip
    recipe.write_text("\n".join(lines))
    run("train", checkpoint, "--recipe", recipe, "--steps", 9, "--warmup-steps", 5, "--no-complementary")
    config, what, folder = seen.pop()
    assert (config.steps, config.learning_rate, config.bf16, config.warmup_steps) == (9, 3e-4, True, 5)
    assert (what.reduction, [tuple(phase) for phase in what.phases]) == ("example_mean", [(0, 8), (3, 4)])
    assert not what.complementary
    assert folder == Path("result")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown keys ['stepz']"),
        ("recipe: other.yaml", "unknown keys ['recipe']"),
        ("- 1", "holds a list, must hold keys and values"),
        ("a: [", "is not YAML"),
        ("steps:", "steps is None"),
        ("steps: [1, 2]", "steps is [1, 2]"),
        ("steps: many", "Invalid value for '--steps'"),
    ],
)
def test_a_recipe_that_says_nonsense_is_a_mistake(run, tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    result = run("train", "a", "b", "c", "--recipe", file)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_switch_s_value_is_no_number(run, checkpoint, tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text("steps: true")
    result = run("train", checkpoint, tmp_path, tmp_path / "out", "--recipe", recipe)
    assert result.exit_code == 2
    assert "steps is True" in result.stderr
    assert "must be a value of --steps" in result.stderr


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        (("sample", "stories", "out"), "length: 1", "--length is 1, must be an integer of at least 2"),
        (("serve",), "max_num_requests: 0", "--max-requests is 0, must be an integer of at least 1"),
        (("serve",), "max-requests: 0", "--max-requests is 0, must be an integer of at least 1"),
        (("serve",), "state_mib: 0", "state_bytes is 0, must be an integer of at least 1"),
    ],
)
def test_sample_and_serve_read_recipes(run, tmp_path, monkeypatch, command, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(line)
    result = run(*command, "--recipe", tmp_path / "a.yaml")
    assert result.exit_code == 2
    assert message in result.stderr
