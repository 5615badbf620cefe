"""Latent attention in every spelling attends to its latents; what only resembles it keeps its keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from avl_fx.passes.absorb_latents import absorb_latents
from avl_fx.passes.context import PassContext
from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.latents import latents_of
from avl_fx.passes.pipeline import STAGES
from avl_fx.passes.site import PassResult
from avl_fx.plan import Plan
from tests._compiler import needs_compiler
from tests.passes._graphs import TOLERANCE, Mark, Rewritten, check, counts, rewrite

HEADS, NOPE, ROPE, VALUE, RANK, PAST = 4, 8, 4, 6, 20, 9

Expand = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Latents ``[batch, 1, keys, RANK]``, rotated keys, weight -> keys and values of all heads."""


def heads(latents: Tensor, weight: Tensor) -> Tensor:
    both = F.linear(latents, weight)
    return both.view(latents.shape[0], latents.shape[2], -1, weight.shape[0] // HEADS).transpose(1, 2)


def copied(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers writes it."""
    nope, value = torch.split(heads(latents, weight), [NOPE, VALUE], dim=-1)
    key = nope.new_empty(*nope.shape[:-1], NOPE + ROPE)
    key[..., :NOPE].copy_(nope)
    key[..., NOPE:].copy_(rotated.expand(-1, HEADS, -1, -1))
    return key, value


def assigned(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepSeek's own code writes it."""
    nope, value = heads(latents, weight).split([NOPE, VALUE], -1)
    key = latents.new_empty(*nope.shape[:-1], NOPE + ROPE)
    key[:, :, :, NOPE:] = rotated
    key[:, :, :, :NOPE] = nope
    return key, value


def joined(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = heads(latents, weight).split([NOPE, VALUE], -1)
    return torch.cat([nope, rotated.expand(-1, HEADS, -1, -1)], -1), value


def rotated_first(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = heads(latents, weight).split([NOPE, VALUE], -1)
    return torch.cat((rotated.expand(-1, HEADS, -1, -1), nope), dim=3), value


def sliced(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    both = F.linear(latents, weight).reshape(latents.shape[0], -1, HEADS, NOPE + VALUE).transpose(2, 1)
    return torch.cat([both[..., :NOPE], rotated.expand(-1, HEADS, -1, -1)], -1), both[..., NOPE:]


def apart(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of two projections, as in DeepSeek-V2's first release."""
    by_head = weight.unflatten(0, (HEADS, -1))
    keys, values = (part.flatten(0, 1) for part in (by_head[:, :NOPE], by_head[:, NOPE:]))
    key = torch.cat([heads(latents, keys), rotated.expand(-1, HEADS, -1, -1)], -1)
    return key, heads(latents, values)


def first_rows(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    key, value = copied(latents, rotated, weight)
    return key[:, :, :-1], value[:, :, :-1, :]


def last_rows(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    key, value = joined(latents, rotated, weight)
    return key[:, :, 1:], value[:, :, 1:]


SPELLINGS: dict[str, Expand] = {
    "copied": copied,
    "assigned": assigned,
    "joined": joined,
    "rotated first": rotated_first,
    "sliced": sliced,
    "apart": apart,
    "first rows": first_rows,
    "last rows": last_rows,
}


def turned(keys_and_values: Expand, change: Callable[[Tensor], Tensor]) -> Expand:
    """``keys_and_values`` of other latents."""
    return lambda latents, rotated, weight: keys_and_values(change(latents), rotated, weight)


def biased(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    both = F.linear(latents, weight, weight[:, 0]).view(latents.shape[0], -1, HEADS, NOPE + VALUE).transpose(1, 2)
    nope, value = both.split([NOPE, VALUE], -1)
    return torch.cat([nope, rotated.expand(-1, HEADS, -1, -1)], -1), value


def scaled(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    key, value = joined(latents, rotated, weight)
    return key, value * 2


def own_rotations(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = heads(latents, weight).split([NOPE, VALUE], -1)
    return torch.cat([nope, rotated * torch.arange(HEADS)[:, None, None]], -1), value


def heads_within(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The projection holds all keys first, then all values: heads are no rows of it."""
    both = F.linear(latents, weight)
    nope, value = both.split([HEADS * NOPE, HEADS * VALUE], -1)
    nope, value = (x.view(x.shape[0], -1, HEADS, x.shape[-1] // HEADS).transpose(1, 2) for x in (nope, value))
    return torch.cat([nope, rotated.expand(-1, HEADS, -1, -1)], -1), value


def interleaved(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    both = F.linear(latents, weight).view(latents.shape[0], -1, NOPE + VALUE, HEADS).permute(0, 3, 1, 2)
    nope, value = both.split([NOPE, VALUE], -1)
    return torch.cat([nope, rotated.expand(-1, HEADS, -1, -1)], -1), value


def written_again(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What was read is no longer there when attention comes."""
    key, value = joined(latents, rotated, weight)
    latents.mul_(2)
    return key, value


def overlapping(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = heads(latents, weight).split([NOPE, VALUE], -1)
    key = nope.new_zeros(*nope.shape[:-1], NOPE + ROPE)
    key[..., :NOPE].copy_(nope)
    key[..., NOPE - 1 :].copy_(F.pad(rotated, (1, 0)).expand(-1, HEADS, -1, -1))
    return key, value


def partly_written(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = heads(latents, weight).split([NOPE, VALUE], -1)
    key = nope.new_zeros(*nope.shape[:-1], NOPE + ROPE)
    key[..., :NOPE].copy_(nope)
    key[..., NOPE:-1].copy_(rotated[..., 1:].expand(-1, HEADS, -1, -1))
    return key, value


def written_twice(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    key, value = copied(latents, rotated, weight)
    key[..., :NOPE].mul_(2)
    return key, value


def repeated(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rotated key of the first row stands behind every key."""
    nope, value = heads(latents, weight).split([NOPE, VALUE], -1)
    key = nope.new_zeros(*nope.shape[:-1], NOPE + ROPE)
    key[..., :NOPE].copy_(nope)
    key[..., NOPE:].copy_(rotated[:, :, :1])
    return key, value


LOOKALIKES: dict[str, Expand] = {
    "one row for all": repeated,
    "with a bias": biased,
    "values scaled": scaled,
    "each head has rotations of its own": own_rotations,
    "all keys, then all values": heads_within,
    "heads in the last place": interleaved,
    "latents are written again": written_again,
    "copies that overlap": overlapping,
    "copies that leave a hole": partly_written,
    "keys are written again": written_twice,
}


class Step(nn.Module):
    """One layer's attention over latents and rotated keys that grow by `cat`, and are returned."""

    def __init__(self, expand: Expand) -> None:
        super().__init__()
        self.expand, self.layer_idx, self.is_causal = expand, 0, True

    def store(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past, new], 2)

    def forward(
        self,
        query: Tensor,
        new_latents: Tensor,
        new_rotated: Tensor,
        latents: Tensor,
        rotated: Tensor,
        weight: Tensor,
        mask: Tensor | None = None,
    ) -> Any:
        latents, rotated = self.store(latents, new_latents), self.store(rotated, new_rotated)
        key, value = self.expand(latents, rotated, weight)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4), (latents, rotated)


class Layer(nn.Module):
    """Around a step: Dynamo then says which module attends, and the passes can ask it."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.self_attn = step

    def forward(self, *args: Any) -> Any:
        return self.self_attn(*args)


LENGTHS, BATCHES = [(3, 2), (4, 2)], [(i, 0) for i in range(5)]
"""Where `arguments` have the length of the cache, and the batch."""


def arguments(
    batch: int = 2, queries: int = 1, past: int = PAST, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Query, the new rows, those of the cache, and the weight."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    cached = [draw(batch, 1, n, dim) for n in (queries, past) for dim in (RANK, ROPE)]
    return draw(batch, HEADS, queries, NOPE + ROPE), *cached, draw(HEADS * (NOPE + VALUE), RANK) * RANK**-0.5


def absorbed(rewritten: Rewritten) -> int:
    return rewritten.result("absorb_latents").count


@pytest.mark.parametrize("mark", [[], LENGTHS, LENGTHS + BATCHES], ids=["fixed", "length", "length and batch"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_are_absorbed(spelling: str, mark: list[Mark]) -> None:
    found = check(Layer(Step(SPELLINGS[spelling])), *arguments(), mark=mark, aot=True)
    assert absorbed(found) == 1
    assert (found.site.latent, found.site.kv_heads, found.site.cache) == (True, 1, "dynamic")
    assert (found.site.head_dim, found.site.value_dim) == (RANK + ROPE, RANK)
    # Nothing as long as the cache goes through the projection any more.
    assert "linear" not in counts(found.gm)
    assert not found.new_guards


@pytest.mark.parametrize("lookalike", LOOKALIKES)
def test_lookalikes_are_not(lookalike: str) -> None:
    found = check(Layer(Step(LOOKALIKES[lookalike])), *arguments())
    assert absorbed(found) == 0
    assert not found.site.latent


def test_a_prompt_keeps_its_own_way() -> None:
    """As many queries as keys expand them for less; but what its cache holds is known."""
    found = check(Layer(Step(copied)), *arguments(queries=5))
    assert absorbed(found) == 0
    assert (found.site.latent, found.site.kv_heads, found.site.cache) == (True, HEADS, "dynamic")


@pytest.mark.parametrize("expand", [first_rows, last_rows])
def test_a_prompt_that_takes_rows_of_their_own_has_no_whole_cache(expand: Expand) -> None:
    """Positions of keys are those of a cache from its first row on, or they are others."""
    found = check(Layer(Step(expand)), *arguments(queries=5), stages=(find_attention, absorb_latents))
    assert found.site.latent
    assert (latents_of(found.site) is None) == (expand is last_rows)


def test_calibration_knows_that_a_lazy_layer_stores_all_of_them() -> None:
    """They make its values, too."""

    def observe(ctx: PassContext) -> None:
        ctx.observe = True

    found = rewrite(Layer(Step(copied)), *arguments(queries=5), edit=observe)
    assert found.ctx.observed is not None
    (layer,) = found.ctx.observed.layers
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim) == (HEADS, 1, 0, RANK + ROPE)


def test_what_has_a_gradient_keeps_its_own_way() -> None:
    given = arguments()
    given[-1].requires_grad_()
    found = rewrite(Layer(Step(copied)), *given)
    assert absorbed(found) == 0
    with torch.no_grad():
        assert absorbed(check(Layer(Step(copied)), *given)) == 1


def test_rows_that_do_not_share_a_dtype_keep_their_own_way() -> None:
    def widened(latents: Tensor, rotated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        key, value = joined(latents.float(), rotated.float(), weight.float())
        return key.to(latents.dtype), value.to(latents.dtype)

    found = check(Layer(Step(widened)), *arguments(dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert absorbed(found) == 0


class Static(Step):
    """Over a buffer that is written in place."""

    def store(self, past: Tensor, new: Tensor) -> Tensor:
        return past.index_copy_(2, torch.tensor([PAST - 1]), new)


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "of each head"])
@pytest.mark.parametrize("step", [Step, Static])
def test_masks_and_static_buffers(step: type[Step], mask: str) -> None:
    keys = PAST + (step is Step)
    visible = torch.rand(2, HEADS if mask == "of each head" else 1, 1, keys) > 0.3
    visible[..., -1] = True
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    found = check(Layer(step(copied)), *arguments(), {"none": None, "bool": visible}.get(mask, bias), aot=step is Step)
    assert absorbed(found) == 1
    assert found.site.cache == ("dynamic" if step is Step else "static")


class Two(nn.Module):
    """Two layers, each with a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(Step(copied)) for _ in range(2))
        for number, layer in enumerate(self.layers):
            layer.self_attn.layer_idx = number

    def forward(self, query: Tensor, latents: Tensor, rotated: Tensor, *cached: Tensor) -> Any:
        both = [layer(query, latents, rotated, *cached[3 * i : 3 * i + 3]) for i, layer in enumerate(self.layers)]
        return [out for out, _ in both], [kept for _, kept in both]


def test_a_lazy_layer_takes_absorbed_queries_and_latents_of_its_anchor() -> None:
    """Its values are still made of latents of its own, by its own projection."""
    query, *new, latents, rotated, weight = arguments()
    pasts, weights = ((latents, rotated), (latents.flip(2), rotated.flip(2))), (weight, weight.flip(0))
    found = rewrite(Two(), query, *new, *pasts[0], weights[0], *pasts[1], weights[1], plan=Plan.lazy([(0, 1)]))
    assert absorbed(found) == 2
    assert [site.anchor for site in found.sites] == [None, 0]
    stored = [[torch.cat(both, 2) for both in zip(past, new, strict=True)] for past in pasts]
    key = copied(*stored[0], weights[0])[0]
    for number in range(2):
        value = copied(*stored[number], weights[number])[1]
        wanted = F.scaled_dot_product_attention(query, key, value, scale=0.4)
        assert torch.allclose(found.outputs[number], wanted, atol=TOLERANCE[torch.float32])


@needs_compiler
@pytest.mark.usefixtures("short_caches_too")
def test_a_lazy_block_shares_the_logits_of_whole_keys() -> None:
    query, *new, latents, rotated, weight = arguments()
    given = query, *new, latents, rotated, weight, latents.flip(2), rotated.flip(2), weight.flip(0)
    found = rewrite(Two(), *given, plan=Plan.lazy([(0, 1)]))
    assert [site.inherits for site in found.sites] == ["none", "all"]


@needs_compiler
@pytest.mark.usefixtures("short_caches_too")
@pytest.mark.parametrize("step", [Step, Static])
def test_a_step_on_a_cpu_reads_each_row_once(step: type[Step]) -> None:
    found = check(Layer(step(copied)), *arguments())
    assert counts(found.gm)["latent_decode"] == 1


def on_a_gpu(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """A stage after which sites look as if their tensors were on one."""
    for site in ctx.sites:
        site.device = "cuda"
    return PassResult("on_a_gpu")


@pytest.mark.parametrize(
    ("step", "room", "cats"),
    [(Step, 0, 3), (Step, 5, 1), (Static, 0, 1)],
    ids=["dynamic", "dynamic, with room", "static"],
)
def test_a_step_on_a_gpu_reads_each_row_once(step: type[Step], room: int, cats: int) -> None:
    """Fused kernels take no latents; what they are left with would put both parts of a key together at each step."""
    stages = tuple(each for stage in STAGES for each in ((stage, on_a_gpu) if stage is find_attention else (stage,)))
    query, *new, latents, rotated, weight = arguments()
    stored = (torch.cat([x, x.new_zeros(2, 1, room, x.shape[3])], 2)[:, :, :PAST] for x in (latents, rotated))
    found = check(Layer(step(copied)), query, *new, *stored, weight, stages=stages)
    names = counts(found.gm)
    assert names["latent_decode"] == 1
    assert names["cat"] == cats, "of queries, and of cache and new row where that has no room yet"
    assert names["scaled_dot_product_attention"] == 0


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(SPELLINGS)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 3),
    st.sampled_from([1, 1, 1, 4]),
    st.integers(1, 20),
    st.sampled_from([[], LENGTHS, LENGTHS + BATCHES]),
)
def test_any_of_them_means_what_it_meant(
    spelling: str, dtype: torch.dtype, batch: int, queries: int, past: int, mark: list[Mark]
) -> None:
    given = arguments(batch, queries, past, dtype)
    found = check(Layer(Step(SPELLINGS[spelling])), *given, dtype=dtype, mark=mark)
    assert absorbed(found) == (queries == 1)
