"""More architectures than the zoo has, each asked the same few questions: `docs/models.md` is what they answer.

The zoo's models go through every test; these go through `test_families` alone (`make test-families`). Adding one is
adding one file that defines `MODEL`, a `ZooModel` as in `tests/zoo/_base.py`, and `python -m tests.families`, which
writes the table. A model that the installed transformers does not have is left out, and its line of the page is kept.
"""

import importlib
import pkgutil

from tests.zoo import ZOO, ZooModel

FAMILIES: dict[str, ZooModel] = {}
"""Those of this folder alone."""
UNAVAILABLE: list[str] = []
"""Files of this folder that need another release of transformers."""
for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if not _module.name.startswith(("_", "test_")):
        try:
            _model = importlib.import_module(f"{__name__}.{_module.name}").MODEL
        except ImportError as error:
            if error.name != "transformers":
                raise
            UNAVAILABLE.append(_module.name)
        else:
            FAMILIES[_model.name] = _model

ALL: dict[str, ZooModel] = {**{name: zoo for name, zoo in ZOO.items() if zoo.hf}, **FAMILIES}
"""Those of the zoo that transformers has, and these."""

__all__ = ["ALL", "FAMILIES", "UNAVAILABLE"]
