"""Ask every model, or those that are named, and write `docs/models.md`: `python -m tests.families [NAME ...]`."""

import sys

from rich.console import Console
from rich.progress import track

from tests.families import ALL, UNAVAILABLE
from tests.families._ask import answers
from tests.families._table import PAGE, read, write

console = Console(stderr=True)
asked = sys.argv[1:] or [*ALL]
unknown = sorted({*asked} - {*ALL})
if unknown:
    sys.exit(f"no model {', '.join(unknown)}; there are {', '.join(sorted(ALL))}")
found = read() if PAGE.exists() else {}
found = {name: said for name, said in found.items() if name in ALL or UNAVAILABLE}
for name in track(asked, "models", console=console):
    found[name] = answers(ALL[name])
    write(found)
    failed = [f"{question}: {said}" for question, said in found[name].items() if said.startswith("FAILS")]
    console.print(f"{name}: {'; '.join(failed) or 'done'}")
