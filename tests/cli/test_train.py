"""`twotower train`: two steps, resuming, and the exported checkpoint."""

import dataclasses
import json
import resource
import shutil
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import twotower
from twotower.checkpoints import save
from twotower.cli import train
from twotower.training.config import DenoisingConfig, Phase, Share
from twotower.training.corpus.shards import CorpusRows, write_shard
from twotower.training.run.trainer import TrainConfig


@pytest.fixture(scope="module")
def backbone(tiny, byte_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone")
    model = tiny("llama", vocab_size=260, block_size=4)
    model.tokenizer = byte_tokenizer
    save(model, path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 260, (8, 12))
    write_shard(path / "0.safetensors", CorpusRows(ids, np.ones_like(ids), ids * 0))
    return path


def train_to(run, backbone, corpus, out, steps, *options):
    result = run("train", backbone, corpus, out, "--steps", steps, "--batch-size", 2, "--warmup-steps", 0, *options)
    assert result.exit_code == 0, result.output
    return result


def tensors(path):
    return twotower.load(path, pack=False).released_tensors()


def test_two_steps_train_the_denoiser_and_export_what_loads(run, backbone, corpus, tmp_path):
    result = train_to(run, backbone, corpus, tmp_path, 2, "--dtype", "float32")
    assert "step 2 of 2: loss" in result.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    before, after = tensors(backbone), tensors(tmp_path / "checkpoint")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("context_") for name in changed)
    printed = run("generate", "ab", "--model", tmp_path / "checkpoint", "--json", "--max-new-tokens", 5)
    assert len(json.loads(printed.stdout)["token_ids"]) == 5


