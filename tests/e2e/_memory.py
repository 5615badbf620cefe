"""What is alive: tensors, the runtime's own objects, and the memory of the process.

As a program (``python -m tests.e2e._memory <dynamic|static> <tokens>``) it generates one long answer under a plan with
a text window and prints, as JSON, what was alive after each hundred tokens.
"""

import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import avl_fx
from avl_fx import Plan
from tests.zoo import ZOO

BATCH = 8
PLAN = Plan.avl(0.3, 0.5, 3, text=0.5)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> Counter:
    """Tensors that are alive, by class and shape (as text: a graph's own examples have symbolic sizes)."""
    gc.collect()
    return Counter((type(o).__name__, str(tuple(o.shape))) for o in gc.get_objects() if isinstance(o, torch.Tensor))


def live_state() -> Counter:
    """Objects of the runtime that belong to a cache, by class; caches of other tests may still be among them."""
    mine = ("avl_fx.partition", "avl_fx.text_window", "avl_fx.growing", "avl_fx.row_order")
    found = (type(o) for o in gc.get_objects() if not isinstance(o, type))
    serving = ("GrowingCache",)  # one a graph
    return Counter(t.__name__ for t in found if t.__module__ in mine and t.__name__ not in serving)


def cache_bytes(cache) -> int:
    """Bytes of the memory that the tensors of ``cache`` hold on to, spare rows included."""
    storages = (t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class _Watch(StoppingCriteria):
    """Called after every token; never stops."""

    def __init__(self, prompt: int, cache=None):
        self.prompt, self.seen = prompt, []

    def __call__(self, input_ids, scores, **kwargs):
        token = input_ids.shape[1] - self.prompt
        if token % 100 == 0:
            gc.collect()
            tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
            state = sum(live_state().values())
            self.seen.append({"token": token, "resident": resident(), "tensors": tensors, "state": state})
        return torch.zeros(len(input_ids), dtype=torch.bool)


def long_answer(kind: str, tokens: int) -> dict:
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=BATCH)
    avl_fx.compile(model, PLAN, options={"compiler": "eager", "strict": True})
    watch = _Watch(inputs["input_ids"].shape[1])
    out = model.generate(
        **inputs,
        **({"cache_implementation": "static"} if kind == "static" else {}),
        max_new_tokens=tokens,
        stopping_criteria=StoppingCriteriaList([watch]),
        return_dict_in_generate=True,
        disable_compile=True,
    )
    return {"seen": watch.seen, "cache": cache_bytes(out.past_key_values)}


if __name__ == "__main__":
    print(json.dumps(long_answer(sys.argv[1], int(sys.argv[2]))))
