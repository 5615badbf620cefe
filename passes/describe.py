"""Fills in what a site is: whose module, which layer of which tower, which cache and what kind of attention.

Evidence comes from the graph (paths of the module stack, in-place writes, outputs) and from the module itself where it
can still be reached. Names of models or classes are never asked.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import (
    alias_root,
    arg,
    fake,
    mutated_input,
    op,
    shape,
    with_views,
    writes_to,
)
from avl_fx.passes.site import Site

__all__ = ["cache_kind", "describe_site", "module_path", "reaches_output"]

_LOCAL = re.compile(r"^L\['(?P<name>[^']+)'\](\[(?P<number>\d+)\])?")
_MODULES = re.compile(r"\._modules\['([^']+)'\]")
_INDEX = re.compile(r"\[(\d+)\]")
_SEARCH_LIMIT = 400


def module_path(node: fx.Node) -> tuple[str, str, type | str] | None:
    """``(local, path, class)`` of the innermost module that ``node`` came from.

    ``local`` is the Python local of the traced frame that the path starts at, usually ``self``, or ``args.0`` in a
    decorator that names none of its arguments; ``path`` is dotted and may be empty.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    raw, cls = list(stack.values())[-1]
    found = _LOCAL.match(raw)
    local = "" if found is None else ".".join(filter(None, (found["name"], found["number"])))
    path = _INDEX.sub(r".\1", _MODULES.sub(r".\1", raw[found.end() :] if found else raw))
    return local, path.replace("._modules", "").strip("."), cls


def describe_site(site: Site, anchor: fx.Node, query: Any, key: Any, value: Any, ctx: PassContext) -> None:
    """Fill ``site`` from its nodes; any of ``query``, ``key``, ``value`` may be unknown (``None``)."""
    _describe_tensors(site, query, key, value)
    module = _describe_module(site, anchor, ctx)
    site.cache = cache_kind(key) if isinstance(key, fx.Node) else "none"
    # Keys of an earlier layer, as one without a cache reads, are no other sequence's.
    earlier = (s.node for s in ctx.sites if s is not site and s.kind != "cross")
    shared = any(arg(node, 1, "key") is key for node in earlier if node is not None)
    site.kind = _kind(module, site.layer, query, None if shared else key)
    site.role = _role(site, module, anchor, ctx)


def _describe_tensors(site: Site, query: Any, key: Any, value: Any) -> None:
    query_shape, key_shape, value_shape = shape(query), shape(key), shape(value)
    if query_shape is not None and len(query_shape) == 4:
        site.batch, site.queries = _plain(query_shape[0]), _plain(query_shape[2])
        site.heads, site.head_dim = _known(query_shape[1]), _known(query_shape[3])
    if key_shape is not None and len(key_shape) == 4:
        site.kv_heads, site.keys = _known(key_shape[1]), _plain(key_shape[2])
    if value_shape is not None and len(value_shape) == 4:
        site.value_dim = _known(value_shape[3])
    for node in (query, value):
        tensor = fake(node)
        if isinstance(tensor, torch.Tensor):
            site.dtype, site.device = str(tensor.dtype).removeprefix("torch."), tensor.device.type
            break


def _plain(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _known(size: Any) -> int:
    """A head count or dimension; 0 where it is symbolic, and the site refused."""
    return size if isinstance(size, int) else 0


def _describe_module(site: Site, anchor: fx.Node, ctx: PassContext) -> torch.nn.Module | None:
    found = module_path(anchor) or _frame_itself(ctx)
    if found is None:
        return None
    local, path, cls = found
    site.module_path = path
    site.module_class = cls if isinstance(cls, str) else cls.__name__
    module = ctx.resolve_module(f"{local}.{path}" if path else local)
    parts = path.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    if indices:
        site.layer = int(parts[indices[-1]])
        site.tower = ".".join(parts[: indices[-1]])
        layers = ctx.resolve_module(f"{local}.{site.tower}")
        if isinstance(layers, torch.nn.ModuleList | torch.nn.Sequential):
            site.depth = len(layers)
    else:
        # A graph of one layer: its path starts inside the layer, but the module may know its own number.
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int):
            site.layer, site.tower = number, site.module_class
    return module


def _frame_itself(ctx: PassContext) -> tuple[str, str, type] | None:
    """As `module_path`, where no module is called: the frame is the module's own (a decoder in pieces)."""
    module = ctx.resolve_module("")
    return None if module is None else ("", "", type(module))


def _kind(module: torch.nn.Module | None, layer: int | None, query: Any, key: Any) -> str:
    if isinstance(query, fx.Node) and isinstance(key, fx.Node):
        from_query, from_key = _projected_from(query), _projected_from(key)
        apart = from_query and not (from_query & from_key) and (from_key or not _appended(key))
        # Latent attention projects twice: queries and keys come from latents that come from one hidden state.
        if apart and not (_and_above(from_query) & _and_above(from_key)):
            return "cross"
    if getattr(module, "is_cross_attention", False) is True:
        return "cross"
    slides = getattr(module, "is_sliding", None)
    # EXAONE keeps the number in layers that do not slide, too, and says so.
    if slides is True or (slides is not False and isinstance(getattr(module, "sliding_window", None), int)):
        return "sliding"
    declared = _declared_kind(module, layer)
    return declared.removesuffix("_attention") if declared not in (None, "attention") else "full"


