"""`AVLCache` behind `generate`: what it stores, and that it keeps the contract of a transformers cache.

That its answers are the oracle's is tested with the other caches, in `test_avl`.
"""

import contextlib
import copy

import pytest
import torch
from transformers import BartConfig, DynamicCache

import avl_fx
from avl_fx import AVLCache, Plan
from avl_fx.errors import CacheStateError
from avl_fx.savings import LayerShape, cache_bytes, compact_cache_bytes, spare_bytes
from benchmarks._models import IMAGE, llava
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, largest, through
from tests.e2e.test_avl import converse
from tests.oracle import avl_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

ZOO_MODEL = ZOO["llava"]
PAPER = Plan.avl(core=0.3, secondary=0.5, refresh=3, text=None)
WITH_TEXT = Plan.avl(core=0.3, secondary=0.5, refresh=3, text=0.5, text_minimum=4)
ALL_KEPT = Plan.avl(core=0.3, secondary=1.0, refresh=2, text=None)


EVERY_PLAN = pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PAPER, id="paper", marks=pytest.mark.matrix),
        pytest.param(WITH_TEXT, id="text"),
        pytest.param(ALL_KEPT, id="lossless", marks=pytest.mark.matrix),
        pytest.param(WITH_TEXT.combine(Plan.lazy([(1, 3)], "vla")), id="vla", marks=pytest.mark.matrix),
        pytest.param(PAPER.combine(Plan.lazy([(1, 3)], "vla_scores")), id="vla_scores", marks=pytest.mark.matrix),
    ],
)


@pytest.fixture
def model():
    return ZOO_MODEL.make()


def inputs_of(model, batch=1, seed=0):
    return ZOO_MODEL.inputs(model, batch=batch, seed=seed)


def compiled(model, plan, door="avl_fx.compile"):
    return through(door, model, compiler="eager", plan=plan)


@pytest.fixture(scope="module")
def under():
    """A model that is compiled under a plan: the same one, and its graphs, for tests in a row that ask for one plan."""
    with contextlib.ExitStack() as stack:
        model, last = None, None

        def under(plan):
            nonlocal model, last
            if plan != last:
                stack.close()
                model, last = ZOO_MODEL.make(), plan
                stack.enter_context(compiled(model, plan))
            return model

        yield under


@torch.no_grad()
def steps_on(model, cache, mask, count, start=7):
    """Logits of ``count`` steps with given tokens; the same on every implementation."""
    logits = []
    for step in range(count):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
        token = torch.full((len(mask), 1), start + step)
        logits.append(model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1])
    return logits


@torch.no_grad()
def prompt(model, inputs, cache):
    model(**inputs, past_key_values=cache, use_cache=True)
    return inputs["attention_mask"]


def mask_after(mask, steps):
    return torch.cat([mask, torch.ones(len(mask), steps, dtype=mask.dtype)], 1)


# ---- what it stores --------------------------------------------------------------------------------------------------


def test_a_text_window_keeps_the_cache_small(model):
    """budget = max(round(0.5 * text), 4) of what stands behind the image, whatever was said since."""
    inputs, steps = inputs_of(model), 40
    visual = ZOO_MODEL.visual_positions(model, inputs)[0]
    first = int(visual.nonzero()[0])
    text = len(visual) - first - int(visual.sum()) + steps
    cache = AVLCache(WITH_TEXT, model.config)
    with compiled(model, WITH_TEXT):
        prefill_and_decode(model, inputs, cache, steps=steps)
    rows = first + int(0.5 * int(visual.sum())) + max(round(0.5 * text), 4)
    assert {layer.keys.shape[2] for layer in cache.layers} == {rows}
    assert cache.allocated_bytes <= cache.stored_bytes * 128 / rows, "no buffer outlives the rows that it held"


