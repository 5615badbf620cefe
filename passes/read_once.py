"""A decode step's remaining attention goes to the kernel that reads each key and value once, where that pays.

`partition_modalities` and `append_in_place` bring most decode steps to `avl::partitioned_decode`. Not so a step on a
static cache under a plan that leaves nothing out, on a cache that has no room yet, in a sliding window, or across to an
encoder. There, on a CPU, ATen's kernel reads grouped keys once for each query head of a group, is slow in half
precision where the processor has no units for it, and goes over all rows of a static buffer, also over those that
nothing is stored in yet. With no ranges named, `avl::partitioned_decode` means the same as `avl::attention`, with every
mask, and does none of that: so every plan has it, the identity plan too.

A call of it costs more than one of ATen's. Short caches therefore keep ATen, and so does everything where there is no
C++ compiler.

On a GPU fused kernels do all that, but for latents: those would be put together with their rotated keys at each step.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from avl_fx.kernels.partitioned_decode.native import is_available, is_dispatched
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import fake, hint
from avl_fx.passes.read_ranges import decoded_latents, decodes, read_everything
from avl_fx.passes.rewrite import remove_dead
from avl_fx.passes.share_queries import decoder_sites
from avl_fx.passes.site import PassResult, Site, Status

__all__ = ["MIN_PRODUCTS", "MIN_PRODUCTS_DISPATCHED", "read_once"]

MIN_PRODUCTS = {torch.float32: 3 << 18, torch.float16: 1 << 17, torch.bfloat16: 1 << 17}
"""From how many products of query and key elements a thread (12 heads of 64 dimensions: 1,024 keys in float32) a call
through Python is worth its overhead, whatever the group, the head dim and the mask."""
MIN_PRODUCTS_DISPATCHED = 1 << 15
"""The same for a call that does not pass through Python."""


def read_once(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Replace the canonical nodes of the decoder's sites of one query by `avl::partitioned_decode` where that pays."""
    result = PassResult("read_once")
    sites = [s for s in decoder_sites(ctx) if _is_cached(s) and decodes(s) and _pays(s)]
    if not sites:
        return result
    for site in sites:
        read_everything(site)
        if site.status is Status.FOUND:
            site.status = Status.REWRITTEN
        result.count += 1
    remove_dead(gm.graph, ctx.initially_unused, keep=ctx.keep())
    return result


def _is_cached(site: Site) -> bool:
    """Whether the keys were made by earlier steps, or once for all of them."""
    return site.cache != "none" or site.role == "cross"


def _pays(site: Site) -> bool:
    """By the sizes that the graph was captured with: it is a matter of speed alone, so nothing is guarded."""
    assert site.node is not None
    if site.device != "cpu":
        return decoded_latents(site) is not None
    query, key = (fake(n) for n in site.node.args[:2])
    heads, sizes = list(map(hint, query.shape[:2])), list(map(hint, key.shape[2:]))
    if None in heads or None in sizes:
        return False
    programs = math.prod(heads)  # type: ignore[arg-type]
    threads = max(1, min(torch.get_num_threads(), programs))
    least = min(MIN_PRODUCTS[query.dtype], MIN_PRODUCTS_DISPATCHED) if is_dispatched() else MIN_PRODUCTS[query.dtype]
    return programs * math.prod(sizes) >= least * threads and is_available()  # type: ignore[arg-type]
