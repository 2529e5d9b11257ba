import gzip
import json
from pathlib import Path

import pytest

from twotower.training.corpus.text import Document, TextConfig, read_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three documents in the order of their paths."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first\nof two lines\n")
    (tmp_path / "b" / "c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("second", "third")))
    return tmp_path


def texts(source: Path, **config: str) -> list[str]:
    return [d.text for d in read_documents(str(source), TextConfig(**config))]


def test_a_folder_gives_its_documents_in_order(folder: Path) -> None:
    assert texts(folder) == ["first\nof two lines\n", "second", "third"]
    assert texts(folder / "b" / "c.jsonl") == ["second", "third"]


def test_parquet_and_other_fields(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the datasets package, which brings it, isn't installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"question": ["1+1?", "2+2?"], "answer": ["2", "4"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = read_documents(str(tmp_path), TextConfig(text_field="answer", prompt_field="question"))
    assert list(found) == [Document("1+1?", "2"), Document("2+2?", "4")]
    with pytest.raises(ValueError, match=r"record 1 of .*a\.parquet has no text in .*'answer'.*--text-field"):
        texts(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"b\.parquet is not a whole \.parquet file"):
        texts(tmp_path / "b.parquet")


def test_names_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "B.TXT").write_text("b")
    (tmp_path / "[a].txt").write_text("a")
    (tmp_path / "c*.jsonl").write_text('{"text": "c"}')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "d"}\n')
    assert texts(tmp_path) == ["b", "a", "c", "d"]
    assert texts(tmp_path / "[a].txt") == ["a"]


def test_texts_of_json_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    written = ["2024-01-01", "2024-01-01T00:00:00", "12", "a\u2028b"]
    file.write_text("\ufeff" + "\n\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in written))
    assert texts(file) == written
    (tmp_path / "b.json").write_text(json.dumps([{"text": t} for t in written], indent=1))
    assert texts(tmp_path / "b.json") == written


def test_skipped_files_are_told(folder: Path) -> None:
    (folder / "d.bin").touch()
    with pytest.warns(UserWarning, match=r"skipped .*d\.bin: not ending in \.txt"):
        assert len(texts(folder)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "é".encode("latin-1"), r"a\.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "\xe9"}', r"a\.jsonl is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl line 2 is not JSON"),
        ("a.json", b'\n[{"text": 1},\n', r"a\.json, from line 2, is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n"b"', r"a\.jsonl holds a str at line 2"),
        ("a.txt.gz", gzip.compress(b"long", mtime=0)[:-9], r"a\.txt\.gz is not a whole gzip file"),
        ("a.txt.gz", b"text", r"a\.txt\.gz is not a whole gzip file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path)


def test_what_is_not_there_or_cannot_be_read_is_told(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not there"):
        texts(folder / "none.txt")
    (folder / "d.bin").touch()
    with pytest.raises(ValueError, match=r"d\.bin holds only d\.bin, must hold a file ending in \.txt"):
        texts(folder / "d.bin")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds nothing, must hold"):
        texts(folder / "empty")


def test_bad_length_raises() -> None:
    with pytest.raises(ValueError, match="length is 1, must be an integer of at least 2"):
        TextConfig(length=1)


def test_a_dataset_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets package isn't installed")

    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"owner/name is neither a file .*\(no network\); check the spelling"):
        list(read_documents("owner/name", TextConfig()))