def test_lazy_layers_own_no_keys(model):
    plan = PAPER.combine(Plan.lazy([(1, 3)]))
    cache, inputs = AVLCache(plan, model.config), inputs_of(model, 3)
    with compiled(model, plan):
        prefill_and_decode(model, inputs, cache, steps=5)
    of_a_layer = cache.layers[0].values.numel() * 4
    assert cache.stored_bytes == of_a_layer * (2 * 2 + 2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.stored_bytes == of_a_layer * (2 * 2 + 2) * 2 // 3, "a marker stays a marker"


@pytest.mark.parametrize("mode", [pytest.param("vla", marks=pytest.mark.matrix), "vla_scores"])
@pytest.mark.parametrize(
    "reads",
    [
        pytest.param(None, id="all", marks=pytest.mark.matrix),
        pytest.param(PAPER, id="paper", marks=pytest.mark.matrix),
        pytest.param(WITH_TEXT, id="text"),
    ],
)
def test_lazy_layers_own_no_visual_keys(model, reads, mode):
    """Ragged rows: as many are left out of each as the one with the fewest has."""
    lazy = Plan.lazy([(1, 3)], mode)
    plan = lazy if reads is None else reads.combine(lazy)
    cache, inputs, steps = AVLCache(plan, model.config), inputs_of(model, 3), 9
    visual, real = ZOO_MODEL.visual_positions(model, inputs), inputs["attention_mask"].bool()
    with compiled(model, plan):
        prefill_and_decode(model, inputs, cache, steps=steps)
    share = 1.0 if reads is None else 0.5
    text, images = (real & ~visual).sum(1), visual.sum(1)
    if reads is WITH_TEXT:
        # What stands before the image stays, and of the rest the budget.
        first = [int((flags & (seen.cumsum(0) == 0)).sum()) for flags, seen in zip(real, visual, strict=True)]
        counts = [int(n) - before + steps for n, before in zip(text, first, strict=True)]
        stored = [before + max(round(0.5 * n), 4) for n, before in zip(counts, first, strict=True)]
    else:
        # New tokens stand behind the longest row.
        kept = [int(t) + int(share * int(v)) for t, v in zip(text, images, strict=True)]
        stored = [max(kept) - int(share * int(v)) + steps for v in images]
    config = model.config.get_text_config()
    head_dim = config.hidden_size // config.num_attention_heads
    shape = LayerShape(config.num_key_value_heads, head_dim, head_dim, 4)
    layers, lazies = [shape] * config.num_hidden_layers, lazy.lazy_policy.lazy_layers
    expected = compact_cache_bytes(stored, images.tolist(), share, layers, lazies, mode)
    assert cache.stored_bytes == expected
    assert cache.stored_bytes < compact_cache_bytes(stored, images.tolist(), share, layers)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["compact", "dynamic"])
def test_seven_lazy_layers_of_ten_save_35_percent(kind):
    """Keys of seven layers: 7 of 20 tensors of equal size, by the formula and by what the allocator gave."""
    layers, steps = 10, 8
    model = llava(layers=layers, hidden=32, heads=2, kv_heads=2, visual_tokens=64).eval()
    plan = Plan.lazy([(0, 3), (4, 6), (7, 9)])
    inputs = {
        "input_ids": torch.tensor([[1] * 4 + [IMAGE] * 64 + [7] * 12]),
        "pixel_values": torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)),
    }
    text = model.config.get_text_config()
    cache = AVLCache(plan, model.config) if kind == "compact" else DynamicCache(config=text)
    with torch.no_grad(), compiled(model, plan):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=steps, min_new_tokens=steps)
    a_tensor = (4 + 64 + 12 + steps - 1) * 2 * 16 * 4
    dense = 2 * layers * a_tensor
    marker = 4  # one NaN stands for all keys that are not stored
    assert cache_bytes(cache) == (2 * layers - 7) * a_tensor + marker
    assert compact_cache_bytes([87], [0], 1.0, [LayerShape(2, 16, 16, 4)] * 10, [1, 2, 3, 5, 6, 8, 9]) == 0.65 * dense
    stored = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored}
    spare = spare_bytes(cache)
    assert sum(storages.values()) - spare <= 0.65 * dense + marker
    if kind == "compact":
        assert (cache.stored_bytes, cache.allocated_bytes) == (0.65 * dense, sum(storages.values()) - marker)


