import fnmatch
from pathlib import Path
from typing import Any

import pytest

from twotower.checkpoints.hf import resolve


def test_resolve_prefers_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


def test_resolve_downloads_only_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append(options | {"repo_id": repo_id})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/name") == tmp_path
    assert [call["repo_id"] for call in asked] == ["owner/name"] * 2
    assert asked[1]["revision"] == tmp_path.name

    def fetched(name: str) -> bool:
        def matches(call: dict[str, Any], patterns: str) -> bool:
            return any(fnmatch.fnmatch(name, p) for p in call.get(patterns, ()))

        return any(matches(call, "allow_patterns") and not matches(call, "ignore_patterns") for call in asked)

    wanted = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    wanted += ["tokenizer.model", "merges.txt", "qwen.tiktoken", "additional_chat_templates/tool_use.jinja"]
    refused = ["pytorch_model.bin", "model.pt", "modeling_x.py", "training_args.bin", "original/model.safetensors"]
    refused += ["consolidated.safetensors", "onnx/config.json", "README.md"]
    assert [n for n in wanted + refused if fetched(n)] == wanted


def test_resolve_without_a_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="owner/name is neither a local directory nor a hub repository"):
        resolve("owner/name")


@pytest.mark.parametrize("name", ["no-such-directory", "/no/such/directory", "a/b/c", "../x y/z"])
def test_resolve_what_can_not_be_a_hub_id(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        resolve(name)


def test_resolve_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file, must be a checkpoint directory"):
        resolve(tmp_path / "model.safetensors")
