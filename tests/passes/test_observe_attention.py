"""A prompt's last attention rows: as an eager run has them, without a trace in what the model computes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StaticCache

from avl_fx.observe import ObservedForward, observing
from avl_fx.passes.nodes import op
from avl_fx.passes.pipeline import STAGES
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, largest, through
from tests.oracle._interface import attend, attention_weights, in_charge
from tests.passes._decoder import WIDTH, Decoder, LayerSpec, caches, hidden_states, specs
from tests.passes._graphs import Rewritten, rewrite
from tests.zoo import ZooModel, get
from tests.zoo._run import prefill, prefill_and_decode

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 2e-5
"""Absolute, on probabilities."""

MODELS = (
    *(("llava", style) for style in ("sdpa", "eager")),
    *(("gemma3", style) for style in ("sdpa", "eager")),
    ("qwen2_5_vl", "sdpa"),
    ("mllama", "eager"),
    ("plain_lvlm", "eager"),
)
OBSERVED = (("llava", "sdpa"), ("gemma3", "eager"), ("qwen2_5_vl", "sdpa"), ("mllama", "eager"))
"""Of these the ones in `make test`."""
PADDED = (("llava", "sdpa"), ("gemma3", "sdpa"), ("gemma3", "eager"))


class Watching:
    """Attends as the model does, and keeps the whole softmax matrix of every layer."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, causal: bool) -> Tensor:
        self.weights[layer] = attention_weights(q, k, mask, scale, causal)
        return attend(q, k, v, mask, scale, causal)


def eager_rows(zoo: ZooModel, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[int, Tensor], Tensor]:
    """Layer -> the rows of the last real queries by an eager run, and that run's logits."""
    watching = Watching()
    with in_charge(model, list(zoo.layers(model)), watching):
        logits = prefill(model, inputs)
    positions = torch.arange(inputs["input_ids"].shape[1])
    last = torch.where(inputs["attention_mask"].bool(), positions, -1).amax(1)
    return {n: w[torch.arange(len(last)), :, last] for n, w in watching.weights.items()}, logits


def observed(model: nn.Module, inputs: dict[str, Any], compiler: str = "eager") -> tuple[ObservedForward, Tensor]:
    """The one decoder graph's rows, and the logits of the run that gave them."""
    with observing() as observer, through("avl_fx.compile", model, compiler=compiler):
        logits = prefill(model, inputs)
    (forward,) = observer.forwards
    return forward, logits