def test_less_than_half_of_a_prompt_of_576_visual_tokens_is_stored():
    """At secondary 0.5 and text 0.6, with keys in three layers of ten."""
    layers, question, steps = 10, 32, 8
    model = llava(layers=layers, hidden=32, heads=2, kv_heads=2, visual_tokens=576).eval()
    plan = Plan.avl(core=0.3, secondary=0.5, refresh=3, text=0.6).combine(Plan.lazy([(0, 3), (4, 6), (7, 9)]))
    inputs = {
        "input_ids": torch.tensor([[1] * 4 + [IMAGE] * 576 + [7] * question]),
        "pixel_values": torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0)),
    }
    caches = AVLCache(plan, model.config), DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), compiled(model, plan):
        model.generate(**inputs, past_key_values=caches[0], max_new_tokens=steps, min_new_tokens=steps)
    with torch.no_grad():
        model.generate(**inputs, past_key_values=caches[1], max_new_tokens=steps, min_new_tokens=steps)
    text = max(round(0.6 * (question + steps - 1)), plan.text_policy.minimum)
    of_a_row = 16 * 2 * 4  # in one layer, keys or values
    assert caches[0].stored_bytes == (4 + 288 + text) * of_a_row * (layers + 3)
    dense = sum(t.nbytes for layer in caches[1].layers for t in (layer.keys, layer.values))
    assert caches[0].dense_bytes == dense
    # What the allocator gave, room for the next rows included.
    assert caches[0].stored_bytes < caches[0].allocated_bytes <= 0.45 * dense


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.matrix), 3])
def test_it_stores_text_and_secondary_to_the_byte(under, batch):
    model = under(PAPER)
    inputs = inputs_of(model, batch)
    visual, real = ZOO_MODEL.visual_positions(model, inputs), inputs["attention_mask"].bool()
    cache, steps = AVLCache(PAPER, model.config), 6
    prefill_and_decode(model, inputs, cache, steps=steps)
    # Padding is not stored; what is fed later stands behind the longest row of the batch.
    counts = zip(real.sum(1).tolist(), visual.sum(1).tolist(), strict=True)
    rows = max(tokens - images + int(0.5 * images) for tokens, images in counts) + steps
    text = model.config.get_text_config()
    kv_heads, head_dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    assert cache.stored_bytes == 2 * text.num_hidden_layers * batch * kv_heads * rows * head_dim * 4
    assert cache.get_seq_length() == visual.shape[1] + steps
    assert cache.dense_bytes == cache.stored_bytes * cache.get_seq_length() // rows


def test_what_lies_behind_it_is_counted(under):
    model = under(PAPER)
    cache = AVLCache(PAPER, model.config)
    prefill_and_decode(model, inputs_of(model, 3), cache, steps=3)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for x in cache.layers for t in (x.keys, x.values)}
    assert cache.allocated_bytes == sum(s.nbytes() for s in storages.values())
    assert len(storages) == 2 * len(cache.layers)


# ---- the contract ----------------------------------------------------------------------------------------------------


def test_a_reset_cache_is_empty(under):
    model = under(PAPER)
    cache = AVLCache(PAPER, model.config)
    first = prefill_and_decode(model, inputs_of(model, 3), cache, steps=3)
    cache.reset()
    assert (cache.get_seq_length(), cache.stored_bytes) == (0, 0)
    again = prefill_and_decode(model, inputs_of(model, 3), cache, steps=3)
    assert largest(first, again) == 0


def test_early_initialization(under):
    model = under(PAPER)
    text = model.config.get_text_config()
    cache = AVLCache(PAPER, model.config)
    heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    cache.early_initialization(3, heads, dim, torch.float32, torch.device("cpu"))
    got = prefill_and_decode(model, inputs_of(model, 3), cache, steps=3)
    expected = prefill_and_decode(model, inputs_of(model, 3), AVLCache(PAPER, model.config), steps=3)
    assert largest(got, expected) == 0


def test_what_was_fed_since_the_prompt_can_be_taken_back(under):
    model = under(PAPER)
    inputs = inputs_of(model, 3)
    straight, wavering = (AVLCache(PAPER, model.config) for _ in range(2))
    for cache in (straight, wavering):
        mask = prompt(model, inputs, cache)
    # A step that does not refresh leaves core as it is: taking it back leaves no trace.
    kept = steps_on(model, straight, mask, 1)
    tried = steps_on(model, wavering, mask, 1)
    wavering.crop(-1)
    assert wavering.get_seq_length() == mask.shape[1]
    again = steps_on(model, wavering, mask, 1)
    assert largest(kept, tried) == 0
    assert largest(kept, again) <= FLOAT32_TOLERANCE
    before = [layer.keys.clone() for layer in wavering.layers]
    with pytest.raises(CacheStateError, match="cannot be taken back"):
        wavering.crop(-2)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(wavering.layers, before, strict=True))
    assert wavering.get_seq_length() == mask.shape[1] + 1


