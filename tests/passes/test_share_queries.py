"""Lazy layers: what they compute, what goes, what stays, and why some are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avl_fx.dropped_keys import is_dropped
from avl_fx.passes.context import DroppedKeys
from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.share_queries import share_queries
from avl_fx.passes.site import Reason, Status
from avl_fx.plan import Plan
from tests.passes._decoder import Decoder, LayerSpec, caches, expected, hidden_states, specs
from tests.passes._graphs import Rewritten, assert_same, counts, rewrite

PAST = 4
PLAN = Plan.lazy([(1, 3)])


def causal(queries: int, keys: int, seen: int) -> Tensor:
    return (torch.arange(keys)[None] <= torch.arange(queries)[:, None] + seen - queries)[None, None]


def masks_for(kind: str, queries: int) -> list[Tensor | None]:
    seen = queries if kind in ("none", "first", "made_here") else PAST + queries
    keys = seen if kind in ("none", "first", "cat") else 12
    mask = causal(queries, keys, seen)
    other = mask.clone()
    other[..., 0] = False
    return [mask, other]


def share(
    layers: Sequence[LayerSpec],
    kind: str = "cat",
    queries: int = 3,
    plan: Plan = PLAN,
    anchors: dict[int, int] | None = None,
    **kwargs: Any,
) -> Rewritten:
    """Run the pipeline on a decoder and hold it against ``anchors`` by hand (none: everything must stay dense)."""
    model = Decoder(layers, **kwargs)
    past = 0 if kind == "made_here" else PAST
    x, masks = hidden_states(queries), masks_for(kind, queries)
    mine, theirs = (caches(kind, layers, past, queries) for _ in range(2))
    with torch.no_grad():
        rewritten = rewrite(model, x, masks, mine, plan=plan)
    hidden, stored = expected(model, anchors or {}, x, masks, theirs)
    assert_same(rewritten.outputs[:1], [hidden])
    for got, wanted in zip(rewritten.outputs[1:], stored, strict=False):
        if wanted is None:
            assert is_dropped(got)
            assert got.isnan().all()
        else:
            assert_same([got], [wanted])
    for number, (cache, wanted) in enumerate(zip(mine, theirs, strict=True)):
        if kind == "static":
            assert_same([cache[2]], [wanted[2]])
            if number in (anchors or {}):
                assert cache[1].isnan().all()
                assert is_dropped(cache[1])
            else:
                assert_same([cache[1]], [wanted[1]])
        elif kind == "one_buffer":
            assert_same([cache[1]], [wanted[1]])
    return rewritten


def actions(rewritten: Rewritten) -> list[str]:
    return [s.action for s in rewritten.sites]


LAZY = {2: 1, 3: 1}
KINDS = ("none", "first", "cat", "static", "made_here")


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_lazy_layers_attend_with_their_anchors_query_and_key(kind: str, queries: int) -> None:
    rewritten = share(specs(5), kind, queries, anchors=LAZY)
    assert actions(rewritten) == ["dense", "anchor", "lazy (anchor 1)", "lazy (anchor 1)", "dense"]
    assert rewritten.result("share_queries").count == 2
    assert not rewritten.result("share_queries").refused
    assert [s.layer for s in rewritten.sites] == [0, 1, 2, 3, 4]
    left = counts(rewritten.gm)
    assert left["linear"] == 5 * 4 - 2 * 2, "q_proj and k_proj of the lazy layers are gone"
    if kind in ("static", "made_here"):
        assert left["index_copy_"] == 2 * 5 - 2, "and so are the writes of their keys"
    if kind == "cat":
        assert left["cat"] == 2 * 5 - 2 + 2 * 3, "five layers' values, three layers' keys and their rotations"


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_says_whose_keys_are_gone(kind: str) -> None:
    rewritten = share(specs(5), kind, 1, anchors=LAZY)
    drops = rewritten.ctx.dropped_keys
    wanted: list[DroppedKeys] = []
    if kind in ("first", "cat"):
        # Outputs: hidden states, then key and value of every layer.
        wanted = [
            DroppedKeys(layer, 8, output=1 + 2 * layer, like_output=2 + 2 * layer, dtype=torch.float32)
            for layer in LAZY
        ]
    elif kind == "made_here":
        wanted = [DroppedKeys(layer, 8, output=1 + 2 * layer) for layer in LAZY]
    elif kind == "static":
        assert [d.layer for d in drops] == [2, 3]
        names = [n.name for n in rewritten.gm.graph.nodes if n.op == "placeholder"]
        for drop in drops:
            assert drop.placeholder is not None
            # `cached[layer][1]`: the keys.
            assert names[drop.placeholder] == f"l_cached_{drop.layer}_1_"
        return
    assert drops == wanted


def test_several_blocks() -> None:
    plan = Plan.lazy([(0, 1), (3, 5)])
    rewritten = share(specs(6), "cat", 1, plan, {1: 0, 4: 3, 5: 3})
    assert actions(rewritten) == ["anchor", "lazy (anchor 0)", "dense", "anchor", "lazy (anchor 3)", "lazy (anchor 3)"]
    assert counts(rewritten.gm)["linear"] == 6 * 4 - 3 * 2


def test_all_layers_lazy_but_the_first() -> None:
    rewritten = share(specs(4), "static", 1, Plan.lazy([(0, 3)]), {1: 0, 2: 0, 3: 0})
    assert counts(rewritten.gm)["linear"] == 4 * 4 - 3 * 2


def test_values_of_another_dimension_may_differ() -> None:
    layers = specs(4, layer2=LayerSpec(value_dim=12))
    assert share(layers, "cat", 1, anchors=LAZY).result("share_queries").count == 2


def test_values_made_of_new_keys_keep_their_projection() -> None:
    rewritten = share(specs(4, layer2=LayerSpec(escape="tied")), "cat", 3, anchors=LAZY)
    assert counts(rewritten.gm)["linear"] == 4 * 4 - 2 * 2 + 1


def test_an_identity_plan_changes_nothing() -> None:
    rewritten = share(specs(4), "cat", 1, Plan.identity())
    assert set(actions(rewritten)) == {"dense"}
    assert not rewritten.ctx.dropped_keys
    assert counts(rewritten.gm)["linear"] == 16


def test_markers_are_good_for_the_next_step() -> None:
    """A marker goes back in as the past of a lazy layer, which never looks at it."""
    model, x, mask = Decoder(specs(4)), hidden_states(1), [causal(1, PAST + 1, PAST + 1)] * 2
    cached = caches("cat", specs(4), PAST, 1)
    wanted = expected(model, LAZY, x, mask, cached)
    for layer in LAZY:
        poisoned = torch.full((), torch.nan).expand(cached[layer][1].shape)
        cached[layer] = ("cat", poisoned, cached[layer][2])
    with torch.no_grad():
        got = rewrite(model, x, mask, cached, plan=PLAN)
    assert_same(got.outputs[:1], wanted[:1])


# ---- refusals -------------------------------------------------------------------------------------------------------


def assert_refused(rewritten: Rewritten, layer: int, reason: Reason, others: int = 1) -> None:
    """``layer`` is refused for ``reason`` and stays dense; ``others`` layers are still lazy."""
    site = next(s for s in rewritten.sites if s.layer == layer)
    assert site.status is Status.REFUSED
    assert site.reason is reason, f"{site.reason} {site.detail}"
    assert site.action == "dense"
    result = rewritten.result("share_queries")
    assert result.refused == {str(reason): 1}
    assert result.count == others
    assert [d.layer for d in rewritten.ctx.dropped_keys] == [i for i in (2, 3) if i != layer][:others]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (LayerSpec(is_sliding=True), Reason.ANCHOR_KIND),
        (LayerSpec(mask=1), Reason.ANCHOR_MASK),
        (LayerSpec(scale=0.2), Reason.ANCHOR_SCALE),
        (LayerSpec(heads=8, head_dim=4), Reason.ANCHOR_GEOMETRY),
        (LayerSpec(kv_heads=4), Reason.ANCHOR_GEOMETRY),
        (LayerSpec(head_dim=16), Reason.ANCHOR_GEOMETRY),
        (LayerSpec(escape="norm"), Reason.KEYS_ESCAPE),
        (LayerSpec(escape="twice"), Reason.KEYS_ESCAPE),
        (LayerSpec(escape="summed"), Reason.KEYS_ESCAPE),
    ],
    ids=["sliding", "mask", "scale", "heads", "kv_heads", "head_dim", "norm", "twice", "summed"],
)
@pytest.mark.parametrize("queries", [1, 3])
def test_a_layer_that_differs_is_refused_alone(changed: LayerSpec, reason: Reason, queries: int) -> None:
    rewritten = share(specs(4, layer2=changed), "cat", queries, anchors={3: 1})
    assert_refused(rewritten, 2, reason)


def test_an_anchor_that_differs_makes_all_its_layers_refused() -> None:
    rewritten = share(specs(4, layer1=LayerSpec(is_sliding=True)), "cat", 1)
    assert rewritten.result("share_queries").refused == {str(Reason.ANCHOR_KIND): 2}
    assert not rewritten.ctx.dropped_keys


@pytest.mark.parametrize(
    ("declared", "anchors"),
    [("chunked_attention", {2: 1, 3: 1}), ("indexed_attention", {})],
    ids=["chunked", "indexed"],
)
def test_layers_that_choose_their_keys_do_not_share_a_choice(declared: str, anchors: dict[int, int]) -> None:
    """Within its budget an indexer hides nothing, and masks look alike: what a prompt shows is no proof."""
    rewritten = share([LayerSpec(declared=declared)] * 4, "cat", 1, anchors=anchors)
    assert rewritten.result("share_queries").refused == ({} if anchors else {str(Reason.ANCHOR_MASK): 2})


def test_cross_attention_is_never_lazy() -> None:
    """Its keys are those of the images, whichever layer asks."""
    layers = specs(4, layer2=LayerSpec(cross=True))
    model, x, memory = Decoder(layers), hidden_states(3), hidden_states(3, seed=9)
    masks = masks_for("none", 3)
    with torch.no_grad():
        wanted = model(x, masks, [None] * 4, memory)[0]
        dense = rewrite(model, x, masks, [None] * 4, memory)
        lazy = rewrite(model, x, masks, [None] * 4, memory, plan=PLAN)
    assert_same(dense.outputs, [wanted])
    assert [s.kind for s in lazy.sites] == ["full", "full", "cross", "full"]
    assert lazy.sites[2].reason is Reason.ANCHOR_KIND
    assert lazy.sites[3].action == "lazy (anchor 1)"


def test_a_layer_without_a_number_is_refused() -> None:
    rewritten = share(specs(4), "cat", 1, listed=False)
    assert {s.layer for s in rewritten.sites} == {None}
    assert rewritten.result("share_queries").refused == {str(Reason.LAYER_UNKNOWN): 4}


def test_an_anchor_in_another_graph() -> None:
    """A graph that holds one layer: Dynamo broke between the layers."""
    model, x = Decoder(specs(4)), hidden_states(1)
    cache, mask = caches("cat", specs(4), PAST, 1)[2], causal(1, PAST + 1, PAST + 1)
    layer = model.layers[2]
    with torch.no_grad():
        wanted, _ = layer(x, mask, cache, None)
        rewritten = rewrite(layer, x, mask, cache, None, plan=PLAN)
    assert_same(rewritten.outputs[:1], [wanted])
    assert rewritten.site.layer == 2
    assert rewritten.site.reason is Reason.ANCHOR_ELSEWHERE
    assert not rewritten.ctx.dropped_keys


def test_a_layer_that_runs_twice_is_no_anchor() -> None:
    """A decoder that loops over its layers; each pass has a cache of its own."""

    class Looped(Decoder):
        def each(self) -> list[Any]:
            return [self.layers[number] for number in (0, 1, 2, 1, 2, 3)]

    model, x, masks = Looped(specs(4)), hidden_states(3), masks_for("cat", 3)
    mine, theirs = (caches("cat", specs(6), PAST, 3) for _ in range(2))
    with torch.no_grad():
        wanted = model(x, masks, theirs)
        rewritten = rewrite(model, x, masks, mine, plan=PLAN)
    assert_same(rewritten.outputs[:1], [wanted[0]])
    assert [s.layer for s in rewritten.sites] == [0, 1, 2, 1, 2, 3]
    refused = {(s.layer, s.reason, s.detail) for s in rewritten.sites if s.status is Status.REFUSED}
    why = (Reason.LAYER_UNKNOWN, "2 calls share the number of its anchor")
    assert refused == {(2, *why), (3, *why)}


@pytest.mark.parametrize("arguments", [((-1,), {}), ((), {"dim": -1})], ids=["by position", "by name"])
def test_an_anchor_that_is_no_recognised_site(arguments: Any) -> None:
    class Capped(Decoder):
        """Its second layer caps its logits."""

        def __init__(self) -> None:
            super().__init__(specs(4))
            self.layers[1].attention.attend = self.capped

        def capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            attention = self.layers[1].attention
            key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
            logits = torch.tanh(query @ key.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
            weights = torch.softmax(logits, *arguments[0], **arguments[1])
            return attention.o_proj((weights @ value).transpose(1, 2).flatten(2))

    model, x, masks = Capped(), hidden_states(1), masks_for("cat", 1)
    with torch.no_grad():
        wanted = model(x, masks, caches("cat", specs(4), PAST, 1))[0]
        rewritten = rewrite(model, x, masks, caches("cat", specs(4), PAST, 1), plan=PLAN)
    assert_same(rewritten.outputs[:1], [wanted])
    assert rewritten.reasons == [None, Reason.SOFTCAP, Reason.ANCHOR_REFUSED, Reason.ANCHOR_REFUSED]


def test_keys_and_values_in_one_buffer_stay() -> None:
    """Filling the buffer with NaN would take the values along."""
    rewritten = share(specs(4), "one_buffer", 1)
    assert rewritten.result("share_queries").refused == {str(Reason.KEYS_ESCAPE): 2}
    assert counts(rewritten.gm)["index_copy_"] == 8


class Borrowing(Decoder):
    """A later layer reads the keys that layer 2 has stored, as models with shared KV caches do."""

    def forward(self, x: Tensor, masks: Any, cached: Any) -> Any:
        x, stored, _ = super().forward(x, masks, cached)
        borrowed = self.layers[3].attention.attend(
            self.layers[3].attention.project(x, x)[0], cached[2][1], cached[2][2], masks[0]
        )
        return x + borrowed, stored


def test_keys_that_another_layer_reads_stay() -> None:
    model, x, masks = Borrowing(specs(4)), hidden_states(1), masks_for("static", 1)
    mine, theirs = (caches("static", specs(4), PAST, 1) for _ in range(2))
    with torch.no_grad():
        dense = expected(model, {3: 1}, x, masks, theirs)[0]
        rewritten = rewrite(model, x, masks, mine, plan=PLAN)
        attention = model.layers[3].attention
        wanted = dense + attention.attend(attention.project(dense, dense)[0], theirs[2][1], theirs[2][2], masks[0])
    assert_same(rewritten.outputs[:1], [wanted])
    assert rewritten.sites[2].reason is Reason.KEYS_ESCAPE
    assert_same([mine[2][1]], [theirs[2][1]])


@pytest.mark.parametrize("mode", ["vla", "vla_scores"])
def test_keys_that_a_layer_reads_in_its_own_way_are_not_mixed_with_others(mode: Any) -> None:
    class Capped(Borrowing):
        """The layer that borrows caps its logits: it is dense, on keys that have to be those that it knows."""

        def forward(self, x: Tensor, masks: Any, cached: Any) -> Any:
            x, stored, _ = Decoder.forward(self, x, masks, cached)
            query = self.layers[3].attention.project(x, x)[0]
            key, value = (t.repeat_interleave(2, dim=1) for t in cached[2][1:3])
            weights = torch.softmax(torch.tanh(query @ key.transpose(2, 3)), dim=-1)
            return x + (weights @ value).transpose(1, 2).flatten(2), stored

    x, masks = hidden_states(3), masks_for("static", 3)
    with torch.no_grad():
        rewritten = rewrite(
            Capped(specs(4)),
            x,
            masks,
            caches("static", specs(4), PAST, 3),
            plan=Plan.lazy([(1, 3)], mode),
            stages=(find_attention, share_queries),
        )
    assert rewritten.reasons == [None, None, Reason.KEYS_ESCAPE, None, Reason.SOFTCAP]
    assert rewritten.sites[3].action.startswith("lazy")


class Store(nn.Module):
    """Attention over a cache that keeps keys in 8 bits, latents of which keys are made anew, or more than is read."""

    is_causal = True

    def __init__(self, number: int, kept: str) -> None:
        super().__init__()
        self.layer_idx, self.kept = number, kept
        self.q_proj, self.down, self.up, self.v_proj = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        new = self.down(x)
        if "8 bits" in self.kept:
            stored = torch.cat([past, (new * 16).round().to(torch.int8)], dim=1)
            rows = values = stored.float() / 16
        else:
            rows = values = stored = torch.cat([past, new], dim=1)
        if "latents" in self.kept:
            rows = self.up(rows)
        elif self.kept == "more":
            rows = torch.cat([stored[:, :2], stored[:, 4:]], dim=1)
            mask, values = mask[:, 2:], stored[:, 2:]
        query, key, value = (
            t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (self.q_proj(x), rows, self.v_proj(values))
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + out.transpose(1, 2).flatten(2), stored


@pytest.mark.parametrize(
    ("kept", "reason"),
    [("latents", None), ("latents in 8 bits", None), ("more", None), ("in 8 bits", Reason.NOT_THE_CACHE)],
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_copies_of_what_is_stored_are_not_inherited(kept: str, reason: Reason | None, dynamic: bool | None) -> None:
    """The prompt's graph shows that such keys escape, so its layers are dense, and so are those of the steps behind."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Store(number, kept) for number in range(2))

        def forward(self, x: Tensor, mask: Tensor, *past: Tensor) -> list[Tensor]:
            stored = []
            for layer, before in zip(self.layers, past, strict=True):
                x, after = layer(x, mask, before)
                stored.append(after)
            return [x, *stored]

    x, mask, past = torch.randn(2, 3, 16), torch.ones(3, 9, dtype=torch.bool), torch.randn(2, 6, 16)
    past = past.mul(16).to(torch.int8) if "8 bits" in kept else past
    with torch.no_grad():
        rewritten = rewrite(
            Layers(),
            x,
            mask,
            past,
            past.clone(),
            plan=Plan.lazy([(0, 1)]),
            stages=(find_attention, share_queries),
            dynamic=dynamic,
        )
    assert rewritten.reasons == [None, reason]
    assert rewritten.sites[1].action == ("dense" if reason else "lazy (anchor 0)")