def test_a_second_call_resumes_and_ends_where_one_call_ends(run, backbone, corpus, tmp_path):
    train_to(run, backbone, corpus, tmp_path / "once", 2, "--dtype", "float32")
    train_to(run, backbone, corpus, tmp_path / "twice", 1, "--dtype", "float32")
    train_to(run, backbone, corpus, tmp_path / "twice", 2, "--dtype", "float32")
    steps = [json.loads(line)["step"] for line in (tmp_path / "twice" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    once, twice = (tensors(tmp_path / name / "checkpoint") for name in ("once", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_export_only_writes_the_saved_state_again_in_the_dtype_asked_for(run, backbone, corpus, tmp_path):
    train_to(run, backbone, corpus, tmp_path, 2, "--dtype", "float32")
    exact = {name: tensor.clone() for name, tensor in tensors(tmp_path / "checkpoint").items()}
    result = train_to(run, backbone, corpus, tmp_path, 9, "--export-only")
    assert f"wrote {tmp_path / 'checkpoint'}" in result.stdout
    rounded = tensors(tmp_path / "checkpoint")
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_a_finished_run_says_that_nothing_is_left(run, backbone, corpus, tmp_path):
    train_to(run, backbone, corpus, tmp_path, 3)
    for steps in (3, 2):
        told = train_to(run, backbone, corpus, tmp_path, steps)
        assert "step-00000003: 3 steps and 72 tokens are done, loss" in told.stderr
        assert f"nothing is left to train of {steps} steps" in told.stderr
        assert (
            f"wrote {tmp_path / 'checkpoint'} from step-00000003 in place of {tmp_path / 'checkpoint'}" in told.stdout
        )
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_a_resume_says_from_where_and_what_it_replaces(run, backbone, corpus, tmp_path):
    assert f"beginning: {tmp_path} has no saved state; 2 steps, 48 tokens, to go" in (
        train_to(run, backbone, corpus, tmp_path, 2).stderr
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as a kill between two saved states leaves it
        file.write('{"step": 3}\n{"ste')
    told = train_to(run, backbone, corpus, tmp_path, 5, "--checkpoint-every", 9).stderr
    assert f"going on from {tmp_path / 'state' / 'step-00000002'}: 2 steps and 48 tokens are done, loss " in told
    assert "3 steps, 72 tokens, to go" in told
    for note in (
        "checkpoint_every is 9 and was 100",
        "steps is 5 and was 2",
        "2 later lines of metrics.jsonl are made again",
        f"{tmp_path / 'checkpoint'} (step 2) will be replaced at the end",
    ):
        assert f"  {note}\n" in told
    record = json.loads((tmp_path / "checkpoint" / "training.json").read_text())
    assert (record["step"], record["tokens"]) == (5, 120)
    assert [call["settings"]["steps"] for call in record["calls"]] == [2, 5]
    assert record["calls"][0]["settings"]["model"] == str(backbone)


def test_other_settings_are_refused_unless_told(run, backbone, corpus, tmp_path):
    train_to(run, backbone, corpus, tmp_path, 2)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    arguments = ("train", backbone, corpus, tmp_path, "--steps", 4, "--batch-size", 4, "--learning-rate", 0.05)
    result = run(*arguments, "--warmup-steps", 0)
    assert result.exit_code == 2
    assert "batch_size is 4 and was 2, learning_rate is 0.05 and was 0.001 in" in result.stderr
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    result = run(*arguments, "--warmup-steps", 0, "--allow-changes")
    assert result.exit_code == 0
    assert "  batch_size is 4 and was 2\n" in result.stderr


def test_a_finished_checkpoint_without_its_state_is_not_replaced(run, backbone, corpus, tmp_path):
    train_to(run, backbone, corpus, tmp_path, 2)
    shutil.rmtree(tmp_path / "state")
    weights = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    result = run("train", backbone, corpus, tmp_path, "--steps", 1, "--batch-size", 2)
    assert result.exit_code == 2
    assert "is a finished checkpoint, and" in result.stderr
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == weights
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_chat_template_goes_along(run, backbone, corpus, tmp_path):
    start, out = shutil.copytree(backbone, tmp_path / "start"), tmp_path / "out"
    (start / "chat_template.jinja").write_text("{{ messages }}")
    (start / "tokenizer_config.json").write_text("{}")
    train_to(run, start, corpus, out, 1, "--ema-decay", 0.5)
    for folder in (out / "checkpoint", out / "checkpoint-ema"):
        assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
        assert (folder / "tokenizer_config.json").exists()


def test_export_only_needs_a_state(run, backbone, corpus, tmp_path):
    result = run("train", backbone, corpus, tmp_path / "empty", "--export-only")
    assert result.exit_code == 2
    assert "no saved state" in result.stderr


def test_every_setting_of_a_run_is_an_option_with_its_default(run, backbone, corpus, tmp_path, monkeypatch):
    seen = []

    def stop(objective, corpus, config, folder, ranks, *, held_out, weights):
        assert (weights is not None) == config.shard == next(objective.parameters()).is_meta
        seen.append((config, objective.config, held_out and held_out.length))
        raise ValueError("seen")

    monkeypatch.setattr(train, "Trainer", stop)
    # The values below, each unlike its default, don't go together
    monkeypatch.setattr(train, "check_run", lambda *args, **kwargs: None)
    run("train", backbone, corpus, tmp_path)
    assert seen.pop() == (TrainConfig(steps=1000), DenoisingConfig(), None)
    other = TrainConfig(
        steps=7,
        batch_size=3,
        learning_rate=0.5,
        final_learning_rate=0.25,
        warmup_steps=4,
        decay_steps=2,
        weight_decay=0.25,
        max_grad_norm=2.0,
        micro_batch_size=2,
        ema_decay=0.5,
        spike_factor=4.0,
        skip_limit=5,
        bf16=True,
        shard=True,
        seed=9,
        checkpoint_every=5,
        evaluate_every=6,
    )
    what = DenoisingConfig(
        reduction="example_mean",
        level_per="example",
        full_mask_fraction=0.5,
        later_weight=0.25,
        complementary=False,
        context="trained",
        ar_weight=0.75,
        lora_rank=0,
        recompute=True,
        compile=True,
    )
    masks = (Share("noise", 2.0), Share("trajectory", 0.5))
    what = dataclasses.replace(what, objective=(Share("certainty", 1.0),), masks=masks)
    what = dataclasses.replace(what, trajectory_passes=2, trajectory_threshold=0.5)
    flags = [
        part
        for config in (other, what)
        for name, value in dataclasses.asdict(config).items()
        if name not in ("phases", "objective", "masks")
        for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [value]))
        if value is not False
    ]
    flags += ["--objective", "certainty", "--masks", "noise:2,trajectory:0.5", "--phases", "0:32,4:16"]
    run("train", backbone, corpus, tmp_path, *flags, "--held-out", corpus)
    assert seen.pop() == (other, dataclasses.replace(what, phases=(Phase(0, 32), Phase(4, 16))), 12)
    run("train", backbone, corpus, tmp_path, "--complementary")
    assert seen.pop()[1] == DenoisingConfig(complementary=True)


def test_the_running_mean_and_the_last_block_size_are_exported(run, backbone, corpus, tmp_path):
    options = ("--dtype", "float32", "--ema-decay", 0.9, "--phases", "0:4,2:2")
    result = train_to(run, backbone, corpus, tmp_path, 3, *options)
    assert f"wrote {tmp_path / 'checkpoint-ema'}" in result.stdout
    last, mean = (tensors(tmp_path / name) for name in ("checkpoint", "checkpoint-ema"))
    assert any(not torch.equal(last[name], mean[name]) for name in last)
    assert all(torch.equal(last[name], mean[name]) for name in last if name.startswith("context"))
    assert twotower.load(tmp_path / "checkpoint-ema").config.block_size == 2


@pytest.mark.slow
def test_a_low_rank_run_exports_whole_weights(run, backbone, corpus, tmp_path):
    train_to(run, backbone, corpus, tmp_path, 3, "--dtype", "float32", "--lora-rank", 2)
    before, after = tensors(backbone), tensors(tmp_path / "checkpoint")
    name = "denoiser_tower.layers.0.mixer.q_proj.weight"
    difference = after[name] - before[name]
    assert difference.abs().max() > 0
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2
    assert torch.equal(before["denoiser_tower.embeddings.weight"], after["denoiser_tower.embeddings.weight"])


def test_export_only_takes_the_run_s_settings_from_its_state(run, backbone, corpus, tmp_path):
    options = ("--dtype", "float32", "--phases", "0:4,2:2,9:1", "--lora-rank", 2)
    train_to(run, backbone, corpus, tmp_path, 3, *options)
    written = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    assert twotower.load(tmp_path / "checkpoint").config.block_size == 2  # the phase of step 9 is still to come
    train_to(run, backbone, corpus, tmp_path, 9, "--dtype", "float32", "--export-only")
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == written
    assert twotower.load(tmp_path / "checkpoint").config.block_size == 2


def test_a_state_is_not_mixed_with_another_model(run, backbone, corpus, tmp_path, tiny):
    save(tiny("llama", vocab_size=260, block_size=4, seed=1), tmp_path / "other")
    train_to(run, backbone, corpus, tmp_path / "out", 2)
    for options in (("--steps", 3), ("--export-only",)):
        result = run("train", tmp_path / "other", corpus, tmp_path / "out", "--batch-size", 2, *options)
        assert result.exit_code == 2
        assert "the weights to start from is" in result.stderr
        assert "another output folder" in result.stderr


def test_numbers_go_to_tensorboard_and_to_wandb(run, backbone, corpus, tmp_path, monkeypatch):
    logged, started = [], []

    class Run:
        def log(self, numbers, step):
            logged.append((step, numbers))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train_to(run, backbone, corpus, tmp_path, 2, "--tensorboard", "--wandb", "project")
    reports = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry[0] for entry in logged[:2]] == [1, 2]
    assert logged[1][1]["loss"] == reports[1]["loss"]
    assert logged[2] == "finished"
    assert (started[0]["project"], started[0]["config"]["steps"]) == ("project", 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Scalars("train/loss")[0].value == pytest.approx(reports[0]["loss"])


@pytest.mark.slow
def test_curves_go_on_after_a_kill_and_belong_to_one_folder(run, backbone, corpus, tmp_path, monkeypatch):
    ids = []

    def init(**settings):
        ids.append(settings["id"])
        return types.SimpleNamespace(log=lambda *args, **kwargs: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    out, logs = tmp_path / "train", ("--tensorboard", "--wandb", "project")
    train_to(run, backbone, corpus, out, 1, *logs)
    shutil.copytree(out / "state", tmp_path / "saved")
    train_to(run, backbone, corpus, out, 3, *logs)
    shutil.rmtree(out / "state")
    shutil.copytree(tmp_path / "saved", out / "state")  # as a kill after step 3 leaves it
    train_to(run, backbone, corpus, out, 3, *logs)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    train_to(run, backbone, corpus, tmp_path / "other" / "train", 1, *logs)
    assert len(set(ids[:3])) == 1
    assert ids[3] != ids[0]
    assert ids[0].startswith("train-")


@pytest.mark.parametrize(("flag", "module"), [("--tensorboard", "torch.utils.tensorboard"), ("--wandb=p", "wandb")])
def test_a_missing_package_is_a_mistake(run, backbone, corpus, tmp_path, monkeypatch, flag, module):
    monkeypatch.setitem(sys.modules, module, None)
    result = run("train", backbone, corpus, tmp_path, "--batch-size", 2, flag)
    assert result.exit_code == 2
    assert "pip install" in result.stderr


@pytest.mark.parametrize("phases", ["32", "0:a", "0:1:2"])
def test_phases_that_cannot_be_read_are_a_mistake(run, backbone, corpus, tmp_path, phases):
    result = run("train", backbone, corpus, tmp_path, "--phases", phases)
    assert result.exit_code == 2
    assert f"--phases is '{phases}', must be steps and block sizes" in result.stderr


@pytest.mark.parametrize(
    ("flag", "value"), [("--steps", 0), ("--decay-steps", 99), ("--learning-rate", 0), ("--ar-weight", 1)]
)
def test_a_bad_setting_is_a_mistake(run, backbone, corpus, tmp_path, flag, value):
    result = run("train", backbone, corpus, tmp_path, "--steps", 5, flag, value)
    assert result.exit_code == 2
    assert f"Error: {flag} is {value}" in result.stderr


@contextmanager
def files_of_at_most(num_bytes):
    """A limit on the size of files stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_bytes", "options"),
    [
        (50, ()),  # metrics.jsonl
        (20_000, ("--export-only",)),  # the checkpoint
    ],
)
def test_a_full_disk_is_one_line_and_no_loss(run, backbone, corpus, tmp_path, num_bytes, options):
    train_to(run, backbone, corpus, tmp_path, 1)
    common = ("--steps", 2, "--batch-size", 2, "--warmup-steps", 0)
    arguments = ("train", backbone, corpus, tmp_path, *common, *options)
    with files_of_at_most(num_bytes):
        result = run(*arguments)
    assert result.exit_code == 2, result.exception
    assert "make room and call again" in result.stderr
    assert run(*arguments).exit_code == 0


def test_settings_that_would_do_nothing_are_a_mistake(run, backbone, corpus, tmp_path):
    result = run("train", backbone, corpus, tmp_path, "--final-learning-rate", 1e-5)
    assert result.exit_code == 2
    assert "Error: --final-learning-rate is 1e-05, must be 0 without decay_steps, over which" in result.stderr
    result = run("train", backbone, corpus, tmp_path, "--export-only", "--dry-run")
    assert result.exit_code == 2
    assert "Error: --export-only is True, must be left out with dry_run" in result.stderr


def test_a_damaged_state_is_named(run, backbone, corpus, tmp_path):
    train_to(run, backbone, corpus, tmp_path, 1)
    (tmp_path / "state" / "step-00000001" / "progress.json").unlink()
    for option in ("--export-only", "--steps=2"):
        result = run("train", backbone, corpus, tmp_path, "--batch-size", 2, option)
        assert result.exit_code == 2
        assert "step-00000001 is damaged" in result.stderr