@pytest.mark.parametrize(
    ("text", "spread"),
    [(None, 0.0), (0.3, 0.0), (None, 0.6)],
    ids=["all text", "text window", "spread"],
)
@pytest.mark.matrix
def test_a_second_turn_with_another_image(model, text, spread):
    turns = [inputs_of(model, seed=seed) for seed in (0, 1)]
    seen = [ZOO_MODEL.visual_positions(model, inputs) for inputs in turns]
    both = torch.cat([seen[0], torch.zeros(1, 5, dtype=torch.bool), seen[1]], 1)
    shares = {"core": 0.3, "secondary": 0.5, "refresh": 2, "spread": spread}
    plan = Plan.avl(**shares, text=text, text_minimum=3)
    settings = {**shares, "text": text or 1.0, "minimum": 3}

    def expected(compact):
        with avl_oracle(model, both, compact=compact, **settings):
            return converse(model, turns, DynamicCache(config=model.config.get_text_config()))

    wanted, tokens = expected(compact=True)
    for door in DOORS:
        with compiled(model, plan, door):
            got, chosen = converse(model, turns, AVLCache(plan, model.config))
        assert torch.equal(chosen, tokens)
        assert largest(got, wanted) <= FLOAT32_TOLERANCE
    kept, _ = expected(compact=False)
    assert largest(wanted, kept) > 10 * FLOAT32_TOLERANCE, "what was dropped makes no difference: nothing is proven"


@EVERY_PLAN
def test_two_caches_take_turns(under, plan):
    model = under(plan)
    batches = [inputs_of(model, 2, seed) for seed in (0, 1)]

    @torch.no_grad()
    def play(order):
        caches = [AVLCache(plan, model.config) for _ in batches]
        logits = {0: [], 1: []}
        masks = [inputs["attention_mask"] for inputs in batches]
        for number in order:
            first = not logits[number]
            if first:
                out = model(**batches[number], past_key_values=caches[number], use_cache=True)
            else:
                masks[number] = torch.cat([masks[number], torch.ones(2, 1, dtype=torch.long)], 1)
                token = torch.full((2, 1), 7 + len(logits[number]))
                out = model(
                    input_ids=token, attention_mask=masks[number], past_key_values=caches[number], use_cache=True
                )
            logits[number].append(out.logits[:, -1])
        return logits

    alone = {n: play([n] * 6)[n] for n in (0, 1)}
    mixed = play([0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1])
    for number in (0, 1):
        assert largest(mixed[number], alone[number]) <= FLOAT32_TOLERANCE


@EVERY_PLAN
def test_batch_rows_may_be_picked_and_repeated(under, plan):
    """Rows of a batch know nothing of each other: picked rows go on as they would have."""
    model = under(plan)
    inputs = inputs_of(model, 3)
    index = torch.tensor([2, 0, 0])
    whole = AVLCache(plan, model.config)
    mask = prompt(model, inputs, whole)
    steps_on(model, whole, mask, 4, start=30)
    mask = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], 1)
    picked, repeated, copied = copy.deepcopy(whole), copy.deepcopy(whole), copy.deepcopy(whole)
    picked.reorder_cache(index)
    repeated.batch_repeat_interleave(2)
    expected = steps_on(model, whole, mask, 5)
    again = steps_on(model, copied, mask, 5)
    of_picked = steps_on(model, picked, mask[index], 5)
    of_repeated = steps_on(model, repeated, mask.repeat_interleave(2, 0), 5)
    assert largest(again, expected) <= FLOAT32_TOLERANCE
    assert largest(of_picked, [row[index] for row in expected]) <= FLOAT32_TOLERANCE
    assert largest(of_repeated, [row.repeat_interleave(2, 0) for row in expected]) <= FLOAT32_TOLERANCE


