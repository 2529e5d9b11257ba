"""Reading documents from files, folders and Hugging Face datasets."""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from twotower.config import TwoTowerConfig
from twotower.options import check_options, option
from twotower.training.corpus.conversations import Conversations, messages_field
from twotower.training.corpus.documents import Document, LongText, SourceRecord, field_text
from twotower.training.corpus.files import CHUNK, open_text
from twotower.training.corpus.json_records import read_json
from twotower.training.corpus.row_length import check_row_length, past_positions_option, usual_length

# The length of rows where none is asked for and the model has as many positions.
USUAL_LENGTH = 1024
_PARQUET_ROWS = 64
_DATASET_ID = re.compile(r"([\w.-]+/)?[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Rows of `length` tokens; the field of a record that holds its text, and the one that holds its prompt, if any.
    None for `length` is 1,024, or the model's positions if it has fewer.

    Names of control tokens, such as </s>, are those tokens in prompts, which chat templates write, and in texts with
    `control_tokens`; without it they are text like any other. The mask's name is always text.
    """

    length: int | None = option(
        None, "Tokens of a row.", least=2, shown_default=f"{USUAL_LENGTH}, or the model's positions if it has fewer"
    )
    past_positions: bool = past_positions_option()
    text_field: str = option("text", "Field of a record that holds its text.")
    prompt_field: str | None = option(
        None,
        "Field that holds what comes before the text and is not learnt. Documents are then kept whole, and rows "
        "padded; one longer than a row loses its prompt's beginning, down to half a row, then its text's end.",
        shown_default="none",
    )
    control_tokens: bool = option(
        False,
        "Names of control tokens, such as </s>, are these tokens in texts too, not only in prompts; the mask's name is "
        "always text.",
    )
    split: str = option("train", "Split of a Hugging Face dataset.")

    def __post_init__(self) -> None:
        check_options(self)

    def row_length(self, model: TwoTowerConfig) -> int:
        """The length of rows for a model. Raises SettingError for one beyond its positions, unless `past_positions`."""
        if self.length is None:
            return usual_length(USUAL_LENGTH, model)
        check_row_length("length", self.length, model, self.past_positions)
        return self.length


def read_documents(source: str, config: TextConfig, model: Path) -> Iterator[Document]:
    """The documents of a file, of every readable file below a folder in the order of their paths, or of a Hugging Face
    dataset, all of them streamed. Messages are rendered by the chat template of the checkpoint in the folder `model`.

    Warns of the files it skips. Raises FileNotFoundError where there is no such file, folder or dataset, and ValueError
    where there is nothing to read, a file is broken or a record lacks a field.
    """
    path = Path(source)
    chat = Conversations(model)
    if not path.exists():
        if _reader(path) or source.startswith((".", "/")) or not _DATASET_ID.fullmatch(source):
            raise FileNotFoundError(f"{source} is not there; give a file, a folder or the id of a Hugging Face dataset")
        yield from _documents(_dataset(source, config.split), config, chat)
        return
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    skipped = [file for file in files if _reader(file) is None]
    if len(skipped) == len(files):
        held = f"only {', '.join(file.name for file in skipped[:3])}" if files else "nothing"
        raise ValueError(f"{source} holds {held}, must hold a file ending in {_ENDINGS}; convert one, or give another")
    if skipped:
        names = ", ".join(str(file) for file in skipped[:3])
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        warnings.warn(f"skipped {names}{more}: not ending in {_ENDINGS}", stacklevel=2)
    for file in files:
        if _reader(file):
            yield from _documents(read_records(file), config, chat)


def _documents(records: Iterable[SourceRecord], config: TextConfig, chat: Conversations) -> Iterator[Document]:
    for record in records:
        messages = messages_field(record, config.text_field)
        if messages is not None:
            yield from chat.documents(record, messages)
        else:
            prompt = "" if config.prompt_field is None else field_text(record, config.prompt_field)
            yield Document(prompt, field_text(record, config.text_field))


def _dataset(name: str, split: str) -> Iterator[SourceRecord]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} is no file here, and a Hugging Face dataset needs the package {error.name}; "
            "pip install 'twotower[data]'"
        ) from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # What load_dataset reads first, asked for once: it asks for it six times, for half a minute
        snapshot_download(name, repo_type="dataset", allow_patterns="README.md")
        records = load_dataset(name, split=split, streaming=True)
    except (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor a dataset that can be reached ({error}); check the spelling "
            "and the connection"
        ) from error
    for number, fields in enumerate(records, 1):
        yield SourceRecord(f"record {number} of {name}", fields)


def read_records(file: Path) -> Iterator[SourceRecord]:
    """The records of a file; a file of plain text is one record, with the field `text`. Raises ValueError, naming the
    file and line, where it is broken or of an unknown kind."""
    reader = _reader(file)
    if reader is None:
        raise ValueError(f"{file} must end in {_ENDINGS}; convert it to one")
    return reader(file)


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a plain text, without their ends. Raises ValueError, naming the file, where it is broken."""
    with open_text(file) as opened:
        for line in opened:
            yield line.removeprefix("\ufeff").removesuffix("\n")


def _read_text(file: Path) -> Iterator[SourceRecord]:
    with open_text(file) as opened:
        text = opened.read(CHUNK)
        more = len(text) == CHUNK
    yield SourceRecord(str(file), {"text": LongText(lambda: _chunks(file)) if more else text})


def _chunks(file: Path) -> Iterator[str]:
    with open_text(file) as opened:
        while text := opened.read(CHUNK):
            yield text


def _read_json(file: Path) -> Iterator[SourceRecord]:
    with open_text(file) as opened:
        yield from read_json(file, opened)


def _read_parquet(file: Path) -> Iterator[SourceRecord]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"{file} needs the package {error.name}; pip install 'twotower[data]'") from error
    try:
        # Without pre_buffer, which reads a whole group of rows, and a few rows at a time, since texts may be long
        batches = parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK).iter_batches(batch_size=_PARQUET_ROWS)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, fields in enumerate(rows, 1):
            yield SourceRecord(f"{file} row {number}", fields)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a whole .parquet file ({error}); make or download it again") from error


_COMPRESSED = (".gz", ".zst")
_READERS: dict[str, Callable[[Path], Iterator[SourceRecord]]] = {
    **{f"{kind}{ending}": _read_text for kind in (".txt", ".md") for ending in ("", *_COMPRESSED)},
    **{f"{kind}{ending}": _read_json for kind in (".jsonl", ".json") for ending in ("", *_COMPRESSED)},
    ".parquet": _read_parquet,
}
_ENDINGS = ".txt, .md, .jsonl, .json (or these with .gz or .zst) or .parquet"


def _reader(file: Path) -> Callable[[Path], Iterator[SourceRecord]] | None:
    """The reader for a file of this name, whose ending may be in capitals; None for an unknown one."""
    name = file.name.lower()
    return next((reader for ending, reader in _READERS.items() if name.endswith(ending)), None)
