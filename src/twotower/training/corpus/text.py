"""Reading documents from files, folders and Hugging Face datasets."""

import dataclasses
import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from twotower.options import check_options, option

Record = dict[str, Any]


class Document(NamedTuple):
    """A text to learn, and the prompt before it, such as a question, which is not learnt; "" for none."""

    prompt: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Rows of `length` tokens; the field of a record that holds its text, and the one that holds its prompt, if any.

    Names of control tokens, such as </s>, are those tokens in prompts, which chat templates write, and in texts with
    `control_tokens`; without it they are text like any other. The mask's name is always text.
    """

    length: int = option(1024, "Tokens of a row.", least=2)
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


def read_documents(source: str, config: TextConfig) -> Iterator[Document]:
    """The documents of a file, of every readable file below a folder in the order of their paths, or of a Hugging Face
    dataset, which is streamed.

    Warns of the files it skips. Raises FileNotFoundError where there is no such file, folder or dataset, and ValueError
    where there is nothing to read, a file is broken or a record lacks a field.
    """
    path = Path(source)
    if not path.exists():
        if _reader(path) or source.startswith((".", "/")):
            raise FileNotFoundError(f"{source} is not there; give a file, a folder or the id of a Hugging Face dataset")
        yield from _documents(_dataset(source, config.split), source, config)
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
            yield from _documents(read_records(file), str(file), config)


def _documents(records: Iterable[Record], source: str, config: TextConfig) -> Iterator[Document]:
    fields = [config.text_field] if config.prompt_field is None else [config.text_field, config.prompt_field]
    for number, record in enumerate(records, 1):
        for field in fields:
            if not isinstance(record.get(field), str):
                raise ValueError(
                    f"record {number} of {source} has no text in the field {field!r}; its fields are {sorted(record)}; "
                    "name one of them with `tokenize`'s --text-field or --prompt-field"
                )
        prompt = "" if config.prompt_field is None else str(record[config.prompt_field])
        yield Document(prompt, str(record[config.text_field]))


def _dataset(name: str, split: str) -> Iterable[Record]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} is no file here, and a Hugging Face dataset needs the package {error.name}; "
            "pip install 'twotower[data]'"
        ) from error
    try:
        return load_dataset(name, split=split, streaming=True)
    except ConnectionError as error:
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor a dataset that can be reached ({error}); check the spelling "
            "and the connection"
        ) from error


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file; a file of plain text is one record, with the field `text`. Raises ValueError, naming the
    file, where it is broken or of an unknown kind."""
    reader = _reader(file)
    if reader is None:
        raise ValueError(f"{file} must end in {_ENDINGS}; convert it to one")
    try:
        yield from reader(file)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error}); convert it, as with: iconv -f LATIN1 -t UTF-8"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a whole gzip file ({error}); make or download it again") from error


def _open_text(file: Path) -> IO[str]:
    # utf-8-sig drops the byte order mark that some editors write.
    return (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rt", encoding="utf-8-sig")


def _read_text(file: Path) -> Iterator[Record]:
    with _open_text(file) as opened:
        yield {"text": opened.read()}


def _read_json(file: Path) -> Iterator[Record]:
    """JSON objects, one per line or in a list."""
    with _open_text(file) as opened:
        for number, line in enumerate(opened, 1):
            if line.lstrip().startswith("["):
                values = _json(line + opened.read(), f"{file}, from line {number},")
            elif line.strip():
                values = [_json(line, f"{file} line {number}")]
            else:
                continue
            for value in values:
                if not isinstance(value, dict):
                    raise ValueError(
                        f"{file} holds a {type(value).__name__} at line {number} or behind it, must hold objects such "
                        'as {"text": "…"}'
                    )
                yield value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}; correct it") from error


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"{file} needs the package {error.name}; pip install 'twotower[data]'") from error
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a whole .parquet file ({error}); make or download it again") from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".txt.gz": _read_text,
    ".md.gz": _read_text,
    ".jsonl.gz": _read_json,
    ".json.gz": _read_json,
    ".parquet": _read_parquet,
}
_ENDINGS = ".txt, .md, .jsonl, .json (or these with .gz) or .parquet"


def _reader(file: Path) -> Callable[[Path], Iterator[Record]] | None:
    """The reader for a file of this name, whose ending may be in capitals; None for an unknown one."""
    name = file.name.lower()
    return next((reader for ending, reader in _READERS.items() if name.endswith(ending)), None)
