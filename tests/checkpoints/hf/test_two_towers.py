import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from twotower.checkpoints import load_model, load_tokenizer, released_shapes, save
from twotower.checkpoints.hf import save_rounded
from twotower.config import TwoTowerConfig
from twotower.model.two_tower import TwoTower

Model = Callable[..., TwoTower]


def listing(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def small_tokenizer() -> tokenizers.Tokenizer:
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


@pytest.fixture
def saved(tmp_path: Path, tiny: Model) -> Path:
    save(tiny(), tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# The limit at which the released writer started hybrid's second shard.
@pytest.mark.parametrize(("case", "shard"), [("hybrid", 1_529_920), ("dense", 5_000_000_000)])
def test_released_files_are_written_back_byte_for_byte(
    golden_directory: Path, tmp_path: Path, case: str, shard: int
) -> None:
    save(load_model(golden_directory / case), tmp_path, max_shard_bytes=shard)
    released = {n: b for n, b in listing(golden_directory / case).items() if not n.startswith("golden.")}
    assert listing(tmp_path) == released


def test_released_shapes_are_those_of_the_files_in_their_order(golden_directory: Path) -> None:
    shapes = released_shapes(TwoTowerConfig.from_json(golden_directory / "hybrid" / "config.json"))
    index = json.loads((golden_directory / "hybrid" / "model.safetensors.index.json").read_text())
    assert list(shapes) == list(index["weight_map"])
    stored = load_file(golden_directory / "dense" / "model.safetensors")
    shapes = released_shapes(TwoTowerConfig.from_json(golden_directory / "dense" / "config.json"))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [3000, 10**9])
def test_write_read_write_gives_the_same_bytes(tmp_path: Path, tiny: Model, dtype: torch.dtype, shard: int) -> None:
    model = tiny(dtype=dtype)
    model.tokenizer = small_tokenizer()
    save(model, tmp_path / "1", max_shard_bytes=shard)
    again = load_model(tmp_path / "1")
    before, after = model.released_tensors(), again.released_tensors()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    again.tokenizer = load_tokenizer(tmp_path / "1")
    save(again, tmp_path / "2", max_shard_bytes=shard)
    first = listing(tmp_path / "1")
    assert {"config.json", "tokenizer.json"} < set(first)
    assert ("model.safetensors" in first) == (shard == 10**9)
    assert listing(tmp_path / "2") == first


def test_options_of_the_config_change_the_tensors(tmp_path: Path, tiny: Model) -> None:
    model = tiny(
        "M*-",
        gated_mlp=True,
        mlp_hidden_act="silu",
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        use_bias=True,
        use_conv_bias=False,
    )
    save(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not {"lm_head.weight", "context_lm_head.weight", "context_tower.layers.0.mixer.conv1d.bias"} & names
    assert {
        "denoiser_tower.layers.0.mixer.in_proj.bias",
        "denoiser_tower.layers.1.mixer.o_proj.bias",
        "context_tower.layers.2.mixer.gate_proj.bias",
    } < names
    ids = torch.arange(10)[None]
    assert torch.equal(load_model(tmp_path).context_logits(ids), model.context_logits(ids))


def test_dtype_is_the_configs_else_the_embeddings(saved: Path) -> None:
    def loaded_dtype(**keys: Any) -> torch.dtype:
        raw = {k: v for k, v in json.loads((saved / "config.json").read_text()).items() if "dtype" not in k}
        (saved / "config.json").write_text(json.dumps(raw | keys))
        return load_model(saved).released_tensors()["lm_head.weight"].dtype

    rewrite(saved, lambda t: t.update({k: v.half() for k, v in t.items() if ".gate." not in k}))
    assert loaded_dtype() == torch.float16
    assert loaded_dtype(torch_dtype="bfloat16") == torch.bfloat16
    assert loaded_dtype(dtype="float32") == torch.float32
    with pytest.raises(ValueError, match=r"dtype is 'int4' in config\.json, must be one of \['bfloat16', 'float16'"):
        loaded_dtype(dtype="int4")


def test_saving_in_another_dtype_says_so_in_the_config(golden_directory: Path, tmp_path: Path) -> None:
    save(load_model(golden_directory / "dense", dtype=torch.bfloat16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path).released_tensors()["lm_head.weight"].dtype == torch.bfloat16


def test_progress_counts_tensors(golden_directory: Path) -> None:
    calls = []
    load_model(golden_directory / "dense", progress=lambda done, total: calls.append((done, total)))
    total = len(load_file(golden_directory / "dense" / "model.safetensors"))
    assert calls == [(i, total) for i in range(1, total + 1)]


def test_missing_unexpected_and_misshapen_tensors_are_one_error(saved: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["context_tower.layers.9.norm.weight"] = tensors.pop("context_tower.layers.1.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].t().contiguous()

    rewrite(saved, change)
    with pytest.raises(ValueError) as raised:
        load_model(saved)
    text = str(raised.value)
    assert "1 missing: context_tower.layers.1.norm.weight" in text
    assert "1 unexpected: context_tower.layers.9.norm.weight" in text
    assert "1 of the wrong shape: lm_head.weight is (32, 40), must be (40, 32)" in text


def test_shapes_are_compared_before_anything_is_allocated(saved: Path) -> None:
    raw = json.loads((saved / "config.json").read_text())
    # 4 TiB for each of the four vocabulary matrices: allocating them would fail with another error.
    (saved / "config.json").write_text(json.dumps(raw | {"vocab_size": 2**35}))
    with pytest.raises(ValueError, match=r"4 of the wrong shape: context_tower\.embeddings\.weight"):
        load_model(saved)


def test_no_config(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(saved)


def test_saving_keeps_a_tokenizer_that_is_there(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    save(load_model(saved), saved)
    assert (saved / "tokenizer.json").read_text() == "{}"


# VmHWM, not ru_maxrss: a child process starts with its parent's ru_maxrss.
MEASURE = """
import re, sys
from pathlib import Path
import torch
from twotower.checkpoints import load_model, released_shapes
from twotower.config import TwoTowerConfig

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

# The first model on the meta device makes torch import some 30 MB.
released_shapes(TwoTowerConfig.from_json(Path(sys.argv[1]) / "config.json"))
before = peak()
model = load_model(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_model_and_at_most_one_shard(tmp_path: Path) -> None:
    config = TwoTowerConfig(vocab_size=8000, hidden_size=512, pattern="-" * 8, intermediate_size=2048)
    model = TwoTower(config)
    size = sum(p.numel() * 4 for p in model.parameters()) / 1024
    save(model, tmp_path, max_shard_bytes=20_000_000)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    # Slack of 20 MB for the allocator and a second mapped shard; a state dict of everything would cost another `size`.
    assert size > 190_000
    assert size * 0.9 < int(result.stdout) < size + 20_000 + 20_000


def test_rounded_tensors_are_those_that_a_rounded_model_rounds(tiny: Model, tmp_path: Path) -> None:
    model = tiny()
    exact = model.released_tensors()
    save_rounded(TwoTower, model.config, exact.items(), tmp_path, torch.bfloat16)
    written = load_file(tmp_path / "model.safetensors")
    expected = {name: t.dtype for name, t in TwoTower(model.config, dtype=torch.bfloat16).released_tensors().items()}
    assert {name: tensor.dtype for name, tensor in written.items()} == expected
    kept = {name for name, dtype in expected.items() if dtype == torch.float32}
    assert {name for name in expected if ".gate." in name} <= kept  # routers choose the same experts
    assert all(torch.equal(written[name], exact[name].to(expected[name])) for name in expected)
