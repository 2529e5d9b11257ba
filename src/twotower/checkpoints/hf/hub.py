"""Finding a checkpoint: a local directory, one that comes with the package, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

# The checkpoints that come with the package, by the names under which they are opened.
SHIPPED = {name: Path(__file__).parents[2] / "data" / name for name in ("stories", "hybrid")}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt"]
# Only top-level files: repositories keep other formats' weights in folders, and Mistral's a second copy of all weights
# under its own names.
_PASSED_OVER = ["*/*", "consolidated*.safetensors"]
_LFS_POINTER = b"version https://git-lfs"
_NAMED_TEMPLATES = ["additional_chat_templates/*.jinja"]


def refuse_pointer(file: Path) -> None:
    """Raises ValueError for what Git leaves in place of a file that Git LFS keeps and that was not fetched."""
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{file} is only a pointer to the file; fetch it with: git lfs pull")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint: an existing path, a name in `SHIPPED`, or a hub id, which is downloaded.

    Only JSON, safetensors, tokenizer and chat template files are downloaded, into the hub's own cache. Raises
    ValueError for a file, and FileNotFoundError where there is no such directory and no such repository can be reached.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file, must be a checkpoint directory; give the directory that holds it")
    # A Path is always a place on disk, so that Path("hybrid") never means the shipped checkpoint.
    if isinstance(path_or_hub_id, str) and path_or_hub_id in SHIPPED:
        return SHIPPED[path_or_hub_id]
    if not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise FileNotFoundError(
            f"there is no directory {path}; give an existing one, a hub id such as owner/name, "
            f"or a shipped checkpoint: {', '.join(SHIPPED)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=_DOWNLOADED, ignore_patterns=_PASSED_OVER))
        # The folder's name is the commit, so that both downloads are of one state
        snapshot_download(str(path_or_hub_id), revision=folder.name, allow_patterns=_NAMED_TEMPLATES)
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{path_or_hub_id} is neither a local directory nor a hub repository that can be downloaded ({error}); "
            "check the spelling, the connection and your access"
        ) from error
