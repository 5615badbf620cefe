"""Growing caches: which steps store their row in place, and that they mean what `cat` means."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.growing import has_room, reserve
from avl_fx.passes.site import Reason, Status
from avl_fx.plan import Plan
from tests.passes._decoder import Decoder, LayerSpec, caches, hidden_states, specs
from tests.passes._graphs import assert_same, counts, rewrite

HEADS, KV_HEADS, DIM, PAST = 4, 2, 8, 6


class Step(torch.nn.Module):
    """One layer's decode step; ``self_attn`` is what a decoder calls it."""

    def __init__(self, extra: str = "nothing") -> None:
        super().__init__()
        self.extra, self.layer_idx, self.is_causal = extra, 0, True

    def forward(
        self,
        query: Tensor,
        new_key: Tensor,
        new_value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        mask: Tensor | None,
    ):
        key, value = torch.cat([past_key, new_key], -2), torch.cat([past_value, new_value], -2)
        groups = HEADS // KV_HEADS
        read = (key.to(query.dtype), value.to(query.dtype))
        repeated = [x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in read]
        out = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.25)
        if self.extra == "sum of keys":
            return out, key, value, key.sum()
        if self.extra == "returned twice":
            return out, key, value, key
        if self.extra == "part of it":
            return out, key[:, :, 1:], value
        if self.extra == "sum of past":
            return out, key, value, past_key.sum()
        return out, key, value


def tensors(queries: int = 1, room: bool = True, mask: str = "none", seed: int = 0) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, DIM, generator=generator)

    past = [draw(KV_HEADS, PAST), draw(KV_HEADS, PAST)]
    rows = [draw(HEADS, queries), draw(KV_HEADS, queries), draw(KV_HEADS, queries)]
    hides = torch.rand(2, 1, queries, PAST + queries, generator=generator) > 0.3
    masks = {"none": None, "bool": hides, "additive": torch.zeros(hides.shape).masked_fill(~hides, -1e9)}
    return [*rows, *(map(reserve, past) if room else past), masks[mask]]


def run(step: Step, args: list[Tensor | None], **kwargs):
    expected = step(*[None if a is None else a.clone() for a in args])
    with torch.no_grad():
        rewritten = rewrite(step, *args, **kwargs)
    assert_same([o.contiguous() for o in rewritten.outputs], expected)
    return rewritten


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("aot", [False, True])
def test_a_step_is_exact_and_copies_nothing(mask, aot):
    args = tensors(mask=mask)
    rewritten = run(Step(), args, aot=aot)
    assert rewritten.result("append_in_place").count == 1
    left = counts(rewritten.gm)
    assert left["partitioned_decode"] == 1
    assert not left["cat"]
    key, value = rewritten.outputs[1:]
    assert key.data_ptr() == args[3].data_ptr()
    assert value.data_ptr() == args[4].data_ptr()
    assert has_room(key)
    assert has_room(value)


def test_steps_follow_each_other():
    args, step = tensors(), Step()
    for seed in range(1, 4):
        rewritten = run(step, args)
        args = [*tensors(seed=seed)[:3], *rewritten.outputs[1:], None]
        assert rewritten.result("append_in_place").count == 1


def test_symbolic_lengths():
    rewritten = run(Step(), tensors(), mark=[(3, 2), (4, 2)])
    assert rewritten.result("append_in_place").count == 1


@pytest.mark.parametrize("extra", ["sum of keys", "part of it", "sum of past"])
def test_what_else_needs_the_cache_keeps_the_copy(extra):
    rewritten = run(Step(extra), tensors())
    assert rewritten.result("append_in_place").count == 0
    assert counts(rewritten.gm)["cat"] == 2


def test_returned_twice_is_one_tensor():
    """Dynamo returns it once."""
    rewritten = run(Step("returned twice"), tensors())
    assert rewritten.outputs[1] is rewritten.outputs[3]


