"""`AVLCache`: a transformers cache that stores what a plan keeps, and nothing else.

A stock cache stays complete under every plan (`avl_fx.partition`): decode reads less of it, but it is as large as
before. This one holds text and secondary visual keys alone; what a text window drives out leaves it, and lazy layers
own no keys, or none of visual tokens (modes ``vla`` and ``vla_scores``). ::

    model.generate(**inputs, past_key_values=AVLCache(plan, model.config))  # cache=..., since transformers 5.24

Lengths, masks and positions stay those of the whole sequence: the model sees a cache of all tokens, and the compiled
graph knows which rows are really there (`avl_fx.passes.resolve_rows`). So it works under the backend alone; eagerly
only with a plan that drops nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from avl_fx import _compat
from avl_fx.dropped_keys import is_dropped, marker
from avl_fx.errors import CacheStateError
from avl_fx.growing import COMPACT_SPARE_ROWS, reserve
from avl_fx.kernels.append_rows import append_rows
from avl_fx.partition import Partition, state_of
from avl_fx.plan import Plan, PlanSpec

__all__ = ["AVLCache"]


class _Sequence:
    """The sequence that the layers of a cache share. One number for all: a graph takes it as one symbol."""

    def __init__(self) -> None:
        self.tokens = 0
        """Fed so far; those of a forward count as soon as its first layer has them."""
        self.start = 0
        """Fed before the latest forward."""
        self.first = self.last = self.reached = 0
        """Layers that share it, by number: the first, the last, and the latest that has them all. Between forwards that
        is the last one, always, so that no graph is compiled anew for it."""

    def reset(self) -> None:
        """Nothing was fed."""
        self.tokens, self.reached = 0, self.last

    def seen_by(self, layer: int) -> int:
        """Tokens that ``layer`` has seen: a forward that is running has reached some of the layers."""
        return self.tokens if layer <= self.reached else self.start

    def enter(self, layer: int, tokens: int) -> None:
        """``layer`` stores so many tokens more."""
        if layer == self.first:
            self.start, self.tokens = self.tokens, self.tokens + tokens
        self.reached = layer


class AVLLayer(DynamicLayer):
    """One layer of an `AVLCache`; `keys` and `values` hold some rows of a longer sequence."""

    keys: Any
    values: Any

    def __init__(self, sequence: _Sequence, index: int, plan: str, lossless: bool) -> None:
        super().__init__()
        self.sequence = sequence
        self.index = index
        """Its number in the cache."""
        self.plan = plan
        """Fingerprint."""
        self.lossless = lossless

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; in a compiled graph, which knows what is stored.

        Raises:
            CacheStateError: run eagerly although the plan drops keys, or filled by another model.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_fits(key_states, value_states)
        tokens = self.sequence.tokens if self.index == self.sequence.first else self.sequence.start
        if not torch.compiler.is_compiling():
            self._check_eager(tokens)
        self.keys = append_rows(self.keys, key_states, tokens, self.plan)
        self.values = append_rows(self.values, value_states, tokens, self.plan)
        self.sequence.enter(self.index, key_states.shape[2])
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens fed to this layer so far, stored or not."""
        return self.sequence.seen_by(self.index)

    def reset(self) -> None:
        self.keys = self.values = None  # first: some releases fill with zeros what is there
        super().reset()
        self.is_initialized = False
        self.sequence.reset()

    def select(self, take: Callable[[Tensor], Tensor]) -> None:
        """Replace the batch rows by ``take(rows)`` of keys and values."""
        self.values = take(self.values)
        dropped, width, dtype = is_dropped(self.keys), self.keys.shape[3], self.keys.dtype
        self.keys = marker(self.values, width, dtype=dtype) if dropped else take(self.keys)

    def _check_fits(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, stored, new in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            theirs, ours = (new.shape[1], new.shape[3]), (stored.shape[1], stored.shape[3])
            if theirs != ours or new.shape[0] != stored.shape[0] or new.dtype != stored.dtype:
                raise CacheStateError(
                    f"{name} {list(new.shape)} in {new.dtype} do not continue a cache of {list(stored.shape)} in "
                    f"{stored.dtype}",
                    field="cache",
                    remedy="use a fresh AVLCache for each model and each batch",
                )

    def _check_eager(self, tokens: int) -> None:
        if not self.lossless or self.keys.shape[2] != tokens:
            raise CacheStateError(
                "a compact cache whose plan drops keys is used by a model that runs eagerly",
                field="cache",
                remedy="compile the model under the same plan: avl_fx.compile(model, plan), or "
                'model.compile(backend="avl", options={"plan": plan}); or use a stock cache',
            )


class CrossLayer(DynamicLayer):
    """Keys and values of images, which cross-attention layers read: none of them belongs to a token of the text."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: what is taken back is text."""


class AVLCache(Cache):
    """A key/value cache that does not store what its plan leaves out.

    Args:
        plan: the plan that the model is compiled with: a `Plan`, its data, a path or a preset name.
        config: configuration of the model, or of the language model in it. Layers that slide keep their own window, as
            in a DynamicCache, and cross-attention layers all of theirs.

    Raises:
        PlanError: the plan is wrong.
        CacheStateError: ``config`` is no configuration, does not tell its layers, or is that of an encoder-decoder.

    One cache serves one conversation (or batch); any number of them may be alive at once.
    """

    layers: list[Any]

    def __init__(self, plan: PlanSpec, config: Any) -> None:
        self.plan = Plan.resolve(plan)
        self._sequence = _Sequence()
        if not hasattr(config, "get_text_config"):
            raise CacheStateError(
                f"must be the configuration of a transformers model, got {type(config).__name__}",
                field="config",
                remedy="write AVLCache(plan, model.config)",
            )
        if _compat.is_encoder_decoder(config):
            raise CacheStateError(
                "the model is an encoder-decoder: its images stand in the encoder, and its cache has two halves",
                field="config",
                remedy="pass no cache; plans work on the cache that generate makes",
            )
        if not hasattr(config.get_text_config(decoder=True), "num_hidden_layers"):
            raise CacheStateError(
                f"{type(config).__name__} does not say how many layers the decoder has",
                field="config",
                remedy="pass that of the language model, for example model.language_model.config",
            )
        super().__init__(layers=self._layers(config))

    def _layers(self, config: Any) -> list[Any]:
        layers: list[Any] = []
        cross = getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ()
        for index, layer in enumerate(DynamicCache(config=config).layers):
            if index in cross:
                layer = CrossLayer()
            elif type(layer) is DynamicLayer:
                lossless = self.plan.is_lossless and not self.plan.spares_visual_keys
                layer = AVLLayer(self._sequence, index, self.plan.fingerprint(), lossless)
            layers.append(layer)
        own = [layer.index for layer in layers if isinstance(layer, AVLLayer)]
        if own:
            self._sequence.first, self._sequence.last = own[0], own[-1]
        self._sequence.reset()
        return layers

    # ---- what it holds ---------------------------------------------------------------------------------------------

    @property
    def stored_bytes(self) -> int:
        """Bytes of the rows that are stored. Keys that a lazy layer does not own count as nothing."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory behind them: with room for the next tokens."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
        return sum(storages.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes that a stock DynamicCache takes for the same tokens."""
        total = 0
        for layer in self.layers:
            for tensor in _keys_and_values(layer):
                rows = layer.get_seq_length() if isinstance(layer, AVLLayer) else tensor.shape[2]
                batch, heads, _, dim = tensor.shape
                total += batch * heads * rows * dim * tensor.element_size()
        return total

    def _tensors(self) -> list[Tensor]:
        return [t for layer in self.layers for t in _keys_and_values(layer) if not is_dropped(t)]

    # ---- the contract of a transformers cache ----------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be taken back: not under a text window, which may have dropped older ones."""
        return self.plan.text_window is None and bool(super().is_croppable)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens.

        Args:
            tokens_to_remove: their number, negated. (A positive number, which transformers before 5.18 takes for the
                length that remains, is understood too.)

        Raises:
            CacheStateError: older tokens were left out since; the cache is as it was.
        """
        # Assisted generation of older releases hands over a tensor, which must not become part of the length.
        tokens_to_remove = int(tokens_to_remove)
        length = self.get_seq_length()
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        if count > length:
            raise self._cannot_crop(count, f"only {length} were fed")
        own = self._own()
        state = self._state()
        cropped = None
        if count and state is not None:
            cropped = state.cropped(count)
            if cropped is None:
                raise self._cannot_crop(count, "rows were dropped or moved since the first of them was fed")
        elif count and any(layer.values.shape[2] != length for layer in own):
            raise self._cannot_crop(count, "which rows are stored is not known any more")
        others = [layer for layer in self.layers if not isinstance(layer, AVLLayer)]
        was = [dict(vars(layer)) for layer in others]
        try:
            for layer in others if count else ():
                layer.crop(-count)
        except Exception as error:  # a window has let the earlier tokens go
            for layer, attributes in zip(others, was, strict=True):
                vars(layer).update(attributes)
            raise self._cannot_crop(count, str(error) or type(error).__name__) from error
        for layer in own if count else ():
            layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
        self._sequence.tokens -= count
        if cropped is not None and state is not None:
            self._hand_over(state, cropped)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row ``i`` continue row ``beam_idx[i]``."""
        self._select(beam_idx, lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices`` (numbers or booleans)."""
        index = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(index, lambda rows: rows[index.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row ``repeats`` times."""
        own = self._own()
        batch = own[0].values.shape[0] if own else 0
        index = torch.arange(batch, device="cpu").repeat_interleave(repeats)
        self._select(index, lambda rows: rows.repeat_interleave(repeats, 0), repeats)

    def _select(self, index: Tensor, take: Callable[[Tensor], Tensor], repeats: int | None = None) -> None:
        state = self._state()
        others = [layer for layer in self.layers if not isinstance(layer, AVLLayer)]
        name = "batch_select_indices" if repeats is None else "batch_repeat_interleave"
        for layer in others:
            # Recurrent layers can be reordered only, which is a selection of as many rows.
            if not hasattr(layer, name) and not (repeats is None and hasattr(layer, "reorder_cache")):
                raise CacheStateError(
                    f"{type(layer).__name__} of transformers has no {name}",
                    field="cache",
                    remedy="run the prompt in the batch that is wanted",
                )
        for layer in others:
            if repeats is not None:
                layer.batch_repeat_interleave(repeats)
            elif hasattr(layer, name):
                layer.batch_select_indices(index)
            else:
                layer.reorder_cache(index)
        for layer in self._own():
            layer.select(lambda rows: reserve(take(rows), spare=COMPACT_SPARE_ROWS))
        if state is not None:
            self._hand_over(state, state.select(index.cpu()))

    def __deepcopy__(self, memo: dict[int, Any]) -> AVLCache:
        """A cache of its own, with its own state."""
        state = self._state()
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._sequence = copy.copy(self._sequence)
        # Layers of transformers' own may keep what they store in lists and dictionaries.
        twin.layers = [copy.copy(x) if isinstance(x, AVLLayer) else copy.deepcopy(x, memo) for x in self.layers]
        for layer in twin.layers:
            if isinstance(layer, AVLLayer):
                layer.sequence = twin._sequence
                for name, value in vars(layer).items():
                    if isinstance(value, Tensor):
                        setattr(layer, name, value if is_dropped(value) else value.clone())
        if state is not None:
            batch = torch.arange(len(state.slots), device="cpu")
            state.select(batch).attach(twin._keys())
        return twin

    # ---- state -----------------------------------------------------------------------------------------------------

    def _own(self) -> list[AVLLayer]:
        return [layer for layer in self.layers if isinstance(layer, AVLLayer) and layer.is_initialized]

    def _keys(self) -> Sequence[Tensor]:
        return [layer.keys for layer in self._own() if not is_dropped(layer.keys)]

    def _state(self) -> Partition | None:
        return state_of(self._keys())

    def _hand_over(self, old: Partition, new: Partition) -> None:
        old.generation += 1  # tensors from before are out of date
        new.attach(self._keys())

    def _cannot_crop(self, tokens: int, why: str) -> CacheStateError:
        return CacheStateError(
            f"the newest {tokens} tokens of this compact cache cannot be taken back: {why}",
            field="tokens_to_remove",
            remedy="crop only what was fed since the last prompt, under a plan without a text window, or use a stock "
            "cache",
        )


def _keys_and_values(layer: Any) -> list[Tensor]:
    """Those of a layer that has them, as linear attention has not."""
    found = (getattr(layer, name, None) for name in ("keys", "values"))
    return [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.dim() == 4]
