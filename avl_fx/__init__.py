"""avl_fx: a torch.compile backend that makes vision-language models cheaper to run without touching their code.

::

    model.compile(backend="avl", options={"plan": avl_fx.Plan.lazy(blocks=[(4, 12)])})
    model.generate(**inputs)
"""

from avl_fx.backend import avl_backend
from avl_fx.cache import AVLCache
from avl_fx.calibrate import calibrate
from avl_fx.contenders import Contender
from avl_fx.errors import AvlError
from avl_fx.evaluate import EvaluationBatch, EvaluationTask, evaluate
from avl_fx.explain import explain
from avl_fx.modality import modality_ids
from avl_fx.plan import Plan
from avl_fx.regions import compile, uncompile

__version__ = "0.1.0.dev0"

__all__ = [
    "AVLCache",
    "AvlError",
    "Contender",
    "EvaluationBatch",
    "EvaluationTask",
    "Plan",
    "__version__",
    "avl_backend",
    "calibrate",
    "compile",
    "evaluate",
    "explain",
    "modality_ids",
    "uncompile",
]
