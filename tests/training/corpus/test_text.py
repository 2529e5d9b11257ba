import gzip
import json
import sys
from pathlib import Path

import pytest

from twotower.training.corpus.documents import Document
from twotower.training.corpus.text import TextConfig, read_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three documents in the order of their paths."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first\nof two lines\n")
    (tmp_path / "b" / "c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("second", "third")))
    return tmp_path


def texts(source: Path, **config: str) -> list[str]:
    return [d.text for d in read_documents(str(source), TextConfig(**config), Path())]


def test_a_folder_gives_its_documents_in_order(folder: Path) -> None:
    assert texts(folder) == ["first\nof two lines\n", "second", "third"]
    assert texts(folder / "b" / "c.jsonl") == ["second", "third"]


def test_parquet_and_other_fields(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the datasets package, which brings it, isn't installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"question": ["1+1?", "2+2?"], "answer": ["2", "4"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = read_documents(str(tmp_path), TextConfig(text_field="answer", prompt_field="question"), Path())
    assert list(found) == [Document("1+1?", "2"), Document("2+2?", "4")]
    with pytest.raises(ValueError, match=r"a\.parquet row 1 has no text in the field 'text'.*--text-field"):
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
        ("a.txt", "\ufeffa\r\nb\rc\né".encode()[:-1], r"a\.txt line 4 is not UTF-8 text"),
        ("a.txt", "a\né\n".encode("latin-1"), r"a\.txt line 2 is not UTF-8 text .*iconv"),
        ("a.txt", "ab".encode("utf-16-le"), r"a\.txt is UTF-16LE text without a byte order mark.*iconv -f UTF-16LE"),
        ("a.jsonl", "{}".encode("utf-16-be"), r"a\.jsonl is UTF-16BE text without"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl line 2 is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl line 2 is not JSON"),
        ("a.json", b'\n[{"text": 1},\n', r"a\.json line 2 has a int in the field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n"b"', r"a\.jsonl line 2 holds a str, must hold objects"),
        ("a.json", b'[{"text": "a"},\n', r"a\.json line 2 must hold an object .* but the file ends there"),
        ("a.json", b'[{"text": "a"}', r"a\.json line 1 begins a list that the file does not end"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', r"a\.json line 2 is not JSON: '\{' where ',' or '\]'"),
        ("a.json", b'[{"text": "a"}]\n[]', r"a\.json line 2 has more behind the end of the list"),
        ("a.json", b'[[{"text": "a"}]]', r"a\.json line 1 must hold an object .* but has '\["),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\\ud83d!"}', r"line 3 holds '\\ud83d' alone.*lone surrogate"),
        ("a.jsonl", b'{"text": "a"}\r{"text": null}', r"line 2 has null in the field 'text'"),
        ("a.jsonl", b'{"text": ["a"]}', r"line 1: the message 'a' is no object with role and content"),
        ("a.jsonl", b'{"body": "a"}', r"line 1 has no text in the field 'text'.*fields are \['body'\]"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"line 1 can't be read: it has the field 'text' more than once"),
        ("a.jsonl", b'{"text": "a\x00"}', r"line 1 is not JSON: Invalid control character"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, r"line 1 can't be read: .*recursion"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"line 1 can't be read: .*digits"),
        ("a.jsonl", b'{"text": "a"} {"text": "b"}', r"line 1 is not JSON: Extra data"),
        ("a.txt.gz", gzip.compress(b"long", mtime=0)[:-9], r"a\.txt\.gz is not a whole \.gz file"),
        ("a.txt.gz", b"text", r"a\.txt\.gz is not a whole \.gz file"),
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


@pytest.mark.parametrize("fails", ["hub", "load"])
def test_a_dataset_that_cannot_be_reached_is_told(fails: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets package isn't installed")
    loaded: list[object] = []

    def load(*names: object, **_: object) -> None:
        loaded.append(names)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    if fails == "hub":  # which is asked once, without load_dataset's waits
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    else:
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: name)
    with pytest.raises(FileNotFoundError, match=r"(?s)owner/name is neither a file .*\); check the spelling"):
        list(read_documents("owner/name", TextConfig(), Path()))
    assert len(loaded) == (fails == "load")


@pytest.mark.parametrize("name", ["my texts", "a/b/c", "none.jsonl", "./none", "~/none"])
def test_what_can_be_no_dataset_is_not_asked_for(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="is not there; give a file, a folder or the id"):
        list(read_documents(name, TextConfig(), Path()))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_say_how_a_file_is_encoded(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("a\r\né\rb\x00\u2028c", encoding=encoding, newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "d"}\n\ufeff{"text": "\\u0000\u2028e"}\r\n', encoding=encoding)
    assert texts(tmp_path) == ["a\né\nb\x00\u2028c", "d", "\x00\u2028e"]


def test_zstandard_is_read_and_a_cut_file_named(tmp_path: Path) -> None:
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    whole = zstd.compress(b'{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "a.jsonl.zst").write_bytes(whole + zstd.compress(b'{"text": "c"}'))
    assert texts(tmp_path) == ["a", "b", "c"]
    for broken in (whole[:-4], b"text"):
        (tmp_path / "a.jsonl.zst").write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst is not a whole \.zst file"):
            texts(tmp_path)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python brings Zstandard")
def test_zstandard_without_its_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "backports", None)
    (tmp_path / "a.txt.zst").touch()
    with pytest.raises(
        ValueError, match=r"a\.txt\.zst needs the package backports\.zstd; pip install 'twotower\[data\]'"
    ):
        texts(tmp_path)