def test_a_cache_without_room_is_copied_and_marked():
    args = tensors(room=False)
    rewritten = run(Step(), args)
    assert rewritten.result("append_in_place").count == 0
    again = [*tensors(seed=1)[:3], *rewritten.outputs[1:], None]
    assert has_room(run(Step(), again).outputs[1])


def test_several_rows_are_a_prompt():
    rewritten = run(Step(), tensors(queries=2))
    assert rewritten.result("append_in_place").count == 0
    assert counts(rewritten.gm)["cat"] == 2
    assert all(map(has_room, rewritten.outputs[1:])), "and later steps find room"


def test_a_window_that_slides_keeps_the_copy():
    """Its cache gives up the oldest row at some step, wherever the model does that."""
    layers = specs(3, layer1=LayerSpec(is_sliding=True))
    cached = [(kind, *map(reserve, tensors)) for kind, *tensors in caches("cat", layers)]
    with torch.no_grad():
        rewritten = rewrite(Decoder(layers), hidden_states(1), [None], cached)
    assert rewritten.result("append_in_place").count == 2
    assert [s.layer for s in rewritten.ctx.sites if s.kind == "sliding"] == [1]


def test_what_a_plan_refuses_grows_and_stays_refused():
    """The last layer is the only one of its block that attends to everything: it is dense, for a reason."""
    layers = specs(3, layer0=LayerSpec(is_sliding=True), layer1=LayerSpec(is_sliding=True))
    cached = [(kind, *map(reserve, tensors)) for kind, *tensors in caches("cat", layers)]
    with torch.no_grad():
        rewritten = rewrite(Decoder(layers), hidden_states(1), [None], cached, plan=Plan.lazy([(0, 2)]))
    assert rewritten.result("append_in_place").count == 1
    assert [s.status for s in rewritten.ctx.sites] == [Status.REWRITTEN, Status.REWRITTEN, Status.REFUSED]
    assert rewritten.ctx.sites[2].reason is Reason.ANCHOR_KIND


def test_two_rows_of_one_query_keep_the_copy():
    """A layer may store more than it asks with."""
    args = tensors()
    args[1:3] = tensors(queries=2, seed=1)[1:3]
    rewritten = run(Step(), args)
    assert rewritten.result("append_in_place").count == 0
    assert counts(rewritten.gm)["cat"] == 2


@pytest.mark.parametrize("position", [0, 1, 3], ids=["query", "new row", "past rows"])
def test_gradients_need_the_copy(position):
    args = tensors()
    args[position] = (reserve(args[3]) if position == 3 else args[position]).requires_grad_()
    assert rewrite(Step(), *args).result("append_in_place").count == 0


def test_a_cache_that_autograd_knows_keeps_its_rows_without_gradients_as_well():
    args = tensors()
    args[3] = reserve(args[3]).requires_grad_()
    assert run(Step(), args).result("append_in_place").count == 0


def test_not_where_inputs_are_copied_first():
    rewritten = run(Step(), tensors(), edit=lambda ctx: setattr(ctx, "spare_rows", False))
    assert rewritten.result("append_in_place").count == 0


@pytest.mark.parametrize("cast", [(3,), (4,), (3, 4)], ids=["keys", "values", "both"])
def test_rows_that_attention_reads_in_another_dtype_keep_the_copy(cast):
    """Under autocast rotated keys are float32 and queries are not."""
    args = tensors()
    for number in {3, 4} - {*cast}:  # where past rows stand; new ones stand two places before
        args[number - 2] = args[number - 2].to(torch.bfloat16)
        args[number] = reserve(args[number].to(torch.bfloat16))
    args[0] = args[0].to(torch.bfloat16)
    rewritten = run(Step(), args)
    assert rewritten.result("append_in_place").count == 0


def test_other_dtypes_keep_the_copy():
    args = [a if a is None else a.double() for a in tensors(room=False)]
    args[3:5] = map(reserve, args[3:5])
    with torch.no_grad():
        rewritten = rewrite(Step(), *args)
    assert rewritten.result("append_in_place").count == 0
