"""`twotower inspect`: its numbers against the model's own tensors, and every kind of difference."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import twotower
from twotower.checkpoints import released_shapes, save
from twotower.planning.footprint import pass_bytes, released_tensors, state_bytes


def report(run, path, *options):
    return json.loads(run("inspect", path, "--json", *options).stdout)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint to damage, and a function that damages its tensors."""
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)

    def change(edit):
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return change


def test_parameters_add_up_to_the_models(run, checkpoint, model):
    result = run("inspect", checkpoint)
    found = report(run, checkpoint)
    total = sum(tensor.numel() for tensor in model.released_tensors().values())
    assert result.exit_code == 0
    assert f"{total:,}" in result.stdout
    assert found["total_parameters"] == total == sum(sum(part.values()) for part in found["parameters"].values())
    context = {name: t.numel() for name, t in model.context_tower.released_tensors().items()}
    assert found["parameters"]["context"] == {
        "embeddings": context["embeddings.weight"],
        "Mamba-2 layers": sum(n for name, n in context.items() if name.startswith("layers.0.")),
        "attention layers": sum(n for name, n in context.items() if name.startswith("layers.1.")),
        "MLP layers": sum(n for name, n in context.items() if name.startswith("layers.2.")),
        "expert layers": sum(n for name, n in context.items() if name.startswith("layers.3.")),
        "final norm": model.config.hidden_size,
        "head": model.context_lm_head.weight.numel(),
    }
    assert found["parameters"]["denoiser"].items() - found["parameters"]["context"].items() == {
        ("time conditioning", sum(p.numel() for p in model.time_conditioning.parameters()))
    }


def test_a_tied_head_has_no_parameters_of_its_own(run, tiny, tmp_path):
    save(tiny("llama"), tmp_path)
    found = report(run, tmp_path)
    assert found["tied_head"] is True
    assert "head" not in found["parameters"]["context"]
    assert "the embeddings" in run("inspect", tmp_path).stdout


def test_the_layers_of_a_shorter_denoiser_are_told(run, tiny, tmp_path):
    model = tiny("M*-E*-", denoiser_layers=(1, 3))
    save(model, tmp_path)
    found = report(run, tmp_path)
    assert found["denoiser_layers"] == [1, 3]
    assert "attention layers" in found["parameters"]["denoiser"]
    assert "MLP layers" not in found["parameters"]["denoiser"]
    assert found["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert "of them the denoiser has 2, *E: 1, 3" in run("inspect", tmp_path).stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_a_loaded_model_and_its_state(run, checkpoint, dtype):
    loaded = twotower.load(checkpoint, dtype=getattr(torch, dtype), pack=False)
    length = 128  # whole key tiles: the state holds no more than the formula counts
    found = report(run, checkpoint, "--context-length", length)
    assert found["weight_bytes"][dtype] == sum(p.nbytes for p in loaded.parameters())
    state = loaded.prefill(torch.ones(1, length, dtype=torch.long))
    [counted] = [s for s in found["state_bytes"] if s["dtype"] == dtype]
    assert counted["context_length"] == length
    assert counted["keys_and_values"] == sum(t.nbytes for t in (*state.buffer.keys, *state.buffer.values))
    assert counted["recurrent"] == sum(t.nbytes for layer in state.mamba for t in layer)


@pytest.mark.parametrize("kind", "MGSR")
def test_recurrent_states_of_every_kind_are_counted(kind, tiny):
    model = tiny(kind, conv_kernel=3)
    state = model.prefill(torch.ones(1, 5, dtype=torch.long))
    held = sum(t.nbytes for layer in state.mamba for t in layer)
    assert state_bytes(model.config, 5, torch.float32).recurrent == held


def test_stored_types_are_the_files(run, checkpoint, copy):
    def halve(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()

    found = report(run, copy(halve))
    whole = report(run, checkpoint)
    head = 260 * 32
    total = whole["total_parameters"]
    assert whole["stored_parameters"] == {"float32": total}
    assert found["stored_parameters"] == {"float32": total - head, "bfloat16": head}


def test_every_difference_is_told_and_exits_1(run, copy, model):
    missing = [name for name in released_shapes(model.config) if ".experts." in name]

    def damage(tensors):
        for name in missing:
            del tensors[name]
        tensors["extra.weight"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(3, 5)

    path = copy(damage)
    result = run("inspect", path)
    assert result.exit_code == 1
    assert result.stdout.count("missing: ") == len(missing) > 5
    assert all(f"missing: {name}\n" in result.stdout for name in missing)
    assert "unexpected: extra.weight\n" in result.stdout
    assert "wrong shape: lm_head.weight is (3, 5), must be (260, 32)\n" in result.stdout
    found = report(run, path)["differences"]
    assert found == {
        "missing": missing,
        "unexpected": ["extra.weight"],
        "wrong_shape": {"lm_head.weight": [[3, 5], [260, 32]]},
    }
    assert run("inspect", path, "--json").exit_code == 1


def test_no_difference_exits_0(run, checkpoint):
    assert run("inspect", checkpoint, "--json").exit_code == 0
    assert "All " in run("inspect", checkpoint).stdout


def test_what_may_be_asked_for_and_what_drafts_is_told(run, checkpoint, tmp_path):
    found = report(run, checkpoint)
    assert (found["target_retention"], found["drafter"]) == (None, "denoiser")
    assert "target_retention can't be asked for" in run("inspect", checkpoint).stdout
    own = shutil.copytree(twotower.checkpoints.resolve("hybrid"), tmp_path / "own")
    calibration = twotower.load("hybrid").calibration
    most, in_words = calibration.most, calibration.most_told
    (own / "generation_config.json").write_text('{"drafter": "prompt,denoiser"}')
    found, told = report(run, own), " ".join(run("inspect", own).stdout.split())
    assert (found["target_retention"], found["drafter"]) == (most, "prompt,denoiser")
    assert f"target_retention may be up to {in_words}, by a calibration on" in told
    assert "drafts from prompt,denoiser unless told otherwise" in told
    file = own / "twotower_calibration.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rules": []}))
    assert report(run, own)["target_retention"] is None


