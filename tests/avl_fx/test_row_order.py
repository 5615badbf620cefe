"""Rows of a partitioned cache, back where they entered: whatever was asked, cropped and copied before."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.errors import CacheStateError
from avl_fx.modality import pop_given, push_given
from avl_fx.partition_runtime import PartitionRuntime
from avl_fx.passes.context import CachedTensor, PartitionedLayer
from avl_fx.policies import TextPolicy, VisionPolicy
from avl_fx.row_order import as_entered

KV_HEADS, HEAD_DIM = 2, 3


class Cache:
    """A dynamic cache of one layer behind graphs that do nothing but score; rows hold the number of their token."""

    def __init__(self, batch, vision, text):
        self.keys = self.values = torch.empty(batch, KV_HEADS, 0, HEAD_DIM)
        self.vision, self.text, self.seed = vision, text, 0

    def runtime(self, decode, masked):
        first = self.keys.shape[2] == 0
        cached = [CachedTensor(before=None if first else i, after=i) for i in range(2)]
        layer = PartitionedLayer(0, 0, *cached, scored=True)
        return PartitionRuntime(self.vision, self.text, decode, False, (layer,), 1, False, masked, None)

    def call(self, rows, visual=None, hidden=False):
        """`rows` more tokens; `visual` bool [batch, rows]; `hidden`: the mask hides every key."""
        runtime = self.runtime(decode=rows == 1 and self.keys.shape[2] > 0, masked=hidden)
        args = [self.keys, self.values]
        state = runtime.state(args)
        if state is None:
            args = as_entered(args, (0, 1))
        batch, before = len(self.keys), args[0].shape[2]
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        new = torch.arange(before, before + rows, dtype=torch.float32)[:, None]
        new = new.expand(batch, KV_HEADS, rows, HEAD_DIM)
        outputs = [torch.cat([x, new + shift], 2) for x, shift in zip(args, (0, 0.5), strict=True)]
        returned = [torch.randint(0, 6, (batch, KV_HEADS, before + rows), generator=generator) / 8]
        if hidden:
            returned.append(torch.zeros(batch, 1, before + rows, dtype=torch.bool))
        token = push_given(visual)
        runtime.finish(args, outputs, returned, visual, state)
        pop_given(token)
        self.keys, self.values = outputs

    def crop(self, rows):
        self.keys, self.values = (x[:, :, : x.shape[2] - rows] for x in (self.keys, self.values))


def check(cache):
    """Every crop leaves the first tokens, in the order in which they came."""
    length = cache.keys.shape[2]
    for kept in sorted({0, min(1, length), length // 2, max(length - 1, 0), length}):
        views = [x[:, :, :kept] for x in (cache.keys, cache.values)]
        keys, values = as_entered(views, (0, 1))
        assert keys.stride() == views[0].stride()
        wanted = torch.arange(kept, dtype=torch.float32)[:, None].expand(len(keys), KV_HEADS, kept, HEAD_DIM)
        assert torch.equal(keys, wanted)
        assert torch.equal(values, wanted + 0.5)


ACTIONS = ("prompt", "prompt", "text", "step", "step", "step", "crop", "copy", "hide")


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 2),
    scores=st.sampled_from(["shared", "per_kv_head"]),
    text=st.sampled_from([None, TextPolicy(budget=0.4, minimum=2), TextPolicy(budget=0.3, minimum=1, decay="none")]),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2**16)), min_size=2, max_size=12),
)
def test_rows_go_back_to_where_they_entered(batch, scores, text, actions):
    cache = Cache(batch, VisionPolicy(core=0.2, secondary=0.6, refresh=2, scores=scores), text)
    cropped = False
    for number, (action, chance) in enumerate([("prompt", 7), *actions]):
        length = cache.keys.shape[2]
        cache.seed = 100 * number + chance
        if action in ("prompt", "hide"):
            generator = torch.Generator().manual_seed(chance)
            visual = torch.rand(batch, 4 + chance % 8, generator=generator) < 0.6
            cache.call(visual.shape[1], visual, hidden=action == "hide")
        elif action == "text":
            cache.call(3)
        elif action == "step" and length:
            cache.call(1)
        elif action == "crop":
            cache.crop(chance % (length + 1))
        elif action == "copy" and not cropped:  # a copy of a view knows nothing of the memory that the view showed
            cache = copy.deepcopy(cache)
        cropped = action == "crop" or (cropped and action == "copy")
        check(cache)


@pytest.fixture
def moved():
    cache = Cache(1, VisionPolicy(core=0.2, secondary=0.6, refresh=2), TextPolicy(budget=0.3, minimum=2))
    cache.call(14, torch.tensor([[False, *[True] * 6, *[False] * 7]]))
    for _ in range(4):
        cache.call(1)
    return cache


def test_a_crop_of_moved_rows_would_keep_a_late_token(moved):
    """Otherwise the tests here prove nothing."""
    moved.crop(4)
    assert moved.keys[0, 0, :, 0].max() >= 14


def test_inference_mode_which_has_no_views():
    with torch.inference_mode():
        cache = Cache(1, VisionPolicy(core=0.2, secondary=0.6, refresh=2), TextPolicy(budget=0.3, minimum=2))
        cache.call(14, torch.tensor([[False, *[True] * 6, *[False] * 7]]))
        for _ in range(4):
            cache.call(1)
        assert not torch.equal(cache.keys[0, 0, :, 0], torch.arange(18.0))
        check(cache)


def test_a_whole_cache_whose_state_went_on_is_left_alone(moved):
    older = [moved.keys, moved.values]
    moved.call(1)
    assert all(a is b for a, b in zip(as_entered(older, (0, 1)), older, strict=True))


def test_rows_that_cannot_be_told_are_an_error(moved):
    older = [moved.keys, moved.values]
    moved.call(1)
    with pytest.raises(CacheStateError, match="cut off") as caught:
        as_entered([x[:, :, :-1] for x in older], (0, 1))
    assert caught.value.field == "cache"
    assert caught.value.remedy


def test_a_copy_has_a_state_of_its_own(moved):
    twin = copy.deepcopy(moved)
    mine, theirs = (c.runtime(decode=True, masked=False).state([c.keys, c.values]) for c in (moved, twin))
    assert mine is not None
    assert theirs is not None
    assert theirs is not mine
    moved.call(1)
    check(twin)
    twin.keys.zero_()  # by somebody else
    assert twin.runtime(decode=True, masked=False).state([twin.keys, twin.values]) is None