def right_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts with their padding behind them."""
    rolls = (1 - inputs["attention_mask"]).sum(1).tolist()
    return {
        name: torch.stack([row.roll(-n) for row, n in zip(tensor, rolls, strict=True)])
        if tensor.shape == inputs["input_ids"].shape
        else tensor
        for name, tensor in inputs.items()
    }


def check(zoo: ZooModel, model: nn.Module, inputs: dict[str, Any], kinds: tuple[str, ...] | None = None) -> None:
    expected, plain = eager_rows(zoo, model, inputs)
    forward, logits = observed(model, inputs)
    wanted = [n for n, kind in enumerate(kinds or zoo.attention_kinds) if kind != "cross"]
    assert list(forward.rows) == wanted
    for layer in wanted:
        rows = forward.rows[layer]
        assert rows.dtype == torch.float32
        assert rows.shape == expected[layer].shape
        assert (rows - expected[layer]).abs().max() < TOLERANCE, layer
    real = inputs["attention_mask"].bool()
    assert (logits - plain)[real].abs().max() < FLOAT32_TOLERANCE


@pytest.mark.parametrize(("name", "style"), rest_in_matrix(MODELS, OBSERVED, apart=True))
def test_rows_are_those_of_an_eager_run(name: str, style: str) -> None:
    zoo = get(name)
    model = zoo.make(attn_implementation=style)
    check(zoo, model, zoo.inputs(model, 3 if zoo.ragged else 2))


@pytest.mark.parametrize(("name", "style"), rest_in_matrix(PADDED, PADDED[2:], apart=True))
def test_padding_behind_the_prompt_does_not_count(name: str, style: str) -> None:
    zoo = get(name)
    model = zoo.make(attn_implementation=style)
    inputs = right_padded(zoo.inputs(model, 3))
    assert (inputs["attention_mask"][:, -1] == 0).any()
    if name == "gemma3":
        # The padding is longer than the window: the mask of a sliding layer says nothing of the prompt at its end.
        assert (1 - inputs["attention_mask"]).sum(1).max() > 8
    check(zoo, model, inputs)


def test_a_single_row_and_no_cache() -> None:
    zoo = get("llava")
    model = zoo.make()
    inputs = zoo.inputs(model, 1)
    expected, _ = eager_rows(zoo, model, inputs)
    forward, _ = observed(model, {**inputs, "use_cache": False})
    assert all((forward.rows[n] - expected[n]).abs().max() < TOLERANCE for n in expected)
    assert forward.visual_keys(inputs["input_ids"].shape[1]).equal(zoo.visual_positions(model, inputs))


def test_a_static_cache() -> None:
    zoo = get("llava")
    model = zoo.make()
    inputs = zoo.inputs(model, 3)
    length = inputs["input_ids"].shape[1]
    expected, _ = eager_rows(zoo, model, inputs)
    forward, _ = observed(model, {**inputs, "past_key_values": StaticCache(model.config, max_cache_len=length + 7)})
    for layer, rows in forward.rows.items():
        assert rows.shape[-1] == length + 7
        assert (rows[..., :length] - expected[layer]).abs().max() < TOLERANCE
        assert not rows[..., length:].any()
    visual = forward.visual_keys(length + 7)
    assert visual[:, :length].equal(zoo.visual_positions(model, inputs))
    assert not visual[:, length:].any()


def test_rows_are_float32_in_half_precision() -> None:
    zoo = get("llava")
    model = zoo.make(dtype=torch.bfloat16)
    forward, _ = observed(model, zoo.inputs(model, 2))
    for rows in forward.rows.values():
        assert rows.dtype == torch.float32
        assert (rows.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.full
def test_generated_code_gives_the_same_rows() -> None:
    zoo = get("llava")
    model = zoo.make()
    inputs = zoo.inputs(model, 2)
    expected, plain = eager_rows(zoo, model, inputs)
    forward, logits = observed(model, inputs, compiler="inductor")
    assert all((forward.rows[n] - expected[n]).abs().max() < TOLERANCE for n in expected)
    assert (logits - plain)[inputs["attention_mask"].bool()].abs().max() < FLOAT32_TOLERANCE


def test_outputs_are_bit_for_bit_what_they_are_without() -> None:
    zoo = get("llava")
    model = zoo.make()
    inputs = zoo.inputs(model, 3)
    _, watched = observed(model, inputs)
    with through("avl_fx.compile", model, compiler="eager"):
        assert prefill(model, inputs).equal(watched)


def test_decode_steps_are_not_observed_and_stay_what_they_are() -> None:
    zoo = get("llava")
    model = zoo.make()
    inputs = zoo.inputs(model, 3)
    expected = prefill_and_decode(model, inputs, steps=2)
    with observing() as observer, through("avl_fx.compile", model, compiler="eager"):
        run = prefill_and_decode(model, inputs, steps=2, tokens=expected.tokens)
    assert len(observer.forwards) == 1
    assert largest(run, expected) < FLOAT32_TOLERANCE


def test_nothing_is_handed_on_when_nobody_observes_any_more() -> None:
    zoo = get("llava")
    model = zoo.make()
    inputs = zoo.inputs(model, 1)
    with through("avl_fx.compile", model, compiler="eager"):
        with observing() as observer:
            first = prefill(model, inputs)
        assert prefill(model, inputs).equal(first)
    assert len(observer.forwards) == 1


# ---- graphs ----------------------------------------------------------------------------------------------------------

QUERIES = 6


def observe(layers: list[LayerSpec], *, on: bool = True, kind: str = "none", queries: int = QUERIES) -> Rewritten:
    """Run the stages on a small decoder, with one causal mask and one window."""
    model = Decoder(layers).eval().requires_grad_(False)
    keys = {"none": queries, "first": queries, "static": 12, "cat": 4 + queries}[kind]
    at, key = torch.arange(queries)[:, None] + (4 if kind in ("static", "cat") else 0), torch.arange(keys)
    causal = (key <= at)[None, None]
    masks = [causal, causal & (key > at - 3)]

    def edit(ctx: Any) -> None:
        ctx.observe = on

    cached = caches(kind, layers, 4, queries)
    memory = torch.randn(2, keys, WIDTH) if any(spec.cross for spec in layers) else None
    return rewrite(model, hidden_states(queries), masks, cached, memory, edit=edit)


@pytest.mark.parametrize("kind", ["none", "first", "static", "cat"])
def test_query_and_key_have_two_linear_layers_of_their_own(kind: str) -> None:
    found = observe(specs(3), kind=kind).ctx.observed
    assert [layer.linears for layer in found.layers] == [2, 2, 2]
    assert not found.apart
    assert not found.excluded
    assert (found.positions is not None) == (kind == "static")


def test_keys_that_something_else_reads_are_not_the_layers_own() -> None:
    found = observe(specs(3, layer1=LayerSpec(escape="tied")), kind="first").ctx.observed
    assert [layer.linears for layer in found.layers] == [2, 1, 2]


def test_the_pass_is_idle_unless_asked() -> None:
    idle = observe(specs(3), on=False)
    assert idle.ctx.observed is None
    assert idle.result("observe_attention").count == 0
    assert not [n for n in idle.gm.graph.nodes if op(n) == "last_rows"]


def test_a_decode_step_is_left_alone() -> None:
    assert observe(specs(3), kind="cat", queries=1).ctx.observed is None


def test_layers_that_attend_differently_are_apart() -> None:
    layers = specs(5, layer1=LayerSpec(is_sliding=True, mask=1), layer2=LayerSpec(head_dim=4))
    layers[3] = replace(layers[3], scale=0.5)
    found = observe(layers).ctx.observed
    assert set(found.apart) == {(a, b) for b in range(5) for a in range(b)} - {(0, 4)}
    assert "full, anchor sliding" in found.apart[1, 4]
    assert "heads, head dim" in found.apart[0, 2]
    assert "scale" in found.apart[0, 3]


def test_cross_attention_is_excluded_by_name() -> None:
    found = observe(specs(3, layer1=LayerSpec(cross=True))).ctx.observed
    assert [layer.layer for layer in found.layers] == [0, 2]
    assert found.excluded == {1: "cross-attention"}
    assert found.cross


class Capped(nn.Module):
    """A layer whose logits are soft-capped, which no pass understands, beside one that is plain."""

    is_causal = True

    def __init__(self, capped: bool) -> None:
        super().__init__()
        self.capped = capped
        self.proj = nn.Linear(16, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.proj(x).chunk(3, -1))
        logits = q @ k.transpose(-1, -2) * 0.3
        logits = 3 * torch.tanh(logits / 3) if self.capped else logits
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        out = F.softmax(logits.masked_fill(~mask, torch.finfo(x.dtype).min), dim=-1) @ v
        return x + out.transpose(1, 2).flatten(2)


class CappedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Capped(n == 1) for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_refused_site_is_excluded_with_its_reason() -> None:
    model = CappedDecoder().eval().requires_grad_(False)
    x = torch.randn(2, 5, 16)

    def edit(ctx: Any) -> None:
        ctx.observe = True

    found = rewrite(copy.deepcopy(model), x, edit=edit).ctx.observed
    assert [layer.layer for layer in found.layers] == [0, 2]
    assert "soft-capped" in found.excluded[1]
    # One projection makes query, key and value.
    assert [layer.linears for layer in found.layers] == [0, 0]


def test_it_comes_before_every_stage_that_changes_sites() -> None:
    names = [stage.__name__ for stage in STAGES]
    assert names.index("observe_attention") < min(names.index(n) for n in ("resolve_rows", "share_queries"))