def _declared_kind(module: torch.nn.Module | None, layer: int | None) -> str | None:
    """What the configuration of a transformers model calls the attention of this layer: ``chunked_attention``."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    number = getattr(module, "layer_idx", layer)
    if not isinstance(types, list | tuple) or not isinstance(number, int) or not 0 <= number < len(types):
        return None
    return types[number] if isinstance(types[number], str) else None


def _projected_from(node: fx.Node) -> set[fx.Node]:
    """Inputs of the nearest projections (linear layers) above ``node``."""
    found: set[fx.Node] = set()
    seen, pending = {node}, [node]
    while pending and len(seen) < _SEARCH_LIMIT:
        current = pending.pop()
        if op(current) in ("linear", "addmm"):
            source = current.args[1] if op(current) == "addmm" else current.args[0]
            if isinstance(source, fx.Node):
                found.add(alias_root(source))
            continue
        for upper in _sources(current):
            if upper not in seen:
                seen.add(upper)
                pending.append(upper)
    return found


def _and_above(projected: set[fx.Node]) -> set[fx.Node]:
    """``projected`` and the inputs of the projections right above."""
    return projected.union(*map(_projected_from, projected))


def _sources(node: fx.Node) -> list[fx.Node]:
    """What ``node`` is made from, including what is written into its buffer (a static cache)."""
    sources = list(node.all_input_nodes)
    for write in writes_to(alias_root(node)):
        sources += write.all_input_nodes
    return sources


def _appended(key: fx.Node) -> bool:
    """Whether this graph adds keys of its own to a cache."""
    root = alias_root(key)
    return op(root) == "cat" or bool(writes_to(root))


def cache_kind(key: fx.Node) -> str:
    """Where ``key`` is kept between calls, as `Site.cache` says it."""
    root = alias_root(key)
    returned = reaches_output(root)
    if writes_to(root):
        # What is written into a buffer that the graph makes and drops was put together from something else.
        return "static" if returned or root.op in ("placeholder", "get_attr") else "other"
    if _copied_to_buffer(root):
        return "static"
    return "dynamic" if returned else "none"


def _copied_to_buffer(root: fx.Node) -> bool:
    """Whether ``root`` or a view of it is written into a buffer: a static window that a long prompt overfills."""
    own = with_views(root)
    written = (mutated_input(user) for view in own for user in view.users)
    return any(target is not None and target not in own for target in written)


def reaches_output(node: fx.Node) -> bool:
    """Whether ``node`` or a view of it is returned by the graph."""
    return any(user.op == "output" for view in with_views(node) for user in view.users)


def _role(site: Site, module: torch.nn.Module | None, anchor: fx.Node, ctx: PassContext) -> str:
    if site.kind == "cross":
        return "cross"
    known = ctx.decoder_modules
    declared = getattr(module, "is_causal", None)
    if site.cache in ("dynamic", "static"):
        return "decoder"
    if known is not None and module in known:
        # A decoder's prefix may see itself whole (PaliGemma), and without a cache the module alone tells. One that says
        # nothing may attend to something else than tokens: to what the layers before have added (Inkling 2).
        shows = site.queries == 0 or (site.cache, site.mask) != ("none", "none")
        return "decoder" if shows or declared is not None else "unknown"
    if known is not None and (module is not None or not known):
        # Which may be causal all the same (DeepSeek-OCR 2).
        return "encoder"
    if site.cache != "none" or site.mask == "causal" or declared is True:
        return "decoder"
    if declared is False:
        return "encoder"
    mask = arg(anchor, 3, "attn_mask") if op(anchor) == "scaled_dot_product_attention" else None
    if site.mask == "none":
        return "encoder"
    if isinstance(mask, fx.Node) and not _looks_causal(mask):
        return "unknown"
    return "decoder" if _looks_causal(mask if isinstance(mask, fx.Node) else anchor) else "unknown"


def _looks_causal(node: fx.Node) -> bool:
    """Whether a mask is made by comparing positions, or cut to a triangle."""
    pending, seen = [node], {node}
    while pending and len(seen) < _SEARCH_LIMIT:
        current = pending.pop()
        if op(current) in ("tril", "triu", "tril_", "triu_"):
            return True
        if op(current) in ("le", "ge", "lt", "gt") and any(_from_arange(n) for n in current.all_input_nodes):
            return True
        for upper in current.all_input_nodes:
            # The mask's own history, not the hidden states': projections end the search.
            if upper not in seen and op(upper) not in ("linear", "addmm"):
                seen.add(upper)
                pending.append(upper)
    return False


def _from_arange(node: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending and len(seen) < 50:
        current = pending.pop()
        if op(current) == "arange":
            return True
        for upper in current.all_input_nodes:
            if upper not in seen:
                seen.add(upper)
                pending.append(upper)
    return False
