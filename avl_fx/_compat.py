"""The only file that imports private names of torch or transformers.

Everything else in the project asks this module, so a new release of either library is met in one place.
"""

import contextlib
import copy
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, get_origin

import torch
from torch import fx
from torch._dynamo import OptimizedModule, lookup_backend, symbolic_convert
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit, ShortenTraceback
from torch._dynamo.pgo import get_code_state
from torch._dynamo.source import LocalSource
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx
from torch.utils import _pytree as pytree

__all__ = [
    "CACHE_NAMES",
    "BackendErrorBase",
    "FrameModules",
    "Watch",
    "attention_implementation",
    "cache_argument",
    "cache_of",
    "compile_arguments",
    "compile_graph",
    "compile_module",
    "copy_module",
    "cpp_compiler",
    "decoder_depth",
    "decoder_modules",
    "frame_modules",
    "fresh_compilation",
    "gather_over",
    "graph_breaks",
    "inductor_config_types",
    "inductor_modes",
    "is_compiled",
    "isolation",
    "raise_recompile_limits",
    "readable",
    "recompile_limit",
    "set_attention_implementation",
    "strip_compilation",
    "sum_over",
    "uncompile_module",
    "uncompiled",
    "visible_implementation",
    "watch_calls",
    "without_attention",
]

# Dynamo re-raises `ShortenTraceback` from a backend untouched, and strips its own frames from the traceback; any other
# exception reaches the user wrapped as `BackendCompilerFailed`. The constructor requires the keyword
# `first_useful_frame`; `None` keeps the traceback whole.
BackendErrorBase = ShortenTraceback

# What releases of transformers call the cache, among a model's arguments and in what it returns: the newest first, for
# the newer ones log a warning where they are asked for the older name.
CACHE_NAMES = ("cache", "past_key_values")


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph to work on; Dynamo goes on reading its own after the backend returned.

    What AOTAutograd looks for (the source of every input) are attributes that FX does not copy.
    """
    duplicate = copy.copy(gm)
    graph = copy.deepcopy(gm.graph)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    duplicate.graph = graph
    duplicate.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        duplicate._param_name_to_source = gm._param_name_to_source
    return duplicate


def readable(gm: fx.GraphModule) -> str:
    """Python-like text of a graph with shapes."""
    return gm.print_readable(print_output=False)


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], compiler: str, config: Mapping[str, Any]
) -> Callable[..., Any]:
    """Hand a rewritten Dynamo graph to PyTorch's compilers: ``inductor``, ``aot_eager`` or ``eager``.

    ``example_inputs`` are those that Dynamo gave; inputs that passes added behind them are found in the graph.
    """
    added = [n for n in gm.graph.nodes if n.op == "placeholder"][len(example_inputs) :]
    for node in added:
        # AOTAutograd asks every input for its source.
        node._dynamo_source = LocalSource(node.name, is_input=True)
    example_inputs = [*example_inputs, *(n.meta["example_value"] for n in added)]
    if compiler == "eager":
        return gm.forward
    if compiler == "aot_eager":
        return lookup_backend("aot_eager")(gm, example_inputs)
    return cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=dict(config)))


class FrameModules:
    """Modules of the frame that Dynamo is compiling, by the names that graphs use for them.

    Empty when no frame is being compiled: a graph handed to the backend by hand.
    """

    def __init__(self, frame_locals: Mapping[str, Any]) -> None:
        self._locals = frame_locals

    def module(self, path: str) -> torch.nn.Module | None:
        """Module at ``local.attribute.0.attribute``, or ``None``; ``args.0`` is the first of a tuple of arguments.

        An empty path is the frame's own module, see `outermost`.
        """
        local, *rest = path.split(".")
        found = self._locals.get(local) if local else self.outermost()
        for part in rest:
            if isinstance(found, torch.nn.Module):
                found = found._modules.get(part)
            elif isinstance(found, tuple) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            else:
                return None
        return found if isinstance(found, torch.nn.Module) else None

    def outermost(self) -> torch.nn.Module | None:
        """The module whose forward this is: ``self``, or the first of the arguments where a decorator names none."""
        arguments = (value[0] for value in self._locals.values() if isinstance(value, tuple) and value)
        found = (value for value in (self._locals.get("self"), *arguments) if isinstance(value, torch.nn.Module))
        return next(found, None)

    def decoder_layers(self) -> int | None:
        """Depth of the language decoder, as the configuration of the outermost module states it."""
        return decoder_depth(self._configured())

    def without_attention(self) -> frozenset[int]:
        """Layers of the language decoder that do something else, as the same configuration states them."""
        return without_attention(self._configured())

    def _configured(self) -> torch.nn.Module | None:
        outermost = self.outermost()
        # The frame of a single layer has no configuration of its own, but its attention holds the decoder's.
        modules = () if outermost is None else outermost.modules()
        return next((module for module in modules if decoder_depth(module) is not None), None)

    def decoder_modules(self) -> frozenset[torch.nn.Module] | None:
        """Modules of the language decoder, as the outermost module names it; ``None`` when it names none.

        ``get_decoder`` falls back to the model itself, also for a vision encoder. That one embeds no tokens: none then.
        """
        outermost = self.outermost()
        if not hasattr(outermost, "get_decoder"):
            return None
        try:
            decoder: Any = cast(Any, outermost).get_decoder()
            embeds: Any = decoder.get_input_embeddings()
        except NotImplementedError:
            return frozenset()
        except (AttributeError, TypeError):
            return None
        if isinstance(embeds, torch.nn.Embedding):
            return decoder_modules(decoder)
        # Something around an embedding may be of tokens (an adapter of PEFT) or of an image's positions.
        parts = embeds.modules() if isinstance(embeds, torch.nn.Module) else ()
        return None if any(isinstance(part, torch.nn.Embedding) for part in parts) else frozenset()


def decoder_depth(model: Any) -> int | None:
    """Number of layers of the language decoder, as the model's configuration states it."""
    layers = getattr(_decoder_config(model), "num_hidden_layers", None)
    return layers if isinstance(layers, int) else None


