"""What stands for keys that a lazy plan did not store, and that nobody can take for keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from avl_fx.dropped_keys import Nans, check_stored, is_dropped, mark_buffer, marker
from avl_fx.errors import CacheStateError
from avl_fx.passes.context import DroppedKeys
from avl_fx.record import GraphRecord
from avl_fx.runtime import CompiledGraph


def values(dtype: torch.dtype = torch.float32, length: int = 20) -> Tensor:
    return torch.randn(2, 3, length, 8).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_marker_has_the_shape_of_keys_and_the_memory_of_one(dtype: torch.dtype) -> None:
    keys = marker(values(dtype), head_dim=16)
    assert keys.shape == (2, 3, 20, 16)
    assert keys.dtype == dtype
    assert keys.untyped_storage().nbytes() == dtype.itemsize
    assert keys.isnan().all()
    assert is_dropped(keys)


def test_markers_of_one_cache_share_their_element() -> None:
    shared: Nans = {}
    first, second = marker(values(), 8, shared), marker(values(length=30), 16, shared)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert marker(values(torch.bfloat16), 8, shared).dtype == torch.bfloat16


def test_who_wipes_a_cache_wipes_no_marker_of_another() -> None:
    mine, theirs = marker(values(), 8), marker(values(), 8)
    mine.zero_()
    assert theirs.isnan().all()
    assert marker(values(), 8).isnan().all()


def test_a_marker_made_under_inference_mode_can_be_used_outside() -> None:
    with torch.inference_mode():
        made = marker(values(torch.float64), 8)
    outside = marker(values(torch.float64), 8)
    assert not outside.is_inference()
    assert is_dropped(made)
    (outside + 1).isnan()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda x: x[:, :, :-3],
    "last": lambda x: x[:, :, -1:],
    "row": lambda x: x[:1],
    "head": lambda x: x[:, 1],
    "transpose": lambda x: x.transpose(1, 2),
    "detach": lambda x: x.detach(),
    "expand": lambda x: x[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_marker_are_markers(view: str) -> None:
    assert is_dropped(VIEWS[view](marker(values(), 8)))


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_keys_are_keys(view: str) -> None:
    assert not is_dropped(VIEWS[view](values()))


def test_keys_of_one_dimension_are_not_taken_for_a_marker() -> None:
    """Their last stride may be 0, or anything."""
    assert not is_dropped(torch.zeros(2, 3, 4, 1))
    assert not is_dropped(torch.zeros(()))
    assert not is_dropped(torch.zeros(2, 3, 0, 8))


def test_dense_attention_over_a_marker_is_nan() -> None:
    query = torch.randn(2, 3, 1, 8)
    assert F.scaled_dot_product_attention(query, marker(values(), 8), values()).isnan().all()
    assert (torch.softmax(query @ marker(values(), 8).mT, -1) @ values()).isnan().all()
    grown = torch.cat([marker(values(), 8), torch.randn(2, 3, 1, 8)], dim=2)
    assert F.scaled_dot_product_attention(query, grown, values(length=21)).isnan().all()


def test_a_dynamic_cache_crops_its_marker() -> None:
    cache = DynamicCache()
    cache.update(values(), values(), 0)
    cache.layers[0].keys = marker(values(), 8)
    assert cache.get_seq_length() == 20
    cache.crop(-8)
    assert cache.layers[0].keys.shape[2] == 12
    assert is_dropped(cache.layers[0].keys)


# ---- static buffers -------------------------------------------------------------------------------------------------


def static_cache() -> StaticCache:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    cache = StaticCache(config=config, max_cache_len=20)
    cache.update(values(length=5), values(length=5), 0)
    return cache


def test_a_buffer_is_filled_once() -> None:
    keys = values()
    mark_buffer(keys)
    assert keys.isnan().all()
    assert is_dropped(keys)
    version = keys._version
    mark_buffer(keys)
    assert keys._version == version, "every step calls this: it must cost nothing"


def test_a_buffer_written_later_is_still_dropped() -> None:
    """A dense step puts its own key behind keys that are not there."""
    keys = values()
    mark_buffer(keys)
    keys[:, :, 7] = 1.0
    assert is_dropped(keys)
    mark_buffer(keys)
    assert keys.isnan().all()


def test_reset_makes_a_buffer_good_for_dense_use_again() -> None:
    cache = static_cache()
    keys = cache.layers[0].keys
    mark_buffer(keys)
    assert is_dropped(keys)
    cache.reset()
    assert not is_dropped(cache.layers[0].keys)
    check_stored(cache.layers[0].keys, 0)
    mark_buffer(keys)
    assert keys.isnan().all(), "and for a lazy plan once more"


def test_buffers_under_inference_mode() -> None:
    """Inference tensors do not count their writes."""
    with torch.inference_mode():
        keys = values()
        mark_buffer(keys)
        assert is_dropped(keys)
        keys.zero_()
        assert not is_dropped(keys), "a reset"
        mark_buffer(keys)
        assert is_dropped(keys), "a lazy plan after the reset"
        assert keys.isnan().all()


def test_marking_needs_no_gradient() -> None:
    keys = values().requires_grad_()
    mark_buffer(keys)
    assert keys.isnan().all()


# ---- the runtime ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", ["marker", "buffer"])
def test_dense_use_of_dropped_keys_raises(dropped: str) -> None:
    keys = marker(values(), 8) if dropped == "marker" else values()
    if dropped == "buffer":
        mark_buffer(keys)
    with pytest.raises(CacheStateError, match="decoder layer 7") as caught:
        check_stored(keys, 7)
    assert caught.value.field == "cache"
    assert caught.value.remedy
    check_stored(values(), 7)


def graph(
    function: Callable[..., tuple], dropped: list[DroppedKeys], dense: tuple[tuple[int, int], ...] = ()
) -> CompiledGraph:
    emptied = sorted(d.output for d in dropped if d.output is not None and d.like_output is not None)
    return CompiledGraph(function, dense, tuple(dropped), False, GraphRecord(index=0, nodes_before=0), emptied)


def test_markers_go_where_the_model_expects_keys() -> None:
    """Outputs [hidden, k0, v0, k1, v1, k2, v2] of which the compiled graph leaves out k1 and k2."""
    hidden, k0, v0, v1, v2 = torch.ones(2, 1, 4), *(values() for _ in range(4))
    drops = [DroppedKeys(1, 16, output=3, like_output=4), DroppedKeys(2, 8, output=5, like_output=6)]
    outputs = graph(lambda: (hidden, k0, v0, v1, v2), drops)()
    assert len(outputs) == 7
    for position, tensor in ((0, hidden), (1, k0), (2, v0), (4, v1), (6, v2)):
        assert outputs[position] is tensor
    assert is_dropped(outputs[3])
    assert outputs[3].shape == (2, 3, 20, 16)
    assert is_dropped(outputs[5])
    assert outputs[5].shape == (2, 3, 20, 8)


def test_buffers_are_marked_before_and_returned_ones_after() -> None:
    inside: list[bool] = []
    given, made = values(), values()

    def compiled(keys: Tensor) -> tuple:
        inside.append(is_dropped(keys))
        return (made,)

    drops = [DroppedKeys(1, 8, placeholder=0), DroppedKeys(2, 8, output=0)]
    (returned,) = graph(compiled, sorted(drops, key=lambda d: d.output or -1))(given)
    assert inside == [True]
    assert returned is made
    assert is_dropped(made)


def test_a_dense_graph_refuses_what_a_lazy_one_left() -> None:
    ran: list[int] = []
    dense = graph(lambda keys: (ran.append(1), keys)[1:], [], dense=((0, 4),))
    dense(values())
    assert ran == [1]
    with pytest.raises(CacheStateError, match="decoder layer 4"):
        dense(marker(values(), 8))
    assert ran == [1], "raised before anything ran"
