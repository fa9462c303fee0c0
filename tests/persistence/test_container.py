"""A file is there as a whole, or not at all; and no other is taken for it."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxkfac.errors import FileError
from fxkfac.linalg.checksum import CHUNK, ODD, checksum
from fxkfac.persistence import container
from fxkfac.persistence.container import read, write

CPU = torch.device("cpu")
HEADER = {"format": 1, "kind": "factors", "fxkfac": "0", "n": 7, "count": 0.1}


def tensors():
    g = torch.Generator().manual_seed(0)
    full = torch.randn(6, 4, generator=g, dtype=torch.float64)
    return {
        "a/A": full,
        "a/B": full.mT,  # not contiguous
        "b/A": full.clone(),  # equal
        "row": full[1],  # a part of another one's memory
        "half": full[:, :3].bfloat16(),
        "numbers": torch.arange(3),
        "number": torch.tensor(3),
        "none": torch.zeros(1, 0, 4),
        "flags": torch.tensor([True, False]),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@pytest.fixture
def written(path):
    write(path, HEADER, tensors())
    return path


def same_bits(a, b):
    alike = a.dtype == b.dtype and a.shape == b.shape
    raw = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return alike and torch.equal(*raw)


def test_what_was_written_is_read(written):
    header, found = read(written, ("factors",), CPU)
    assert {key: header[key] for key in HEADER} == HEADER
    expected = tensors()
    assert list(found) == list(expected)
    assert all(same_bits(found[name], t) for name, t in expected.items())


def test_equal_tensors_are_stored_once(written):
    assert "b/A" not in load_file(written)
    _, found = read(written, ("factors",), CPU)
    assert found["b/A"] is found["a/A"]


def test_nothing_else_lies_about(written):
    assert os.listdir(written.parent) == [written.name]


def test_any_reader_of_safetensors_shows_the_header(written):
    start = written.read_bytes()
    size = int.from_bytes(start[:8], "little")
    metadata = json.loads(start[8 : 8 + size])["__metadata__"]
    assert json.loads(metadata["fxkfac"])["n"] == 7


def test_a_checksum_is_the_sum_that_it_says():
    t = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def word(x):
        return int.from_bytes(x.numpy().tobytes(), "little", signed=True)

    total = sum((word(x) ^ (word(x) >> 29)) * (2 * k + 1) * ODD for k, x in enumerate(t))
    assert checksum(t) == f"{(total + 40) % 2**64:016x}"


def test_a_checksum_tells_apart():
    t = torch.randn(2 * CHUNK // 64 + 3, generator=torch.Generator().manual_seed(0))
    seen = {checksum(t), checksum(t.flip(0)), checksum(t[:-1]), checksum(torch.zeros(3))}
    seen |= {checksum(torch.zeros(n, dtype=torch.uint8)) for n in range(9)}
    assert len(seen) == 3 + 10 - 0
    square = torch.arange(16.0).view(4, 4)
    assert checksum(square) != checksum(square.mT)
    assert checksum(square[1:3]) == checksum(square[1:3].clone())
    assert checksum(torch.arange(7, dtype=torch.int16)[1:]) == checksum(torch.arange(1, 7).short())
    raw = torch.zeros(24, dtype=torch.uint8)
    flipped = set()
    for bit in range(8 * len(raw)):
        other = raw.clone()
        other[bit // 8] = 1 << bit % 8
        flipped.add(checksum(other))
    assert len(flipped | {checksum(raw)}) == 8 * 24 + 1


def test_a_checksum_goes_on_from_chunk_to_chunk():
    t = torch.zeros(2 * CHUNK + 1, dtype=torch.int64)
    found = set()
    for place in (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK):
        t[place] = 5
        found.add(checksum(t))
        t[place] = 0
    assert len(found) == 5


def test_every_truncation_is_refused(written):
    whole = written.read_bytes()
    for size in range(len(whole)):
        written.write_bytes(whole[:size])
        with pytest.raises(FileError):
            read(written, ("factors",), CPU)
    written.write_bytes(whole + b"\0")
    with pytest.raises(FileError):
        read(written, ("factors",), CPU)


def test_every_flipped_bit_is_found(written):
    """Or else it means nothing, and what is read is what was written: blanks, truth as any byte."""
    whole, expected = written.read_bytes(), tensors()
    caught = 0
    for number, place in enumerate(range(0, len(whole), 3)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << number % 8
        written.write_bytes(damaged)
        try:
            header, found = read(written, ("factors",), CPU)
        except FileError:
            caught += 1
            continue
        assert {key: header[key] for key in HEADER} == HEADER
        assert all(same_bits(found[name], t) for name, t in expected.items())
    assert caught > 0.9 * len(whole) / 3


def test_pages_that_never_reached_the_disk_are_found(written):
    whole = bytearray(written.read_bytes())
    whole[-64:-32] = bytes(32)
    written.write_bytes(whole)
    with pytest.raises(FileError, match="damaged"):
        read(written, ("factors",), CPU)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expected a whole file written by fxkfac.save"),
        (b"not a file of tensors, and long enough to have a header", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_foreign_files(path, content, said):
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(FileError, match=said):
        read(path, ("factors",), CPU)


def test_another_pickle(path):
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(FileError, match="cannot read"):
        read(path, ("factors",), CPU)


def test_no_file(path):
    with pytest.raises(FileError, match="cannot read"):
        read(path, ("factors",), CPU)


def test_tensors_of_others(path):
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(FileError, match=r"not of fxkfac's: its metadata hold \['format'\]"):
        read(path, ("factors",), CPU)


@pytest.mark.parametrize("text", ["3", "[]", "null", "{}", "{"])
def test_a_header_that_is_none(path, text):
    save_file({"weight": torch.zeros(3)}, path, {container.KEY: text})
    with pytest.raises(FileError, match="damaged: its header"):
        read(path, ("factors",), CPU)


def test_another_kind_and_another_format(path):
    write(path, {**HEADER, "kind": "an accumulation"}, {})
    with pytest.raises(FileError, match=r"holds an accumulation; .* Use fxkfac.resume"):
        read(path, ("factors",), CPU)
    write(path, {**HEADER, "kind": "a new thing", "fxkfac": "9.1"}, {})
    with pytest.raises(FileError, match=r"holds a new thing; .* Use fxkfac 9.1 to read it"):
        read(path, ("factors",), CPU)
    write(path, {**HEADER, "format": 2, "fxkfac": "9.1"}, {})
    with pytest.raises(FileError, match=r"has format 2, written by fxkfac 9.1; expected format 1"):
        read(path, ("factors",), CPU)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in ("missing/x", "file/x", "folder"):
        with pytest.raises(FileError, match=f"cannot write .*{place}"):
            write(tmp_path / place, HEADER, tensors())
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_devices_and_pipes_stay(path, tmp_path):
    os.mkfifo(path)
    with pytest.raises(FileError, match=f"cannot write .*{path.name}.*: it is no file"):
        write(path, HEADER, tensors())
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("at", ["save_file", "_to_disk", "replace"])
def test_what_fails_leaves_what_was_there(written, monkeypatch, error, at):
    def fail(*_):
        raise error

    def half(stored, temporary, metadata):
        temporary.write_bytes(b"half")
        raise error

    before = written.read_bytes()
    where = container.os if at == "replace" else container
    monkeypatch.setattr(where, at, half if at == "save_file" else fail)
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        write(written, {**HEADER, "n": 8}, tensors())
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == [written.name]


def test_the_file_is_as_others_of_the_user(path):
    before = os.umask(0o027)
    try:
        write(path, HEADER, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_leads_to_the_file(path, tmp_path):
    target = tmp_path / "elsewhere" / "file"
    target.parent.mkdir()
    path.symlink_to(target)
    write(path, HEADER, tensors())
    assert path.is_symlink()
    assert target.is_file()
    read(path, ("factors",), CPU)


def test_what_was_read_no_longer_needs_the_file(written):
    _, found = read(written, ("factors",), CPU)
    with open(written, "r+b") as file:
        file.write(bytes(written.stat().st_size))
    assert all(same_bits(found[name], t) for name, t in tensors().items())
