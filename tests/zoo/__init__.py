"""Tiny random vision-language models, built from local configs: no hub, no network, milliseconds to make.

Adding one is adding one file: every module of this folder whose name does not start with `_` is imported and must
define `MODEL`, a `ZooModel` (see `_base.py`). Tests then pick it up by parametrising over `zoo_names()`.
"""

import importlib
import os
import pkgutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.zoo._base import ZooModel

ZOO: dict[str, ZooModel] = {}
for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if not _module.name.startswith("_"):
        _model = importlib.import_module(f"{__name__}.{_module.name}").MODEL
        ZOO[_model.name] = _model


def zoo_names(**wanted: object) -> list[str]:
    """The names of the models whose fields have the wanted values: `zoo_names(hf=True, static_cache=True)`."""
    return [name for name, zoo in ZOO.items() if all(getattr(zoo, key) == value for key, value in wanted.items())]


def get(name: str) -> ZooModel:
    return ZOO[name]


__all__ = ["ZOO", "ZooModel", "get", "zoo_names"]
