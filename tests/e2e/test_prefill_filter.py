"""L1: a prompt that drops visual tokens on its way equals the independent eager oracle, and so do its decode steps.

Every model of the zoo with visual positions among its keys, on the cache that does not store what is dropped.
"""

import itertools

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

import avl_fx
from avl_fx import AVLCache, Plan
from avl_fx.errors import UnsupportedPlanError
from avl_fx.passes.site import Reason
from avl_fx.record import recording
from tests.e2e._covering import one_each, rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.e2e.test_avl import as_oracle, converse
from tests.oracle import avl_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 8
PRESETS = {
    "paper": {"core": 0.3, "secondary": 0.5, "refresh": 3},
    "tight": {"core": 0.1, "secondary": 0.2, "refresh": 2, "scores": "per_kv_head"},
    "window": {"core": 0.25, "secondary": 0.4, "refresh": 3, "scoring_window": 4},
    "text": {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": 0.5, "text_minimum": 4},
    "spread": {"core": 0.3, "secondary": 0.5, "refresh": 3, "spread": 0.5},
}
WHOLE = [n for n, zoo in ZOO.items() if set(zoo.attention_kinds) == {"full"} and n != "plain_lvlm"]
"""Models all of whose layers attend to everything."""
FACTORS = (WHOLE, (1, 3), tuple(PRESETS), ("dense", "gla", "vla", "vla_scores"))
CASES = list(itertools.product(*FACTORS))
CHOSEN = one_each(CASES)


def ids(case):
    return "-".join(map(str, case))


def check(name, batch, preset, layers, compiler="eager", keep=0.6, after=0, **kwargs):
    zoo, settings = ZOO[name], PRESETS[preset]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=batch)
    visual = zoo.visual_positions(model, inputs)
    blocks = [] if layers == "dense" else [(after + 1, zoo.decoder_layers - 1)]
    plan = Plan.avl(**{"text": None, **settings}, prefill=keep, prefill_after_layer=after)
    if blocks:
        plan = plan.combine(Plan.lazy(blocks, layers))
    dense = prefill_and_decode(model, inputs, "dynamic", steps=STEPS)
    oracle = {"blocks": blocks, "mode": "gla" if layers == "dense" else layers, "kinds": zoo.attention_kinds}
    shares = {**as_oracle(settings), "prefill": keep, "after": after}
    with avl_oracle(model, visual, decoder_prefix=zoo.decoder_prefix, **oracle, **shares):
        expected = prefill_and_decode(model, inputs, "dynamic", steps=STEPS, tokens=dense.tokens)
    with through("avl_fx.compile", model, compiler=compiler, plan=plan, **kwargs) as recorder:
        cache = AVLCache(plan, model.config)
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)
    prompt, *_ = decoder_graphs(recorder)
    for site in decoder_sites(prompt):
        assert site.action.endswith(f"on {keep:g} of the visual tokens") == (site.layer > after), site.action
    assert largest(got[:1], dense[:1]) > 10 * FLOAT32_TOLERANCE, "a filter that changes nothing proves nothing"
    assert largest(got, expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("case", rest_in_matrix(CHOSEN, CHOSEN[6::6]), ids=ids)
def test_a_filtered_prompt_equals_the_oracle(case):
    check(*case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", sorted({*CASES} - {*CHOSEN}), ids=ids)
def test_a_filtered_prompt_equals_the_oracle_everywhere(case):
    check(*case)


COMPILED = [("llava", 3, "paper", "dense"), ("qwen2_5_vl", 1, "text", "vla_scores")]


@pytest.mark.parametrize("case", rest_in_matrix(COMPILED, COMPILED[:1]), ids=ids)
def test_a_filtered_prompt_equals_the_oracle_through_inductor(case):
    check(*case, compiler="inductor")


# ---- where it is not done --------------------------------------------------------------------------------------------

PLAN = Plan.avl(core=0.3, secondary=0.5, refresh=3, text=None, prefill=0.6, prefill_after_layer=0)
UNFILTERED = Plan.avl(core=0.3, secondary=0.5, refresh=3, text=None)


def refusals(recorder):
    """Reasons that the prompt's sites give for running on all tokens."""
    prompt = decoder_graphs(recorder)[0]
    found = {s.action.partition("; all tokens: ")[2] for s in decoder_sites(prompt) if s.layer > 0}
    assert len(found) == 1
    return found.pop()


def unfiltered(model, inputs, cache="dynamic", door="avl_fx.compile", **options):
    """Logits under the plan equal those of the same plan without its filter; returns why."""

    def run(chosen):
        past = AVLCache(chosen, model.config) if cache == "compact" else cache
        return prefill_and_decode(model, inputs, past, steps=4, tokens=TOKENS[: len(inputs["input_ids"])])

    with through(door, model, compiler="eager", plan=UNFILTERED, **options):
        expected = run(UNFILTERED)
    with through(door, model, compiler="eager", plan=PLAN, **options) as recorder:
        got = run(PLAN)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    return refusals(recorder)


TOKENS = torch.arange(20, 24).repeat(3, 1)


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.matrix)])
def test_a_stock_cache_keeps_every_token(cache):
    model = ZOO["llava"].make()
    inputs = ZOO["llava"].inputs(model, batch=1)
    assert unfiltered(model, inputs, cache) == Reason.FILTER_CACHE


