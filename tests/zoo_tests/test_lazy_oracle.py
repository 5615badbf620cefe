"""The lazy oracle does nothing when nothing is lazy, and exactly what it says when something is."""

import pytest
import torch

from benchmarks._difference import largest_difference
from tests.oracle import lazy_oracle
from tests.oracle._interface import attend
from tests.zoo import get, zoo_names
from tests.zoo._run import prefill, prefill_and_decode
from tests.zoo_tests._models import model_of

TOLERANCE = 1e-4
VISIBLE = 0.1


pytestmark = pytest.mark.usefixtures("one_thread")


def oracle_for(zoo, model, blocks):
    return lazy_oracle(model, blocks, zoo.decoder_prefix, zoo.attention_kinds)


def pairs(zoo):
    """Neighbouring layers of the same kind that may be anchor and lazy, first to last."""
    kinds = zoo.attention_kinds
    return [(i, i + 1) for i in range(len(kinds) - 1) if kinds[i] == kinds[i + 1] != "cross"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", zoo_names())
def test_without_blocks_it_is_the_stock_model(name, implementation):
    zoo, model = get(name), model_of(name, implementation)
    inputs = zoo.inputs(model, batch=2)
    for cache in zoo.caches:
        stock = prefill_and_decode(model, inputs, cache)
        with oracle_for(zoo, model, []) as oracle:
            run = prefill_and_decode(model, inputs, cache, tokens=stock.tokens)
        assert largest_difference(run, stock) < TOLERANCE
        assert not oracle.lazy
        assert not oracle.dense
        assert oracle.calls == 0
    after = prefill_and_decode(model, inputs, "dynamic")
    assert largest_difference(after, prefill_and_decode(model, inputs, "dynamic")) == 0  # and it leaves no trace


@pytest.mark.parametrize("name", zoo_names())
def test_a_block_is_visible_in_every_step_and_alike_in_every_cache(name):
    zoo, model = get(name), model_of(name)
    for batch, block in [(1, pairs(zoo)[0]), (2, pairs(zoo)[-1]), (2, (0, zoo.decoder_layers - 1))]:
        inputs = zoo.inputs(model, batch=batch)
        dense = prefill_and_decode(model, inputs)
        runs = []
        for cache in zoo.caches:
            with oracle_for(zoo, model, [block]) as oracle:
                runs.append(prefill_and_decode(model, inputs, cache, tokens=dense.tokens))
            assert oracle.calls == 5 * len(oracle.lazy) > 0
        for lazy, stock in zip(runs[0], dense, strict=True):
            assert (lazy - stock).abs().amax(1).min() > VISIBLE  # in every row
        assert all(largest_difference(runs[0], run) < TOLERANCE for run in runs[1:])


@torch.no_grad()
def make_alike(zoo, model, anchor, lazy):
    """Give the lazy layer the anchor's queries and keys by construction: the anchor adds nothing to the residual
    stream, and the lazy layer's norm and projections are the anchor's. Values stay its own."""
    layers = zoo.layers(model)
    weights = dict(layers[anchor].named_parameters())
    for key, parameter in layers[lazy].named_parameters():
        if any(part in key for part in ("input_layernorm", "norm1", "q_proj", "k_proj", "q_norm", "k_norm")):
            parameter.copy_(weights[key])
    for key, parameter in weights.items():
        if any(part in key for part in ("o_proj", "down_proj", "mlp.2")):
            parameter.zero_()


@pytest.mark.parametrize("name", zoo_names())
def test_equals_dense_where_anchor_and_lazy_layer_agree_by_construction(name):
    zoo = get(name)
    model = zoo.make()
    anchor, lazy = pairs(zoo)[-1]
    make_alike(zoo, model, anchor, lazy)
    inputs = zoo.inputs(model, batch=3)
    for cache in zoo.caches:
        dense = prefill_and_decode(model, inputs, cache)
        with oracle_for(zoo, model, [(anchor, lazy)]) as oracle:
            run = prefill_and_decode(model, inputs, cache, tokens=dense.tokens)
        assert oracle.lazy == {lazy: anchor}
        assert largest_difference(run, dense) < TOLERANCE, cache


@pytest.mark.parametrize("name", zoo_names())
def test_a_lazy_layer_uses_its_values_and_not_its_queries_or_keys(name):
    zoo = get(name)
    model = zoo.make()
    anchor, lazy = pairs(zoo)[0]
    inputs = zoo.inputs(model, batch=2)
    tokens = prefill_and_decode(model, inputs).tokens

    def run():
        with oracle_for(zoo, model, [(anchor, lazy)]):
            return prefill_and_decode(model, inputs, tokens=tokens)

    layers, before = zoo.layers(model), run()
    for layer, projections, matters in [
        (lazy, ("q_proj", "k_proj"), False),
        (lazy, ("v_proj",), True),
        (anchor, ("q_proj",), True),
        (anchor, ("k_proj",), True),
    ]:
        for key, parameter in layers[layer].named_parameters():
            if any(part in key for part in projections):
                parameter.neg_()
        after = run()
        changed = largest_difference(after, before)
        assert changed > VISIBLE if matters else changed == 0, (layer, projections)
        before = after


def test_a_layer_of_another_kind_stays_dense():
    zoo, model = get("gemma3"), model_of("gemma3")
    with oracle_for(zoo, model, [(0, 3)]) as oracle:
        prefill(model, zoo.inputs(model))
    assert oracle.lazy == {1: 0}
    assert set(oracle.dense) == {2, 3}
    assert oracle.dense[2] == "kind full, anchor sliding"


def test_cross_attention_is_neither_lazy_nor_an_anchor():
    zoo, model = get("mllama"), model_of("mllama")
    inputs = zoo.inputs(model)
    dense = prefill(model, inputs)
    with oracle_for(zoo, model, [(1, 3), (4, 5)]) as oracle:
        assert (prefill(model, inputs) - dense).abs().max() < TOLERANCE
    assert not oracle.lazy
    assert set(oracle.dense) == {1, 2, 3, 4, 5}
    with oracle_for(zoo, model, [(0, 3)]) as oracle:
        assert (prefill(model, inputs) - dense).abs().max() > VISIBLE
    assert oracle.lazy == {2: 0, 3: 0}
    assert set(oracle.dense) == {1}


def test_a_layer_of_another_shape_stays_dense():
    zoo = get("plain_lvlm")
    model = zoo.make()
    inputs = zoo.inputs(model)
    layer = zoo.layers(model)[2]
    for projection in (layer.k_proj, layer.v_proj):
        projection.weight.data = torch.cat([projection.weight.data] * 2)  # 4 KV heads where the others have 2
    with oracle_for(zoo, model, []):
        dense = prefill(model, inputs)
    with oracle_for(zoo, model, [(1, 2)]) as oracle:
        assert torch.equal(prefill(model, inputs), dense)
    assert not oracle.lazy
    assert oracle.dense[2].startswith("q [1, 4, ")


@pytest.mark.parametrize("blocks", [[(0, 4)], [(-1, 1)], [(2, 1)], [(0, 2), (2, 3)]])
def test_impossible_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks"), lazy_oracle(model_of("llava"), blocks):
        pass


def test_two_models_at_once_and_an_exception_inside():
    zoo, one, two = get("llava"), model_of("llava"), get("llava").make()
    inputs = zoo.inputs(one)
    dense = prefill(one, inputs)
    with oracle_for(zoo, one, [(0, 1)]), oracle_for(zoo, two, [(2, 3)]):
        first, second = prefill(one, inputs), prefill(two, inputs)
    assert min((first - dense).abs().max(), (second - dense).abs().max(), (first - second).abs().max()) > VISIBLE
    with pytest.raises(RuntimeError, match="inside"), oracle_for(zoo, one, [(0, 1)]):
        raise RuntimeError("inside")
    assert torch.equal(prefill(one, inputs), dense)


def test_attention_math_against_sdpa_in_float64():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    more_k, more_v = torch.cat([k, k], 2), torch.cat([v, v], 2)
    mask = torch.rand(2, 1, 5, 10, generator=generator) > 0.4
    mask[..., 0] = True
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for got, want in [
        (attend(q, more_k, more_v, mask, 0.3), sdpa(q, more_k, more_v, mask, scale=0.3, enable_gqa=True)),
        (attend(q, k, v, None, 0.3, causal=True), sdpa(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)),
        # a prompt in a static cache, which is longer: counted from the upper left
        (attend(q, more_k, more_v, None, 0.3, causal=True), sdpa(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)),
        (attend(q, more_k, more_v, None, 0.3), sdpa(q, more_k, more_v, scale=0.3, enable_gqa=True)),
    ]:
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)  # the softmax is float32 by definition