def way_of(model, how):
    """Inputs and options of one way to generate."""
    options = {"max_new_tokens": 8, "do_sample": how == "sampling", "disable_compile": True}
    options |= {"num_beams": 3} if how == "beams" else {}
    options |= {"prompt_lookup_num_tokens": 3} if how == "assisted" else {}
    return inputs_of(model, 1 if how == "assisted" else 2), options


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["beams", "sampling", "assisted"])
def test_other_ways_to_generate(model, how):
    """One visual key in a hundred is left out, and tokens are those of a stock cache under the same plan or none."""
    inputs, options = way_of(model, how)
    torch.manual_seed(0)
    expected = model.generate(**inputs, **options)
    plan = Plan.avl(core=0.99, secondary=1.0, refresh=0, text=None)
    with compiled(model, plan):
        torch.manual_seed(0)
        got = model.generate(**inputs, **options, past_key_values=AVLCache(plan, model.config))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("how", ["sampling", "assisted", "beams"])
@pytest.mark.matrix
def test_other_ways_to_generate_under_a_lazy_plan(model, how):
    """Keys that are the anchor's are read from its cache: tokens are those of a stock cache under the same plan."""
    inputs, options = way_of(model, how)
    plan = Plan.lazy([(1, 3)], "vla")
    caches = DynamicCache(config=model.config.get_text_config()), AVLCache(plan, model.config)
    with compiled(model, plan):
        tokens = []
        for cache in caches:
            torch.manual_seed(0)
            tokens.append(model.generate(**inputs, **options, past_key_values=cache))
    assert torch.equal(*tokens)
    assert caches[1].stored_bytes < caches[1].dense_bytes


@pytest.mark.parametrize(
    "plan",
    [pytest.param(WITH_TEXT, marks=pytest.mark.matrix), WITH_TEXT.combine(Plan.lazy([(1, 3)], "vla_scores"))],
    ids=["text", "vla_scores"],
)
def test_no_graph_is_made_after_the_second_step(model, plan):
    inputs = inputs_of(model, 3)
    with compiled(model, plan) as recorder:
        cache = AVLCache(plan, model.config)
        mask = prompt(model, inputs, cache)
        steps_on(model, cache, mask, 3)
        known = len(recorder.graphs)
        steps_on(model, cache, mask_after(mask, 3), 64)
        assert len(recorder.graphs) == known


# ---- never silently wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [ALL_KEPT, Plan.identity()], ids=["all kept", "identity"])
def test_it_works_eagerly_when_nothing_is_dropped(model, plan):
    inputs = inputs_of(model, 3)
    expected = prefill_and_decode(model, inputs, steps=3)
    assert largest(prefill_and_decode(model, inputs, AVLCache(plan, model.config), steps=3), expected) == 0


@pytest.mark.parametrize("plan", [PAPER, WITH_TEXT, Plan.lazy([(0, 1)])], ids=["vision", "text", "lazy"])
def test_eager_use_of_a_plan_that_drops_is_an_error(model, plan):
    cache = AVLCache(plan, model.config)
    with pytest.raises(CacheStateError, match=r"runs eagerly.*Fix: compile the model"):
        prefill_and_decode(model, inputs_of(model), cache, steps=1)
    assert cache.get_seq_length() == 0


def test_a_cache_of_another_plan_is_an_error(model):
    with compiled(model, PAPER), pytest.raises(CacheStateError, match="made for another plan"):
        prefill_and_decode(model, inputs_of(model), AVLCache(WITH_TEXT, model.config), steps=1)


def test_another_compiler_is_an_error(model):
    """A backend that does not know the operator meets a cache that is not complete."""
    inputs = inputs_of(model)
    cache = AVLCache(PAPER, model.config)
    with compiled(model, PAPER):
        mask = prompt(model, inputs, cache)
    decoder = model.model.language_model
    decoder.compile(backend="eager")
    try:
        with pytest.raises(RuntimeError, match=r"a compact cache holds \d+ rows of \d+ tokens"):
            steps_on(model, cache, mask, 1)
    finally:
        decoder._compiled_call_impl = None