@pytest.mark.matrix
def test_a_graph_of_one_length_keeps_every_token():
    """Its sizes are numbers, and nobody can tell a length from any other number."""
    model = ZOO["llava"].make()
    inputs = ZOO["llava"].inputs(model, batch=1)
    assert unfiltered(model, inputs, "compact", door="torch.compile").startswith(Reason.FILTER_LENGTH)


@pytest.mark.matrix
def test_a_graph_whose_sizes_may_not_depend_on_data_keeps_every_token():
    model = ZOO["llava"].make()
    inputs = ZOO["llava"].inputs(model, batch=1)
    found = unfiltered(model, inputs, "compact", door="torch.compile", dynamic=True)
    assert found.startswith(Reason.FILTER_SIZES)


@pytest.mark.matrix
@pytest.mark.parametrize("after", [1, 2])
def test_features_that_enter_at_the_filter_or_before_it(after):
    """Qwen3-VL adds features by position behind its first two layers."""
    check("qwen3_vl", 3, "paper", "dense", after=after)


@pytest.mark.matrix
def test_features_that_enter_otherwise_keep_every_token(monkeypatch):
    """Whoever reads visual positions one after another needs all of them."""

    def scaled(self, hidden_states, visual_pos_masks, visual_embeds):
        hidden_states = hidden_states.clone()
        hidden_states[visual_pos_masks, :] = hidden_states[visual_pos_masks, :] * (1 + visual_embeds)
        return hidden_states

    monkeypatch.setattr(Qwen3VLTextModel, "_deepstack_process", scaled)
    model = ZOO["qwen3_vl"].make()
    inputs = ZOO["qwen3_vl"].inputs(model, batch=1)
    assert unfiltered(model, inputs, "compact").startswith(Reason.FILTER_GRAPH)


@pytest.mark.matrix
def test_sliding_layers_keep_every_token():
    model = ZOO["gemma3"].make()
    inputs = ZOO["gemma3"].inputs(model, batch=1)
    assert unfiltered(model, inputs, "compact").startswith(Reason.FILTER_LAYERS)


# ---- generate, conversations, pieces ---------------------------------------------------------------------------------


@pytest.fixture
def model():
    return ZOO["llava"].make()