class Transposing(Decoder):
    """Keys are returned as ``[batch, heads, dim, keys]``, values are not."""

    def forward(self, x: Tensor, masks: Any, cached: Any) -> Any:
        x, stored, _ = super().forward(x, masks, cached)
        return x, [t.transpose(2, 3) if i % 2 == 0 else t for i, t in enumerate(stored)]


class Upcasting(Decoder):
    """Keys are returned in another dtype than the values."""

    def forward(self, x: Tensor, masks: Any, cached: Any) -> Any:
        x, stored, _ = super().forward(x, masks, cached)
        return x, [t.double() if i % 2 == 0 else t for i, t in enumerate(stored)]


class Peeking(Decoder):
    """Only the newest key is returned."""

    def forward(self, x: Tensor, masks: Any, cached: Any) -> Any:
        x, stored, _ = super().forward(x, masks, cached)
        return x, [t[:, :, -1:] if i % 2 == 0 else t for i, t in enumerate(stored)]


@pytest.mark.parametrize("model_class", [Transposing, Peeking])
def test_keys_that_no_marker_can_stand_for_stay(model_class: type[Decoder]) -> None:
    """A marker has the shape of the values."""
    model, x, masks = model_class(specs(4)), hidden_states(1), masks_for("cat", 1)
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(x, masks, caches("cat", specs(4), PAST, 1)))
        rewritten = rewrite(model, x, masks, caches("cat", specs(4), PAST, 1), plan=PLAN)
    assert rewritten.result("share_queries").refused == {str(Reason.KEYS_ESCAPE): 2}
    assert_same(rewritten.outputs, wanted)