def test_another_model_is_an_error(model):
    """Other heads, another batch or another dtype: the update says so, and changes nothing."""
    plan = Plan.identity()
    cache = AVLCache(plan, model.config)
    mask = prompt(model, inputs_of(model), cache)
    layer = cache.layers[0]
    keys, length = layer.keys, cache.get_seq_length()
    heads, dim = keys.shape[1], keys.shape[3]
    for new in (
        torch.zeros(1, heads + 1, 1, dim),
        torch.zeros(1, heads, 1, 2 * dim),
        torch.zeros(2, heads, 1, dim),
        torch.zeros(1, heads, 1, dim, dtype=torch.bfloat16),
    ):
        with pytest.raises(CacheStateError, match=r"do not continue a cache.*Fix: use a fresh AVLCache"):
            layer.update(new, new)
    assert layer.keys is keys
    assert cache.get_seq_length() == length == mask.shape[1]


def test_tensors_that_were_replaced_are_an_error(model):
    inputs = inputs_of(model)
    cache = AVLCache(PAPER, model.config)
    with compiled(model, PAPER):
        mask = prompt(model, inputs, cache)
        for layer in cache.layers:
            layer.keys = layer.keys.clone()
        with pytest.raises(CacheStateError, match="which ones is not known"):
            steps_on(model, cache, mask, 1)


def test_a_config_is_asked_for(model):
    with pytest.raises(CacheStateError, match=r"config: must be the configuration.*Fix: write AVLCache"):
        AVLCache(PAPER, model)
    with pytest.raises(avl_fx.AvlError):
        AVLCache({"vision": {"core": 0.9, "secondary": 0.5}}, model.config)


def test_without_visual_positions_it_stays_complete(model):
    """Text alone: nothing to drop, and the dense answer."""
    inputs = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    expected = prefill_and_decode(model, inputs, steps=4)
    cache = AVLCache(PAPER, model.config)
    with compiled(model, PAPER) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=4)
    assert decoder_graphs(recorder)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert cache.stored_bytes == cache.dense_bytes


def test_each_layer_knows_its_own_length_during_a_forward():
    """Llama 4 asks it for the temperature of a layer, before it stores anything there."""
    cache = AVLCache(Plan.identity(), ZOO_MODEL.make().config)
    last = len(cache.layers) - 1
    for fed, tokens in ((0, 3), (3, 1)):
        rows = torch.zeros(1, 2, tokens, 16)
        for layer in range(last + 1):
            assert [cache.get_seq_length(i) for i in (layer, last)] == [fed, fed]
            cache.update(rows, rows, layer)
            assert cache.get_seq_length(layer) == fed + tokens
        assert cache.get_seq_length() == fed + tokens


def test_an_encoder_decoder_is_refused():
    with pytest.raises(CacheStateError, match=r"encoder-decoder.*Fix: pass no cache"):
        AVLCache(PAPER, BartConfig())


# ---- images that are not in the sequence -----------------------------------------------------------------------------


@pytest.mark.matrix
def test_cross_attention_layers_keep_their_images():
    """Mllama: keys of images stand in layers of their own, and are no tokens of the text."""
    zoo = ZOO["mllama"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=3)
    cross = [i for i, kind in enumerate(zoo.attention_kinds) if kind == "cross"]
    plan = Plan.avl(core=0.3, secondary=0.5, refresh=3, text=0.5, text_minimum=4)
    for chosen in (plan, PAPER):
        stock = prefill_and_decode(model, inputs, "dynamic", steps=4)
        with compiled(model, chosen):
            expected = prefill_and_decode(model, inputs, "dynamic", steps=4, tokens=stock.tokens)
            cache = AVLCache(chosen, model.config)
            got = prefill_and_decode(model, inputs, cache, steps=4, tokens=stock.tokens)
        assert largest(got, expected) <= FLOAT32_TOLERANCE
        for layer in cross:
            assert torch.equal(cache.layers[layer].keys, stock.cache.layers[layer].keys)

    fed, images = cache.get_seq_length(), cache.layers[cross[0]].keys.clone()
    cache.crop(-2)
    assert cache.get_seq_length() == fed - 2
    assert torch.equal(cache.layers[cross[0]].keys, images)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[cross[0]].keys, images[[2, 0, 0]])
    cache.reset()
    assert cache.stored_bytes == 0