def test_no_weights_are_read(run, copy, monkeypatch):
    path = copy(lambda tensors: None)
    monkeypatch.setattr("twotower.checkpoints.hf.tensor_files.TensorFiles.stream", None)
    assert run("inspect", path).exit_code == 0


def test_a_broken_file_is_a_mistake(run, copy):
    path = copy(lambda tensors: None)
    (path / "model.safetensors").write_bytes(b"{}")
    result = run("inspect", path)
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr


def test_keys_and_values_grow_with_the_context_and_the_rest_does_not(model):
    short, long = (state_bytes(model.config, length, torch.float32) for length in (10, 30))
    assert long.keys_and_values == 3 * short.keys_and_values > 0
    assert long.recurrent == short.recurrent > 0


def test_a_pass_reads_the_head_only_for_logits_and_no_more_experts_than_it_can_choose(model):
    config = model.config
    tensors = released_tensors(config, torch.float32)
    row = config.hidden_size * 4
    expert = sum(t.nbytes for name, t in tensors.items() if name.startswith("context_tower.") and ".experts.0." in name)
    assert expert > 0

    def context(tokens, head=False):
        return pass_bytes(config, tensors, "context", tokens, head=head)

    assert context(1, head=True) - context(1) == config.vocab_size * row
    assert context(2) - context(1) == pytest.approx(row + 2 * expert)  # 2 of 8 experts per token
    assert context(5) - context(4) == pytest.approx(row)  # all 8 are in use
    whole = sum(t.nbytes for name, t in tensors.items() if name.startswith("context_"))
    assert context(4, head=True) == pytest.approx(whole - (config.vocab_size - 4) * row)
    denoiser = pass_bytes(config, tensors, "denoiser", 4, head=True)
    time = sum(t.nbytes for name, t in tensors.items() if name.startswith(("t_embedder", "t_block", "scale_shift")))
    assert denoiser - context(4, head=True) == pytest.approx(time)


def test_a_tied_head_is_read_as_the_whole_embedding(tiny):
    config = tiny("llama").config
    tensors = released_tensors(config, torch.float32)
    with_head, without = (pass_bytes(config, tensors, "context", 1, head=head) for head in (True, False))
    assert with_head - without == config.vocab_size * config.hidden_size * 4


def test_the_backend_is_told_with_its_reason(run, checkpoint):
    found = report(run, checkpoint)["backends"]
    assert set(found) == {"float32", "bfloat16"}
    for choice in found.values():
        assert f"Backend {choice['name']}: {choice['reason']}." in run("inspect", checkpoint).stdout