def test_a_marker_has_the_dtype_of_the_keys() -> None:
    model, x, masks = Upcasting(specs(4)), hidden_states(1), masks_for("cat", 1)
    with torch.no_grad():
        rewritten = rewrite(model, x, masks, caches("cat", specs(4), PAST, 1), plan=PLAN)
    keys, values = rewritten.outputs[1::2], rewritten.outputs[2::2]
    assert [is_dropped(key) for key in keys] == [False, False, True, True]
    assert {key.dtype for key in keys} == {torch.float64}
    assert {value.dtype for value in values} == {torch.float32}


def test_the_anchors_keys_must_not_change_before_the_lazy_layer() -> None:
    class Overwriting(Decoder):
        def forward(self, x: Tensor, masks: Any, cached: Any) -> Any:
            hidden = x
            for number, layer in enumerate(self.layers):
                hidden, _ = layer(hidden, masks[0], cached[number], None)
                if number == 2:
                    cached[1][1].zero_()
            return hidden

    model, x, masks = Overwriting(specs(4)), hidden_states(1), masks_for("static", 1)
    with torch.no_grad():
        wanted = expected(model, {2: 1}, x, masks, caches("static", specs(4), PAST, 1))[0]
        rewritten = rewrite(model, x, masks, caches("static", specs(4), PAST, 1), plan=PLAN)
    assert_same(rewritten.outputs, [wanted])
    assert rewritten.sites[3].reason is Reason.MUTATION
    assert rewritten.sites[2].action == "lazy (anchor 1)"


def test_sharing_under_symbolic_lengths() -> None:
    """Queries of a prefill and the past of a decode step are symbolic; blocks share all the same."""
    model = Decoder(specs(4))
    for queries in (1, 3):
        x, masks = hidden_states(queries), masks_for("cat", queries)
        wanted = expected(model, LAZY, x, masks, caches("cat", specs(4), PAST, queries))
        with torch.no_grad():
            rewritten = rewrite(model, x, masks, caches("cat", specs(4), PAST, queries), plan=PLAN, dynamic=True)
        assert_same(rewritten.outputs[:1], wanted[:1])
        assert rewritten.result("share_queries").count == 2, rewritten.result("share_queries").refused
        assert rewritten.new_guards <= 4, "one guard for each layer's scale"
