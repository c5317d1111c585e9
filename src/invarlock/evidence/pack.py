"""One file that holds a measured side: its report and the arrays beside it, as members of a zip archive.

Baseline packs and entries of the cache are such files. `manifest.json` names every member with its length and SHA-256;
the digest of the manifest is the pack's address, and stands in the archive's comment. A file that was cut off, altered
or written half is refused.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785

from invarlock.core.exceptions import InvarlockError, ModelLoadError
from invarlock.core.files import write_whole
from invarlock.core.reading import check_size, open_regular, parse_json, read_regular
from invarlock.evidence.plain import canonical

__all__ = ["Pack", "is_pack", "pack_bytes", "read_pack", "write_pack"]

_FORMAT = "invarlock-pack-v1"
_MANIFEST = "manifest.json"
_MAGIC = b"PK\x03\x04"
_WHEN = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes


@dataclass(frozen=True)
class Pack:
    """What a pack holds: `about` says what it is, `members` the bytes by name."""

    about: dict[str, Any]
    members: dict[str, bytes]
    address: str

    def json(self, name: str, where: str, error: type[InvarlockError] = ModelLoadError) -> Any:
        """Return a member that is JSON."""
        if name not in self.members:
            raise error(f"{where} has no {name}; expected a pack that this software wrote")
        return parse_json(self.members[name], "report", f"{where}/{name}", "JSON", error)


def pack_bytes(about: Mapping[str, Any], members: Mapping[str, bytes], *, compress: bool = True) -> tuple[bytes, str]:
    """Return the bytes of a pack and its address, which does not depend on the compression."""
    rows = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in sorted(members.items())}
    manifest = rfc8785.dumps(canonical({"format": _FORMAT, "about": about, "members": rows}))
    address = hashlib.sha256(manifest).hexdigest()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = address.encode()
        for name, data in ((_MANIFEST, manifest), *sorted(members.items())):
            info = zipfile.ZipInfo(name, _WHEN)
            info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            archive.writestr(info, data)
    return buffer.getvalue(), address


def write_pack(path: Path, about: Mapping[str, Any], members: Mapping[str, bytes], *, compress: bool = True) -> str:
    """Write a pack, whole or not at all, and return its address."""
    data, address = pack_bytes(about, members, compress=compress)
    write_whole(path, data)
    return address


def is_pack(path: Path) -> bool:
    """Say whether a path is a file that begins as packs do. Raises ModelLoadError for a file that cannot be read."""
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        return False
    with open_regular(path, "a checkpoint, a report or a pack", ModelLoadError) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_pack(path: Path, error: type[InvarlockError] = ModelLoadError) -> Pack:
    """Read a pack and check every member against the manifest, and the manifest against the address.

    Raises `error` where the file is no pack, is damaged, or is larger than what may be read.
    """
    data = read_regular(path, "pack", "a baseline pack", error)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            check_size(
                "pack",
                str(path),
                error,
                size=sum(i.file_size for i in archive.infolist()),
                values=len(archive.infolist()),
            )
            members = {info.filename: _member(archive, info) for info in archive.infolist()}
            address = archive.comment.decode("ascii", "replace")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError) as wrong:
        raise error(
            f"{path} is no pack or is damaged ({wrong}); expected the whole file: make or copy it again"
        ) from None
    manifest = members.pop(_MANIFEST, b"")
    if hashlib.sha256(manifest).hexdigest() != address:
        raise error(f"{path} is damaged: its manifest is not that of its address; make or copy it again")
    found = parse_json(manifest, "report", f"{path}/{_MANIFEST}", "JSON", error)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise error(f"{path} has no format {_FORMAT}; expected a pack that this software wrote")
    rows = {n: {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()} for n, body in sorted(members.items())}
    if found.get("members") != rows:
        raise error(f"{path} is damaged: its members are not those of its manifest; make or copy it again")
    return Pack(dict(found.get("about") or {}), members, address)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read one member, at most as many bytes as it says that it has."""
    with archive.open(info) as stream:
        body = stream.read(info.file_size + 1)
    if len(body) != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} does not have the length that it states")
    return body
