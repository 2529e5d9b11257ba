"""Model directories as people have them, through `init`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import twotower
from twotower.checkpoints import init

Changed = Callable[[Any, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]], Path]
IDS = torch.arange(9)[None]


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """A copy of a source's directory with its config and tensors changed."""

    def make(source: Any, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
        out = tmp_path / "source"
        out.mkdir()
        config = json.loads((source.directory / "config.json").read_text())
        tensors = load_file(source.directory / "model.safetensors")
        change(config, tensors)
        (out / "config.json").write_text(json.dumps(config))
        save_file(tensors, out / "model.safetensors")
        return out

    return make


@pytest.mark.parametrize("same", [True, False])
def test_a_head_stored_although_tied_is_read_if_it_differs(
    qwen2: Any, changed: Changed, tmp_path: Path, same: bool
) -> None:
    def add_head(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if same else embedding * 2

    source = changed(qwen2, add_head)
    init(source, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    ours = twotower.load(tmp_path / "out")
    assert ours.config.tie_word_embeddings == same
    torch.testing.assert_close(ours.context_logits(IDS)[..., :273], theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_neither_stored_nor_tied_is_missed(llama: Any, changed: Changed, tmp_path: Path) -> None:
    source = changed(llama, lambda c, t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"has no lm_head\.weight, and its config\.json does not say that"):
        init(source, tmp_path / "out")


def test_names_without_the_models_prefix(qwen2: Any, changed: Changed, tmp_path: Path) -> None:
    def rename(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    init(changed(qwen2, rename), tmp_path / "out")
    init(qwen2.directory, tmp_path / "usual")
    found, usual = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "usual"))
    assert found.keys() == usual.keys()
    assert all(torch.equal(found[name], usual[name]) for name in found)


def test_a_quantised_model_is_the_model_of_its_dequantised_weights(
    llama: Any, changed: Changed, tmp_path: Path
) -> None:
    """Fine-grained FP8, as DeepSeek and Qwen publish it; the embedding, norms and head are not quantised."""
    theirs = transformers.LlamaForCausalLM(llama.model.config).eval()
    theirs.load_state_dict(llama.model.state_dict())

    def quantise(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        method = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
        config.update(quantization_config=method, dtype="bfloat16")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            blocks = tensors[name].unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
            scale = blocks.abs().amax((1, 3)) / 448
            rounded = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            theirs.get_parameter(name).data = (rounded.float() * scale[:, None, :, None]).view_as(tensors[name])
            tensors |= {name: rounded.view_as(tensors[name]), f"{name}_scale_inv": scale}

    source = changed(llama, quantise)
    init(source, tmp_path / "out", dtype="float32")
    ours = twotower.load(tmp_path / "out").context_logits(IDS)[..., :273]
    torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    init(source, tmp_path / "narrow")
    tensors = load_file(tmp_path / "narrow" / "model.safetensors")
    assert tensors["context_tower.layers.0.mixer.q_proj.weight"].dtype == torch.bfloat16


OTHERS = {
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "generation_config.json": json.dumps({"do_sample": True, "temperature": 0.5, "eos_token_id": [7, 9]}),
    "chat_template.jinja": "first",
    "chat_template.json": '{"chat_template": "first"}',
    "additional_chat_templates/tool_use.jinja": "first",
}


@pytest.fixture
def rich(llama: Any, changed: Changed, byte_tokenizer: tokenizers.Tokenizer) -> Path:
    """A model with every file that a checkpoint carries along."""
    source = changed(llama, lambda config, tensors: None)
    for name, content in OTHERS.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    byte_tokenizer.save(str(source / "tokenizer.json"))
    return source


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


MODEL = {"config.json", "model.safetensors"}


def test_everything_is_carried_along_by_init_load_and_save(rich: Path, tmp_path: Path) -> None:
    init(rich, tmp_path / "out", mask_token_id=3)
    assert names(tmp_path / "out") == {*MODEL, *OTHERS, "tokenizer.json"}
    model = twotower.load(tmp_path / "out", pack=False)
    assert model.config.eos_token_ids == (7, 9)
    assert model.sampling.temperature == 0.5
    twotower.save(model, tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "out")
    assert all((tmp_path / "again" / name).read_text() == content for name, content in OTHERS.items())


@pytest.mark.parametrize("by_save", [True, False])
def test_nothing_stale_stays(rich: Path, llama: Any, tmp_path: Path, by_save: bool) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    init(rich, out, mask_token_id=3)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model", "vocab.json"):
        (out / name).write_text("stale")
    (out / "notes.txt").write_text("mine")
    init(llama.directory, plain)
    if by_save:
        twotower.save(twotower.load(plain, pack=False), out)
    else:
        init(llama.directory, out)
    assert names(out) == {*names(plain), "notes.txt"}
    assert twotower.load(out).tokenizer is None


def test_after_an_error_the_directory_is_as_it_was(rich: Path, llama: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    init(rich, out, mask_token_id=3)
    before = {name: (out / name).read_bytes() for name in names(out)}
    shutil.copytree(llama.directory, tmp_path / "broken")
    with (tmp_path / "broken" / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        init(tmp_path / "broken", out)
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_the_checkpoints_own_settings_hold_unless_a_request_says_otherwise(rich: Path, tmp_path: Path) -> None:
    init(rich, tmp_path / "out", mask_token_id=3, block_size=5)
    model = twotower.load(tmp_path / "out")
    sampled = twotower.generate(model, [[9, 8]], twotower.SamplingParams(max_new_tokens=40, seed=1, ignore_eos=True))[0]
    explicit = twotower.SamplingParams(max_new_tokens=40, seed=1, ignore_eos=True, temperature=0.5, block_size=5)
    assert sampled.token_ids == twotower.generate(model, [[9, 8]], explicit)[0].token_ids
    greedy = twotower.SamplingParams(max_new_tokens=40, seed=1, ignore_eos=True, temperature=0)
    assert sampled.token_ids != twotower.generate(model, [[9, 8]], greedy)[0].token_ids
    assert set(twotower.generate(model, [[9, 8]])[0].token_ids[:-1]).isdisjoint({7, 9})
