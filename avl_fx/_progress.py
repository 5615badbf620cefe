"""The progress bar of runs that take a model through many batches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(title: str, wanted: bool, total: int | None, done: int = 0) -> Iterator[Callable[[], None]]:
    """What is called after every batch; the bar shows on stderr, where it is ``wanted`` and that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        yield functools.partial(bar.advance, bar.add_task(title, total=total, completed=done))