def without_attention(model: Any) -> frozenset[int]:
    """Layers of the language decoder that are convolutions or recurrences (hybrid models), by its configuration."""
    types = getattr(_decoder_config(model), "layer_types", None)
    return frozenset(i for i, kind in enumerate(types or ()) if kind in ("conv", "linear_attention", "mamba", "moe"))


def is_encoder_decoder(config: Any) -> bool:
    """Whether a configuration, or its text part, is that of an encoder-decoder (Florence-2's is, inside)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return any(getattr(part, "is_encoder_decoder", False) is True for part in (config, text))


def _decoder_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    text = config.get_text_config(decoder=True)
    # A part that is an encoder-decoder names its encoder's layers until it is asked for its decoder.
    nested = any(text is getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return text.get_text_config(decoder=True) if nested and text.is_encoder_decoder else text


def decoder_modules(decoder: torch.nn.Module) -> frozenset[torch.nn.Module]:
    """The modules of ``decoder`` without those of a vision encoder that is a part of it (Phi-4's).

    Such are described by a part of the configuration that is not the one for text.
    """
    config, text = getattr(decoder, "config", None), _decoder_config(decoder)
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    others = [part for part in parts if part is not None and part is not text]
    apart = (m for m in decoder.modules() if any(getattr(m, "config", None) is part for part in others))
    return frozenset(decoder.modules()).difference(*(m.modules() for m in apart))


def attention_implementation(config: Any) -> str | None:
    """The name of the implementation that attention described by ``config`` runs in, where there is one."""
    name = getattr(config, "_attn_implementation_internal", None)
    return name if isinstance(name, str) else None


def set_attention_implementation(config: Any, name: str) -> None:
    """Let attention described by ``config``, and by none of its parts, run in ``name``."""
    config._attn_implementation_internal = name


def visible_implementation(module: torch.nn.Module, config: Any) -> str | None:
    """The implementation made of PyTorch's operators that ``module`` would take; ``None``: it cannot change it.

    ``sdpa`` wherever it means the same: it knows no soft-capped logits, which some releases drop without a word.
    """
    can_change: Any = getattr(module, "_can_set_attn_implementation", None)
    if can_change is not None and not can_change():
        return None
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    best: Any = getattr(module, "get_correct_attn_implementation", None)
    return "sdpa" if best is None else cast(str, best(None))


class Watch(Protocol):
    """Who makes the calls of a compiled module."""

    @property
    def pieces(self) -> int:
        """How many graphs one kind of call takes, as far as that is known."""

    def __call__(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any: ...


def compile_module(
    module: torch.nn.Module,
    settings: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    limit_hit: Callable[[], Exception],
    watched: Watch | None = None,
    any_length: bool = False,
) -> None:
    """``module.compile(**kwargs)`` with Dynamo settings that hold around its calls and nowhere else.

    ``watched``, if any, is given what is called, and the arguments of each call, to make it. ``any_length``: the length
    of a prompt is left open in its graph, from the first prompt on.

    ``recompile_limit`` among the settings is the least one for each piece that ``watched`` knows of: users may raise
    theirs. ``limit_hit`` makes what is raised where the settings forbid to run eagerly past it.
    """
    least = settings.get("recompile_limit", 0)
    module.compile(**kwargs)
    compiled = module._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        if any_length:
            _leave_length_open(args, kwargs)
        with dynamo_config.patch({**settings, **_recompile_limits(least * (watched.pieces if watched else 1))}):
            try:
                return watched(compiled, args, kwargs) if watched else compiled(*args, **kwargs)
            except FailOnRecompileLimitHit as error:
                raise limit_hit() from error

    module._compiled_call_impl = call if settings or watched else compiled


def _recompile_limits(least: int) -> dict[str, int]:
    """Dynamo's settings under which a code object has at least so many graphs."""
    names = ("recompile_limit", "accumulated_recompile_limit")
    return {name: max(least, getattr(dynamo_config, name)) for name in names}


def raise_recompile_limits(factor: int) -> None:
    """Let the call that is running compile ``factor`` times as often; `compile_module` sets back what it found."""
    for name, limit in _recompile_limits(factor * dynamo_config.recompile_limit).items():
        setattr(dynamo_config, name, limit)


def _leave_length_open(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Mark batch and sequence of everything that a decoder takes for a prompt."""
    tensors = [leaf for leaf in pytree.tree_leaves((list(args), dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    hidden = [t for t in tensors if t.dim() == 3 and t.is_floating_point()]
    ids = [t for t in tensors if t.dim() == 2 and not t.is_floating_point()]
    if not hidden and not ids:
        return
    named = (kwargs.get(name) for name in ("inputs_embeds", "input_ids"))
    batch, length = next((t for t in named if isinstance(t, torch.Tensor)), (hidden or ids)[0]).shape[:2]
    if length == 1:
        return
    for tensor in tensors:
        rows, sequence = _batch_and_sequence(tensor, batch, length)
        if sequence and rows not in sequence and tensor.shape[rows] == batch > 1:
            sequence.append(rows)
        for dim in sequence:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _batch_and_sequence(tensor: torch.Tensor, batch: int, length: int) -> tuple[int, list[int]]:
    """The dimension of ``tensor`` that may be the batch, and those that are the sequence; none of features."""
    equal = [dim for dim, size in enumerate(tensor.shape) if size == length and (dim or tensor.dim() == 1)]
    if not tensor.is_floating_point():  # masks, ids, or positions [axes, batch, length]
        return int(tensor.dim() == 3 and equal == [2]), equal
    if tensor.dim() == 3 and equal == [2] and tensor.shape[1] == batch:  # positions, too
        return 1, equal
    if tensor.dim() == 3:  # [batch, length, hidden], whatever the hidden size is
        return 0, [dim for dim in equal if dim == 1]
    return 0, equal if tensor.dim() == 4 else []


@functools.cache
def cache_argument() -> str:
    """The one of `CACHE_NAMES` by which this release of transformers passes a cache."""
    from transformers import GenerationMixin

    taken = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in taken)


def cache_of(output: Any) -> Any:
    """The cache in what a model or its `generate` returned; ``None`` where there is none."""
    found = (getattr(output, name, None) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None), None)


def uncompile_module(module: torch.nn.Module) -> None:
    """Undo `compile_module`."""
    module._compiled_call_impl = None


def uncompiled(model: Any) -> Any:
    """The module inside what ``torch.compile(module)`` returns; anything else as it is."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


def is_compiled(module: torch.nn.Module, in_place: bool = True) -> bool:
    """Whether Dynamo compiles calls of ``module``: its wrapper, its ``forward``, or ``in_place`` its call."""
    if isinstance(module, OptimizedModule) or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
        return True
    return in_place and module._compiled_call_impl is not None


def strip_compilation(model: torch.nn.Module) -> None:
    """Let every module of ``model`` run eagerly, also where its call or its ``forward`` was compiled in place."""
    for module in model.modules():
        if module._compiled_call_impl is not None:
            uncompile_module(module)
        forward: Any = vars(module).get("forward")
        while hasattr(forward, "_torchdynamo_orig_callable"):
            forward = vars(module)["forward"] = forward._torchdynamo_orig_callable


def watch_calls(module: torch.nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``wrap(call)`` in the place of what ``module(...)`` runs, outside of anything compiled.

    A forward hook would be compiled along where the module itself was compiled in place.
    """
    module._compiled_call_impl = wrap(module._compiled_call_impl or module._call_impl)


@functools.cache
def compile_arguments() -> frozenset[str]:
    """Names of the keyword arguments of this release's `torch.compile`."""
    return frozenset(inspect.signature(torch.compile).parameters) - {"model"}


def isolation() -> dict[str, Any]:
    """Arguments for `torch.compile` that keep its compiled code apart from that of other calls on the same function.

    Without them all share one recompile limit. Empty where the release cannot do it; see `_own_code`.
    """
    return {"isolate_recompiles": True} if "isolate_recompiles" in compile_arguments() else {}


def recompile_limit() -> int:
    """How many graphs of one function Dynamo compiles before it runs the function eagerly."""
    return dynamo_config.recompile_limit


def graph_breaks() -> dict[str, int]:
    """How often Dynamo broke a graph so far in this process, by the first line of the reason."""
    found: dict[str, int] = {}
    for reason, count in counters["graph_break"].items():
        lines = reason.strip().splitlines()
        title = lines[0].strip() if lines else "unknown"
        found[title] = found.get(title, 0) + count
    return found


def compilations() -> int:
    """How many frames Dynamo compiled so far in this process, or tried to; another number if it was reset meanwhile."""
    return sum(counters["frames"].values())


@contextlib.contextmanager
def fresh_compilation(backend: Callable[..., Any], model: torch.nn.Module) -> Iterator[None]:
    """Compile ``model`` with ``backend`` inside the block as a new process would, and leave what the process knows.

    No recompile limit; no sizes that earlier runs found to vary; none of Dynamo's warnings. ``backend`` stands in for
    the one of every `torch.compile` that is called in the block, so it must be a callable that was never used before:
    compiled code is reused when backends are equal.
    """
    sizes = get_code_state()
    known = dict(sizes)
    log = logging.getLogger("torch._dynamo")
    level = log.level
    unlimited = dynamo_config.patch(recompile_limit=100_000, accumulated_recompile_limit=100_000)
    with unlimited, torch.compiler.set_stance("default", force_backend=backend), _own_code(model):
        sizes.clear()
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
            sizes.clear()
            sizes.update(known)


@contextlib.contextmanager
def _own_code(model: torch.nn.Module) -> Iterator[None]:
    """For the block, methods of ``model`` have code of their own, where `isolation` cannot keep compiled code apart.

    Dynamo keeps at a code object what it compiled of it, and that its recompile limit was reached: what the block
    compiles would use up the limit of others, and where theirs is used up nothing would be compiled.
    """
    codes = {} if isolation() else {function: function.__code__ for function in _methods(model)}
    try:
        for function, code in codes.items():
            function.__code__ = code.replace()
        yield
    finally:
        for function, code in codes.items():
            function.__code__ = code


def _methods(model: torch.nn.Module) -> set[types.FunctionType]:
    """The functions in the classes of all modules, torch's own left out, and those that they decorate."""
    classes = {c for module in model.modules() for c in type(module).__mro__ if c.__module__.split(".")[0] != "torch"}
    pending = [value for c in classes for value in vars(c).values()]
    pending += [getattr(forward, "__func__", forward) for m in model.modules() if (forward := vars(m).get("forward"))]
    found: set[types.FunctionType] = set()
    while pending:
        function = pending.pop()
        if isinstance(function, types.FunctionType) and function not in found:
            found.add(function)
            pending.append(getattr(function, "__wrapped__", None))
    return found


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would call, or ``None`` when it finds none."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        return None


def frame_modules() -> FrameModules:
    """The modules reachable from the frame that is being compiled right now."""
    transaction = _transaction()
    return FrameModules({} if transaction is None else transaction.f_locals)


def _transaction() -> Any:
    """What Dynamo knows of the frame that it is compiling right now; ``None`` when it compiles none."""
    return getattr(symbolic_convert.tls, "current_tx", None)


@functools.cache
def inductor_config_types() -> dict[str, type | None]:
    """Every key of Inductor's configuration, with its type; ``None`` where more than one type is legal."""
    from torch._inductor import config

    types: dict[str, type | None] = {}
    for key in config.get_config_copy():
        declared = config.get_type(key)  # type: ignore[attr-defined]
        # A key that is declared without a type and defaults to None reports NoneType: anything may go there.
        plain = isinstance(declared, type) and get_origin(declared) is None and declared is not type(None)
        types[key] = declared if plain else None
    return types


def inductor_modes() -> dict[str, dict[str, Any]]:
    """The modes of `torch.compile`: name -> the Inductor configuration that it stands for."""
    from torch._inductor import list_mode_options

    return list_mode_options()


def is_last_recompile() -> bool:
    """Whether Dynamo may compile the current frame this once more, and runs it eagerly from then on."""
    transaction = _transaction()
    number: int | None
    if isolation() and transaction is not None:
        # Counted are graphs of this `torch.compile` alone.
        from torch._dynamo import eval_frame

        region = eval_frame.get_eval_frame_isolate_recompiles_id()
        number = len(eval_frame._get_cache_entries_for_region(transaction.f_code, region))
    else:
        number = getattr(CompileContext.current_compile_id(), "frame_compile_id", None)
    return isinstance(number, int) and number >= dynamo_config.recompile_limit - 1


def sum_over(group: str, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The sum of ``tensor`` over the processes of the group with this name, the same bits in each; and how many."""
    from torch.distributed import all_reduce

    found = _process_group(group)
    total = tensor.clone()
    all_reduce(total, group=found)
    return total, found.size()


def gather_over(group: str, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The tensors of all processes of the group with this name, one behind the other along ``dim``."""
    from torch.distributed import all_gather

    found = _process_group(group)
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(found.size())]
    all_gather(parts, tensor.contiguous(), group=found)
    return torch.cat(parts, dim)


def _process_group(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(cast(Any, name))
