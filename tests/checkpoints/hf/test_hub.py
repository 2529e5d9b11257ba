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
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/name") == tmp_path
    assert asked["repo_id"] == "owner/name"

    def fetched(name: str) -> bool:
        allowed = any(fnmatch.fnmatch(name, p) for p in asked["allow_patterns"])
        return allowed and not any(fnmatch.fnmatch(name, p) for p in asked["ignore_patterns"])

    wanted = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    refused = ["pytorch_model.bin", "model.pt", "modeling_x.py", "training_args.bin", "original/model.safetensors"]
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
