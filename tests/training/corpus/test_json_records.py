import io
import json
from pathlib import Path

import pytest

from twotower.training.corpus import json_records
from twotower.training.corpus.documents import LongText
from twotower.training.corpus.json_records import read_json

FILE = Path("a.jsonl")
RECORDS = [
    {"id": 1, "text": "short"},
    {"meta": {"a": ["[", "}", '\\"']}, "text": 'grüße \U0001f600 "\\ \n' * 40, "question": "why? " * 40},
    {"text": "\U0001f600" * 100},
    {"text": "b" * 64},
    {"text": ""},
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of more than 64 characters are long ones."""
    monkeypatch.setattr(json_records, "LONGEST", 64)
    monkeypatch.setattr(json_records, "CHUNK", 16)


def found(written: str) -> list[dict]:
    def text(value: object) -> object:
        return "".join(value.chunks()) if isinstance(value, LongText) else value

    return [{k: text(v) for k, v in r.fields.items()} for r in read_json(FILE, io.StringIO(written))]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("form", ["lines", "list", "indented list"])
def test_records_are_read_whatever_their_length(
    monkeypatch: pytest.MonkeyPatch, chunk: int, ascii_only: bool, form: str
) -> None:
    monkeypatch.setattr(json_records, "CHUNK", chunk)
    if form == "lines":
        written = "".join(json.dumps(r, ensure_ascii=ascii_only) + "\n\n" for r in RECORDS)
    else:
        written = json.dumps(RECORDS, ensure_ascii=ascii_only, indent=1 if form == "indented list" else None)
    assert found(written) == RECORDS


def test_a_long_text_is_not_held_in_memory() -> None:
    (record,) = read_json(FILE, io.StringIO(json.dumps({"text": "a" * 200, "b": "a" * 10})))
    assert isinstance(record.fields["text"], LongText)
    assert record.fields["b"] == "a" * 10
    assert ["".join(record.fields["text"].chunks()) for _ in range(2)] == ["a" * 200] * 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"text": "%s' % ("a" * 99), "line 2 is not JSON: .* text"),
        ('{"text": "%s\\ud83d"}' % ("a" * 99), r"line 2 holds '\\ud83d' alone"),
        ('{"text": "%s\\ud83d b"}' % ("a" * 99), r"line 2 holds '\\ud83d' alone"),
        ('{"text": "%s\\x"}' % ("a" * 99), "line 2 is not JSON: Invalid"),
        ('{"text": "%s", "text": ""}' % ("a" * 99), "line 2 can't be read: it has the field 'text' more than once"),
        ('{"text": "%s"} 1' % ("a" * 99), "line 2 has more than one value"),
        ('{"text": "%s\n"}' % ("a" * 99), "line 2 is not JSON"),
        ('{"text": [%s]}' % ("1, " * 99 + "1"), "line 2 holds more than 256 characters beside its long texts"),
    ],
)
def test_bad_long_records_are_named(record: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found('{"text": "a"}\n' + record + '\n{"text": "b"}\n')