def oracle(model, visual, **more):
    shares = {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": 1.0, "prefill": 0.6, "after": 0, **more}
    return avl_oracle(model, visual, **shares)


@pytest.mark.matrix
def test_a_whole_model_of_any_length_is_filtered_too(model):
    """`torch.compile(dynamic=True)`, where sizes may depend on data: the graph splices the image in itself."""
    inputs = ZOO["llava"].inputs(model, batch=3)
    visual = ZOO["llava"].visual_positions(model, inputs)
    torch._dynamo.reset()
    options = {"plan": PLAN, "compiler": "eager", "strict": True}
    forward = torch.compile(model.forward, backend="avl", dynamic=True, options=options)
    capture = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    with recording() as recorder, capture:
        got = prefill_and_decode(model, inputs, AVLCache(PLAN, model.config), 4, forward, TOKENS)
    torch._dynamo.reset()
    actions = str([s.action for s in decoder_sites(decoder_graphs(recorder)[0])])
    # The code of older releases fixes the batch size.
    whole = Version(transformers.__version__) < Version("5.23") and "(the batch size is a constant)" in actions
    assert whole or "on 0.6 of the visual tokens" in actions
    with oracle(model, visual, prefill=1.0 if whole else 0.6):
        expected = prefill_and_decode(model, inputs, "dynamic", steps=4, tokens=TOKENS)
    assert largest(got, expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("batches", "cuts"),
    [pytest.param((1, 1, 1), (0, 2, 5), marks=pytest.mark.matrix), ((3, 2, 4), (0, 0, 0))],
    ids=["alone", "ragged"],
)
def test_prompts_of_many_lengths_take_one_graph(model, batches, cuts):
    """Lengths, batch sizes but for 1, pictures, and how many tokens are dropped are data."""
    made = zip(batches, cuts, strict=True)
    prompts = [cut(ZOO["llava"].inputs(model, batch=n, seed=i), behind) for i, (n, behind) in enumerate(made)]
    expected = []
    for inputs in prompts:
        with oracle(model, ZOO["llava"].visual_positions(model, inputs)):
            tokens = TOKENS[:1].repeat(len(inputs["input_ids"]), 1)
            expected.append(prefill_and_decode(model, inputs, "dynamic", steps=3, tokens=tokens))
    with through("avl_fx.compile", model, compiler="eager", plan=PLAN) as recorder:
        for inputs, logits in zip(prompts, expected, strict=True):
            tokens = TOKENS[:1].repeat(len(inputs["input_ids"]), 1)
            got = prefill_and_decode(model, inputs, AVLCache(PLAN, model.config), steps=3, tokens=tokens)
            assert largest(got, logits) <= FLOAT32_TOLERANCE
    queries = [str(decoder_sites(graph)[0].queries) for graph in decoder_graphs(recorder)]
    assert sum(count != "1" for count in queries) == 1, queries


def cut(inputs, tokens):
    """The prompt without its last ``tokens``, all of them text."""
    end = inputs["input_ids"].shape[1] - tokens
    return {n: t[:, :end] if n in ("input_ids", "attention_mask") else t for n, t in inputs.items()}


@pytest.mark.parametrize(
    "options",
    rest_in_matrix([{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], [{"num_beams": 2}]),
    ids=["greedy", "beams", "lookup"],
)
def test_generate(model, options):
    """The first token of every way to generate is the oracle's; greedily, all of them."""
    inputs = ZOO["llava"].inputs(model, batch=1)
    beams = options.get("num_beams", 1)
    visual = ZOO["llava"].visual_positions(model, inputs).repeat(beams, 1)
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with oracle(model, visual):
        # Which logits beams report is for transformers to say; their first ones need no cache to be reordered.
        expected = model.generate(**inputs, **settings, num_beams=beams, max_new_tokens=1 if beams > 1 else 8)
    with through("avl_fx.compile", model, compiler="eager", plan=PLAN):
        cache = AVLCache(PLAN, model.config)
        got = model.generate(**inputs, **settings, **options, max_new_tokens=8, past_key_values=cache)
    if beams == 1:
        assert torch.equal(got.sequences, expected.sequences)
    assert largest([got.logits[0]], [expected.logits[0]]) <= FLOAT32_TOLERANCE


def test_images_in_a_second_turn(model):
    """A turn that continues a cache runs on all of its own tokens."""
    turns = [ZOO["llava"].inputs(model, batch=1, seed=seed) for seed in (0, 1)]
    seen = [ZOO["llava"].visual_positions(model, inputs) for inputs in turns]
    both = torch.cat([seen[0], torch.zeros(1, 5, dtype=torch.bool), seen[1]], 1)
    dynamic = DynamicCache(config=model.config.get_text_config())
    with oracle(model, seen[0], compact=True) as slow:
        converse(model, turns[:1], dynamic)
        slow.layers.clear()
        slow.see(both)
        expected, tokens = converse(model, turns, DynamicCache(config=model.config.get_text_config()))
    with through("avl_fx.compile", model, compiler="eager", plan=PLAN):
        got, chosen = converse(model, turns, AVLCache(PLAN, model.config))
    assert torch.equal(chosen, tokens)
    assert largest(got, expected) <= FLOAT32_TOLERANCE


def test_a_prompt_in_pieces_keeps_every_token(model):
    inputs = ZOO["llava"].inputs(model, batch=1)
    visual = ZOO["llava"].visual_positions(model, inputs)
    embeds = model.get_input_embeddings()(
        inputs["input_ids"].clamp(max=model.get_input_embeddings().num_embeddings - 1)
    )

    @torch.no_grad()
    def run(plan):
        cache, logits = AVLCache(plan, model.config), []
        pieces = embeds.split(embeds.shape[1] // 2, 1)
        with avl_fx.modality_ids(visual), through("avl_fx.compile", model, compiler="eager", plan=plan):
            for piece in (*pieces, *embeds[:, :2].split(1, 1)):
                logits.append(model(inputs_embeds=piece, past_key_values=cache, use_cache=True).logits[:, -1])
        return logits

    assert largest(run(PLAN), run(UNFILTERED)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("what", rest_in_matrix(["text", "gradients", "hidden"], ["gradients"]))
def test_nothing_is_dropped_where_the_cache_will_not_be_partitioned(model, what):
    inputs = ZOO["llava"].inputs(model, batch=1)
    if what == "text":
        ids = inputs["input_ids"]
        inputs = {"input_ids": ids[ids != model.config.image_token_id][None]}
    elif what == "hidden":
        place = ZOO["llava"].visual_positions(model, inputs)[0].nonzero()[3]
        inputs["attention_mask"] = inputs["attention_mask"].index_fill(1, place, 0)
    model.requires_grad_(what == "gradients")
    with torch.set_grad_enabled(what == "gradients"):
        expected = model(**inputs).logits[:, -1]
        with through("avl_fx.compile", model, compiler="eager", plan=PLAN):
            got = model(**inputs, past_key_values=AVLCache(PLAN, model.config), use_cache=True).logits[:, -1]
    assert (got - expected).abs().max() <= FLOAT32_TOLERANCE


def test_rows_of_dropped_tokens_are_nan(model):
    """Nobody can take them for anything else; those of all others are there."""
    inputs = ZOO["llava"].inputs(model, batch=3)
    visual = ZOO["llava"].visual_positions(model, inputs)
    with torch.no_grad(), through("avl_fx.compile", model, compiler="eager", plan=PLAN):
        logits = model(**inputs, past_key_values=AVLCache(PLAN, model.config), use_cache=True).logits
    lost = logits.isnan().all(2)
    assert torch.equal(lost, logits.isnan().any(2))
    assert not lost[~visual].any()
    counts = visual.sum(1) - (visual.sum(1) * 0.6).long()
    assert counts.min() > 0
    assert lost.sum(1).tolist() == [int(counts.min())] * 3, "others fill their rows up"


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = ZOO["llava"].make().to(dtype)
    inputs = ZOO["llava"].inputs(model, batch=3)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with through("avl_fx.compile", model, compiler="eager", plan=PLAN):
        got = prefill_and_decode(model, inputs, AVLCache(PLAN, model.config), steps=4, tokens=TOKENS)
    assert all(step.isfinite().all() for step in got)


def test_a_plan_that_no_cache_could_follow_is_refused(model):
    alone = Plan(prefill=PLAN.prefill_policy)
    with pytest.raises(UnsupportedPlanError, match=r"secondary <= 0\.6"):
        avl_fx.compile(model, alone)
    across = PLAN.combine(Plan.lazy([(0, 2)]))
    with pytest.raises(UnsupportedPlanError, match="filter after layer 2"):
        avl_fx.compile(model, across)


def test_explain_says_what_is_dropped_and_what_that_saves(model):
    inputs = ZOO["llava"].inputs(model, batch=1)
    cache = AVLCache(PLAN, model.config)
    report = avl_fx.explain(model, PLAN, front_door="avl_fx.compile", past_key_values=cache, **inputs)
    text = " ".join(str(report).split())
    assert "dense, then partitioned, on 0.6 of the visual tokens" in text
    (prompt,) = (phase for phase in report.savings if phase.phase == "prefill")
    visual = int(ZOO["llava"].visual_positions(model, inputs).sum())
    tokens = inputs["input_ids"].shape[1]
    left = tokens - (visual - int(0.6 * visual))
    encoder = sum(g.linear_flops_before for g in report.graphs if not g.decoder_layers)
    layers = ZOO["llava"].decoder_layers
    # Layer 0 runs on everything, the others on what is left.
    shares = (1 + (layers - 1) * left / tokens) / layers
    assert prompt.linear_after - encoder == pytest.approx((prompt.linear_before - encoder) * shares, rel=0.01)
