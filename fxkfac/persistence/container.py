"""A header and tensors <-> a safetensors file that is there as a whole, or not at all.

The header is JSON in the file's metadata, which any reader of safetensors shows. It has a digest of
itself and a checksum of every tensor, so that no torn or damaged file is taken for a whole one.
Equal tensors are stored once.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxkfac.errors import FileError
from fxkfac.linalg import checksum

Header = dict[str, Any]  # what JSON holds
Tensors = dict[str, Tensor]
StrPath = str | os.PathLike[str]
KEY, DIGEST = "fxkfac", "sha256"


def write(path: StrPath, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, in the place of one that is there: whatever stops this leaves that one.

    Raises:
        FileError: The file cannot be written.
    """
    stored, index = _each_once(tensors)
    header = {**header, "tensors": index}
    text = json.dumps({**header, DIGEST: _digest(header)})
    with _replacing(path) as temporary:
        save_file(stored, temporary, {KEY: text})


def _each_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors without those that equal an earlier one, and for every name what is stored."""
    stored: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, t in tensors.items():
        key = (str(t.dtype).removeprefix("torch."), tuple(t.shape), checksum(t))
        same = first.setdefault(key, name)
        if same == name or not _same_bits(stored[same], t):
            same = name
            # Memory of its own: safetensors refuses what shares it.
            own = t.detach().contiguous()
            stored[name] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
        index[name] = {"dtype": key[0], "shape": key[1], "checksum": key[2], "stored": same}
    return stored, index


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


@contextmanager
def _replacing(path: StrPath) -> Iterator[Path]:
    """A new file beside the one at `path`, which takes its place once it is on the disk."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # a device or a pipe would be gone
        raise FileError(f"cannot write {os.fspath(path)!r}: it is no file. Name a file.")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as of any file of the user; safetensors has its own
        yield temporary
        temporary.chmod(mode)
        _to_disk(temporary)
        os.replace(temporary, target)
        _to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"cannot write {os.fspath(path)!r}: {error}. What was there before is unchanged; "
            "expected a folder that exists, can be written to, and has room."
        ) from error
    finally:
        with suppress(OSError):  # it has taken its place, or never was
            temporary.unlink()


def _to_disk(path: Path) -> None:
    """Wait until the file, or the names in the folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: StrPath, kinds: Sequence[str], device: torch.device) -> tuple[Header, Tensors]:
    """The header and the tensors of a file that holds one of some kinds.

    Equal tensors are one object.

    Raises:
        FileError: There is none, it is no whole file of fxkfac's, or it holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            _require(kinds, header, path)
            return header, _tensors(path, file, header["tensors"], device)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"cannot read {os.fspath(path)!r}: {error}. Expected a whole file written by "
            "fxkfac.save."
        ) from error


def _header(path: StrPath, metadata: Mapping[str, str]) -> Header:
    if KEY not in metadata:
        raise FileError(
            f"{os.fspath(path)!r} is a safetensors file, but not of fxkfac's: its metadata hold "
            f"{sorted(metadata)}, expected {KEY!r}. Pass a file written by fxkfac.save."
        )
    try:
        header: Header = json.loads(metadata[KEY])
    except ValueError:
        raise _damaged(path, "its header") from None
    if not isinstance(header, dict) or header.pop(DIGEST, None) != _digest(header):
        raise _damaged(path, "its header")
    return header


def _digest(header: Header) -> str:
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()


def _require(kinds: Sequence[str], header: Header, path: StrPath) -> None:
    if header["format"] != FORMAT:
        raise FileError(
            f"{os.fspath(path)!r} has format {header['format']}, written by fxkfac "
            f"{header['fxkfac']}; expected format {FORMAT}. Read it with that version."
        )
    if header["kind"] not in kinds:
        reader = READERS.get(header["kind"], f"fxkfac {header['fxkfac']}")
        raise FileError(
            f"{os.fspath(path)!r} holds {header['kind']}; expected {' or '.join(kinds)}. Use "
            f"{reader} to read it."
        )


FORMAT = 1
READERS = {
    "factors": "fxkfac.load",
    "a running average": "fxkfac.load",
    "an accumulation": "fxkfac.resume",
}


def _tensors(
    path: StrPath, file: Any, index: Mapping[str, Any], device: torch.device
) -> dict[str, Tensor]:
    if set(file.keys()) != {entry["stored"] for entry in index.values()}:
        raise _damaged(path, "the list of its tensors")
    read: dict[str, Tensor] = {}
    for name, entry in index.items():
        if entry["stored"] == name:
            t = file.get_tensor(name).clone()  # no longer the file's own bytes, which may change
            found = (str(t.dtype).removeprefix("torch."), list(t.shape), checksum(t))
            if found != (entry["dtype"], entry["shape"], entry["checksum"]):
                raise _damaged(path, f"the tensor {name!r}")
            read[name] = t.to(device)
    return {name: read[entry["stored"]] for name, entry in index.items()}


def _damaged(path: StrPath, what: str) -> FileError:
    return FileError(
        f"{os.fspath(path)!r} is damaged: {what} is not what was written. Use another copy."
    )
