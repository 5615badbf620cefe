"""The A-VL oracle does nothing when nothing may be left out, and exactly what it says otherwise."""

import pytest
import torch

from benchmarks._difference import largest_difference
from tests.oracle import AvlOracle, avl_oracle, lazy_oracle
from tests.zoo import get, zoo_names
from tests.zoo._run import prefill_and_decode
from tests.zoo_tests._models import model_of

TOLERANCE = 1e-4
VISIBLE = 0.05
VISUAL = [n for n in zoo_names() if n != "mllama"]
"""Models with visual positions among their keys (Mllama sees images through cross-attention)."""


pytestmark = pytest.mark.usefixtures("one_thread")


def oracle_for(name, model, inputs, **settings):
    zoo = get(name)
    settings = {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": 1.0, **settings}
    visual = zoo.visual_positions(model, inputs)
    return avl_oracle(model, visual, decoder_prefix=zoo.decoder_prefix, kinds=zoo.attention_kinds, **settings)


@pytest.mark.parametrize("name", VISUAL)
def test_a_plan_that_keeps_everything_is_the_stock_model(name):
    zoo, model = get(name), model_of(name)
    inputs = zoo.inputs(model, batch=2)
    for cache in ("dynamic", "static"):
        stock = prefill_and_decode(model, inputs, cache)
        with oracle_for(name, model, inputs, core=1.0, secondary=1.0):
            run = prefill_and_decode(model, inputs, cache, tokens=stock.tokens)
        assert largest_difference(run, stock) < TOLERANCE


@pytest.mark.parametrize("name", VISUAL)
def test_it_matters_and_caches_agree(name):
    zoo, model = get(name), model_of(name)
    inputs = zoo.inputs(model, batch=2)
    stock = prefill_and_decode(model, inputs, steps=6)
    runs = []
    for cache in ("dynamic", "static"):
        with oracle_for(name, model, inputs, core=0.2, secondary=0.4, text=0.5, minimum=4):
            runs.append(prefill_and_decode(model, inputs, cache, steps=6, tokens=stock.tokens))
    assert largest_difference(runs[0][:1], stock[:1]) < TOLERANCE  # the prompt is dense
    assert largest_difference(runs[0], stock) > VISIBLE
    assert largest_difference(*runs) < TOLERANCE


def test_a_row_of_a_batch_is_what_it_is_alone():
    zoo, model = get("llava"), model_of("llava")
    settings = {"core": 0.2, "secondary": 0.5, "text": 0.5, "minimum": 4}
    together = zoo.inputs(model, batch=3)
    with oracle_for("llava", model, together, **settings):
        batch = prefill_and_decode(model, together, steps=6)
    for row in range(3):
        alone = zoo.inputs(model, batch=1, first=row)
        with oracle_for("llava", model, alone, **settings):
            single = prefill_and_decode(model, alone, steps=6, tokens=batch.tokens[row : row + 1])
        assert largest_difference([x[row : row + 1] for x in batch], single) < 5 * TOLERANCE


def test_lazy_blocks_compose():
    zoo, model = get("llava"), model_of("llava")
    inputs = zoo.inputs(model, batch=2)
    dense = prefill_and_decode(model, inputs)
    with lazy_oracle(model, [(1, 3)], zoo.decoder_prefix):
        lazy = prefill_and_decode(model, inputs, tokens=dense.tokens)
    with oracle_for("llava", model, inputs, core=1.0, secondary=1.0, blocks=[(1, 3)]):
        assert largest_difference(prefill_and_decode(model, inputs, tokens=dense.tokens), lazy) < TOLERANCE
    with oracle_for("llava", model, inputs, core=0.2, blocks=[(1, 3)]) as both:
        prefill_and_decode(model, inputs, tokens=dense.tokens)
    assert sorted(both.layers) == [0, 1]  # one core set a block: lazy layers decide nothing
    assert {layer for layer, _ in both.read} == {0, 1}
    with oracle_for("llava", model, inputs, core=0.2, blocks=[(1, 3)]) as both, pytest.MonkeyPatch.context() as patch:
        masks = []
        patch.setattr(both.lazy, "weights", spied(both.lazy.weights, masks))
        prefill_and_decode(model, inputs, tokens=dense.tokens)
    for layer in (2, 3):  # and read what their anchor reads
        theirs, own = ([mask for number, mask in masks if number == n] for n in (1, layer))
        assert len(theirs) == len(own) == 5
        assert all(torch.equal(a, b) for a, b in zip(theirs, own, strict=True))


def spied(weights, masks):
    def spy(layer, q, k, mask, *rest):
        masks.append((layer, mask))
        return weights(layer, q, k, mask, *rest)

    return spy


# --- by hand: one layer, one head, queries that pick keys ---


def pick(*logits):
    """A query of dimension n whose logits with the keys of `unit_keys` are `logits`."""
    return torch.tensor(logits, dtype=torch.float32).view(1, 1, 1, -1)


def run(oracle, query, keys, mask=None):
    """One head, keys the unit vectors, values the unit vectors: the output is the softmax row."""
    eye = torch.eye(query.shape[-1])[:keys].view(1, 1, keys, -1)
    return oracle.attend(0, query, eye, eye, mask, 1.0, False)[0, 0, -1, :keys]


def by_hand(**settings):
    visual = torch.tensor([[False, True, True, True, True, False]])
    return AvlOracle(visual, **{"core": 0.25, "secondary": 0.5, "refresh": 2, "text": 1.0, **settings})


def test_core_secondary_and_refresh_by_hand():
    oracle = by_hand()
    prompt = torch.cat([pick(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)] * 5 + [pick(0, 1, 3, 2, 0, 0, 0, 0, 0, 0)], dim=2)
    run(oracle, prompt, 6)
    # keys 2 and 3 are secondary, 2 is core; the first step reads text (0, 5, 6) and core
    row = run(oracle, pick(0, 9, 0, 9, 9, 0, 0, 0, 0, 0), 7)
    assert row.nonzero().flatten().tolist() == [0, 2, 5, 6]
    # the second refreshes: secondary is read, and key 3 becomes core
    row = run(oracle, pick(0, 9, 0, 2, 9, 0, 0, 0, 0, 0), 8)
    assert row.nonzero().flatten().tolist() == [0, 2, 3, 5, 6, 7]
    row = run(oracle, pick(0, 0, 0, 0, 0, 0, 0, 0, 0, 0), 9)
    assert row.nonzero().flatten().tolist() == [0, 3, 5, 6, 7, 8]
    assert torch.allclose(row[row > 0], torch.tensor(1 / 6))


def test_refresh_zero_reads_secondary_always():
    oracle = by_hand(refresh=0)
    run(oracle, torch.cat([pick(0, 1, 3, 2, 0, 0, 0, 0)] * 6, dim=2), 6)
    for keys in (7, 8):
        assert run(oracle, pick(*[0] * 8), keys)[:6].nonzero().flatten().tolist() == [0, 2, 3, 5]


def test_the_scoring_window_is_the_mean_of_the_last_rows():
    rows = [pick(0, 0, 0, 0, 0, 0)] * 4 + [pick(0, 6, 0, 0, 0, 0), pick(0, 0, 0, 1, 0, 0)]
    for window, core in ((1, 3), (2, 1)):
        oracle = by_hand(window=window)
        run(oracle, torch.cat(rows, dim=2), 6)
        assert oracle.layers[0].core[0, 0].nonzero().flatten().tolist() == [core]


def test_text_keeps_recent_and_heavy_by_hand():
    oracle = by_hand(core=1.0, secondary=1.0, text=0.5, minimum=2, decay="none")
    width = 12
    run(oracle, torch.cat([pick(*[0] * width)] * 6, dim=2), 6)
    kept = []
    for step in range(6):
        heavy = [0.0] * width
        heavy[6] = 5.0  # the first generated token is heavy
        run(oracle, pick(*heavy), 7 + step)
        kept.append([j for j in oracle.layers[0].text[0].nonzero().flatten().tolist() if j > 4])
    # n = 2, 3, ... text keys behind the image so far; budget max(round(n / 2), 2), and what left does not come back
    assert kept == [[5, 6], [6, 7], [6, 8], [6, 9], [6, 9, 10], [6, 9, 10, 11]]
    assert oracle.layers[0].text[0, 0]  # what stands before the image is never evicted


def test_forgetting_lets_old_favourites_go():
    kept = {}
    for decay in ("forgetting", "none"):
        oracle = by_hand(core=1.0, secondary=1.0, text=0.5, minimum=2, decay=decay)
        width = 16
        run(oracle, torch.cat([pick(*[0] * width)] * 6, dim=2), 6)
        for step in range(9):
            logits = [0.0] * width
            logits[6 if step < 2 else 7] = 4.0 if step < 2 else 2.0
            run(oracle, pick(*logits), 7 + step)
        kept[decay] = oracle.layers[0].text_scores[0]
    # what nobody looks at any more loses score under forgetting, and never does without
    assert kept["forgetting"][6] < kept["none"][6]
    assert (kept["none"] >= 0).all()
    assert kept["forgetting"].min() < 0
