"""Files of every format as records, and refusals that name file and line."""

import gzip
import json
import sys

import pytest

from engine.data.sources import RECORD_SUFFIXES, TEXT_SUFFIXES, find_sources


def read(path, split="blank"):
    (source,) = find_sources([str(path)], TEXT_SUFFIXES)
    records = list(source.records(split))
    assert source.position <= source.size
    return [(record.place.removeprefix(str(path)), record.value) for record in records]


TEXT = "一行目\r\n二行目\n\n \nB one\nB two\n\n\nlast"


def test_text_files_are_split_at_blank_lines_at_every_line_or_nowhere(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    assert read(path) == [(":1", "一行目\n二行目"), (":5", "B one\nB two"), (":9", "last")]
    assert read(path, "line") == [(":1", "一行目"), (":2", "二行目"), (":5", "B one"), (":6", "B two"), (":9", "last")]
    assert read(path, "file") == [(":1", TEXT.replace("\r\n", "\n"))]


def test_gzip_and_byte_order_mark_change_nothing(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_bytes(TEXT.encode())
    packed.write_bytes(gzip.compress(TEXT.encode("utf-8-sig")))
    assert read(plain) == read(packed)
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert read(tmp_path / "c.jsonl") == [(":1", {"text": "a"})]


def test_json_lines_in_a_json_file_are_read(tmp_path):
    values = [{"text": "one"}, {"text": "two"}]
    file = tmp_path / "a.json"
    file.write_text("\n" + "".join(json.dumps(value) + "\n" for value in values))
    (source,) = find_sources([str(file)], TEXT_SUFFIXES)
    assert list(source.records("blank")) == [(f"{file}:2", values[0]), (f"{file}:3", values[1])]
    file.write_text('{"text": "one"}\n{"text" "two"}\n')
    with pytest.raises(ValueError, match=r"a\.json:2: broken JSON"):
        list(find_sources([str(file)], TEXT_SUFFIXES)[0].records("blank"))


def test_jsonl_and_json_arrays_give_their_values(tmp_path):
    values = [{"text": "い\n"}, {"text": "ろ", "n": 1}, [3]]
    lines, array = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text("\n".join(map(json.dumps, values[:2])) + "\n\n" + json.dumps(values[2]) + "\n")
    array.write_text(json.dumps(values, indent=1))
    assert read(lines) == [(":1", values[0]), (":2", values[1]), (":4", values[2])]
    assert read(array) == [(f", record {i}", value) for i, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b"\n", r"a\.jsonl:2: JSON that cannot be read"),
        ("a.json", b'[\n{"a": 1},\n{"b" 2}]', r"a\.json:3: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n', r"a\.jsonl:2: a byte-order mark inside the file"),
        ("a.json", b'[{"a": 1},\n\xef\xbb\xbf{"a": 2}]', r"a\.json:2: a byte-order mark inside the file"),
        ("a.json", b'{"a": 1}', r"a\.json: holds a JSON dict, not an array"),
        ("a.txt", b"fine\n\xe3\x81\n", r"a\.txt:2: byte 0 of the line is not UTF-8"),
        ("a.txt", "文字".encode("cp932"), r"a\.txt:1: .*convert"),
        ("a.txt", b"", r"a\.txt: empty"),
        ("a.txt", b" \n\n", r"a\.txt: empty"),
        ("a.jsonl", b"\n", r"a\.jsonl: empty"),
        ("a.json", b"[]", r"a\.json: empty"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: broken gzip"),
        ("a.txt.gz", gzip.compress(b"line\n" * 10_000, mtime=0)[:-20], r"a\.txt\.gz: broken gzip file after line \d+"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_folders_patterns_and_files_give_a_fixed_order(tmp_path):
    for name in ("b.txt", "a/z.jsonl", "a/y.txt.gz", "a/.hidden.txt", "a/notes.md", ".git/x.txt", "done/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (tmp_path / "done" / "dataset.json").write_text("{}")

    def names(*paths, suffixes=TEXT_SUFFIXES):
        return [str(s.path.relative_to(tmp_path)) for s in find_sources([str(tmp_path / p) for p in paths], suffixes)]

    assert names(".") == ["a/y.txt.gz", "a/z.jsonl", "b.txt"]
    assert names("b.txt", "a") == ["b.txt", "a/y.txt.gz", "a/z.jsonl"]
    assert names("a/*.txt*") == ["a/y.txt.gz"]
    assert names("**/*.txt") == ["b.txt", "done/x.txt"]
    assert names("a", suffixes=RECORD_SUFFIXES) == ["a/z.jsonl"]


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        (["none.txt"], FileNotFoundError, r"none\.txt: no such file"),
        (["*.none"], FileNotFoundError, r"\*\.none: no such file"),
        (["a.md"], ValueError, r"a\.md: unknown type of file: must end in one of \.txt"),
        (["void"], ValueError, "void: holds no file"),
        (["a.txt", "a.*"], ValueError, r"a\.txt: named twice"),
        ([], ValueError, "no paths given"),
    ],
)
def test_paths_that_give_nothing_are_refused(tmp_path, paths, error, message):
    for name in ("a.md", "a.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "void").mkdir()
    with pytest.raises(error, match=message):
        find_sources(
            [str(tmp_path / path) for path in paths if path != "a.*"] + ([str(tmp_path / "*.txt")] if "a.*" in paths else []),
            TEXT_SUFFIXES,
        )


def test_parquet_is_read_by_pyarrow_alone(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setitem(sys.modules, "datasets", None)
    from pyarrow import parquet

    values = [{"text": f"文 {i}", "messages": [{"role": "user", "content": "a"}]} for i in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(f", row {i}", value) for i, value in enumerate(values, 1)]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"b\.parquet: not a readable Parquet file"):
        read(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(values[:0]), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet: empty"):
        read(tmp_path / "c.parquet")


def test_hub_datasets_are_read_by_the_package_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    asked = []

    def load(name, configuration=None, *, split, revision):
        if configuration == "none":
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['ja']")
        asked.append((name, configuration, split, revision))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    class Api:
        def dataset_info(self, name, *, revision=None):
            if name == "owner/missing":
                raise OSError("no such\nrepository")
            if name == "owner/gated":
                error = OSError("403 Client Error (Request ID: x)\n\nCannot access gated repo for url u")
                error.server_message = "Access to dataset owner/gated is restricted. Please log in."
                raise error
            if revision is not None:
                return huggingface_hub.DatasetInfo(id=name, sha=revision, private=False, downloads=0, likes=0, tags=[])
            return huggingface_hub.DatasetInfo(id=name, sha="0123abc", private=False, downloads=0, likes=0, tags=[])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (source,) = find_sources(["hub:owner/name:validation"], TEXT_SUFFIXES)
    assert [tuple(record) for record in source.records("blank")] == [
        ("hub:owner/name:validation, row 1", {"text": "a"}),
        ("hub:owner/name:validation, row 2", {"text": "b"}),
    ]
    assert source.identity() == {"name": "hub:owner/name:validation", "revision": "0123abc", "rows": 2}
    find_sources(["hub:owner/name"], TEXT_SUFFIXES)
    assert asked == [("owner/name", None, "validation", "0123abc"), ("owner/name", None, "train", "0123abc")]
    del asked[:]
    find_sources(["hub:owner/name:ja:test", "hub:owner/name@v2:ja:"], TEXT_SUFFIXES)
    assert asked == [("owner/name", "ja", "test", "0123abc"), ("owner/name", "ja", "train", "v2")]
    for wrong, message in [
        ("owner/gated", r"hub:owner/gated: not available: Access to dataset owner/gated is restricted. Please log in.$"),
        ("owner/name:none:train", r"available configs: \['ja'\]; name one as hub:owner/name:configuration:split$"),
        ("owner/name:a:b:c", r"must be hub:owner/name\[@revision\], then :split or :configuration:split$"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_sources([f"hub:{wrong}"], TEXT_SUFFIXES)
    with pytest.raises(ValueError, match="hub:owner/missing: not available: no such repository"):
        find_sources(["hub:owner/missing"], TEXT_SUFFIXES)


def test_missing_optional_packages_are_named_with_the_remedy(tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"hub:owner/name: .*pip install 'komainu\[data\]'.* EXTRAS=data"):
        find_sources(["hub:owner/name"], TEXT_SUFFIXES)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: Parquet needs .*pip install 'komainu\[data\]'.* EXTRAS=data"):
        read(tmp_path / "a.parquet")
