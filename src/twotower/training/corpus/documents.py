"""What is read to make a corpus of: records, and the documents in them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class LongText(NamedTuple):
    """A text that is too long for memory: each call of `chunks` reads it again, a part at a time."""

    chunks: Callable[[], Iterator[str]]


class SourceRecord(NamedTuple):
    """A record of a file or dataset, and where it is, as in "stories.jsonl line 3"."""

    where: str
    fields: dict[str, Any]


class Document(NamedTuple):
    """A text to learn, and the prompt before it, such as a question, which is not learnt; "" for none.

    Where both are `rendered` by a chat template, names of control tokens are those tokens in the text too, and the text
    brings its own end.
    """

    prompt: str | LongText
    text: str | LongText
    rendered: bool = False


def field_text(record: SourceRecord, field: str) -> str | LongText:
    """The text in a field of a record. Raises ValueError, naming the record, where there is none."""
    value = record.fields.get(field)
    if isinstance(value, str):
        return check_text(value, record.where)
    if isinstance(value, LongText):
        return value
    held = "null" if value is None else f"a {type(value).__name__}"
    raise ValueError(
        f"{record.where} has {held if field in record.fields else 'no text'} in the field {field!r}, where a text must "
        f"be; its fields are {sorted(record.fields)}; name one of them with `tokenize`'s --text-field or "
        "--prompt-field, or correct the record"
    )


def check_text(text: str, where: str) -> str:
    """Returns the text. Raises ValueError where it holds half of a character, as JSON can spell it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {text[error.start]!a} alone, which is half of a character (a lone surrogate); "
            "correct the text, or leave the record out"
        ) from error
    return text
