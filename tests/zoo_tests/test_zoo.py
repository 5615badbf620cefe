"""The zoo is what it says: deterministic, alive, the same in every attention implementation and cache."""

from pathlib import Path

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tests.zoo
from benchmarks._difference import largest_difference
from tests.zoo import ZOO, get, zoo_names
from tests.zoo._base import FIRST_TEXT, LAST_TEXT, PAD
from tests.zoo._run import prefill, prefill_and_decode
from tests.zoo_tests._models import model_of

TOLERANCE = 1e-4  # float32, logits of order 10


pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_file_is_discovered():
    files = {path.stem for path in Path(tests.zoo.__file__).parent.glob("[a-z]*.py")}
    assert files == set(ZOO) == set(zoo_names())
    assert all(zoo.name == name for name, zoo in ZOO.items())
    assert zoo_names(hf=False) == ["plain_lvlm"]


@pytest.mark.parametrize("name", zoo_names())
def test_same_seed_same_model_and_the_global_generator_is_untouched(name):
    zoo = get(name)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    one = zoo.make(seed=3).state_dict()
    torch.manual_seed(2)
    expected = torch.rand(())
    torch.manual_seed(2)
    two = zoo.make(seed=3).state_dict()
    assert torch.rand(()) == expected
    torch.set_rng_state(state)
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = zoo.make(seed=4).state_dict()
    weights = [key for key in one if one[key].ndim == 2 and one[key].is_floating_point()]
    assert all(not torch.equal(one[key], other[key]) for key in weights)


@pytest.mark.parametrize("name", zoo_names())
def test_declared_shape_of_the_decoder(name):
    zoo, model = get(name), model_of(name)
    layers = zoo.layers(model)
    assert not model.training
    assert len(layers) == zoo.decoder_layers
    for layer, kind in zip(layers, zoo.attention_kinds, strict=True):
        attention = layer if not zoo.hf else layer.cross_attn if kind == "cross" else layer.self_attn
        assert attention.q_proj.out_features == zoo.heads * zoo.head_dim
        assert attention.k_proj.out_features == zoo.kv_heads * zoo.head_dim
        if kind != "cross" and zoo.hf:
            assert (getattr(attention, "sliding_window", None) is not None) == (kind == "sliding")


@pytest.mark.parametrize("name", zoo_names(hf=True))
def test_both_towers_run_the_implementation_asked_for(name):
    zoo = get(name)
    for implementation in ("sdpa", "eager"):
        model = model_of(name, implementation)
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        assert {config._attn_implementation for config in configs} == {implementation}

    stock, called = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def spy(module, *args, **kwargs):
        called.append(module)
        return stock(module, *args, **kwargs)

    model = model_of(name)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        prefill(model, zoo.inputs(model, batch=2))
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    decoder = {module for layer in zoo.layers(model) for module in layer.modules()}
    assert len(set(called) & decoder) == zoo.decoder_layers
    assert len(set(called) - decoder) == zoo.vision_sites


@pytest.mark.parametrize("name", zoo_names())
def test_sdpa_equals_eager_with_every_cache(name):
    zoo = get(name)
    sdpa, eager = model_of(name), model_of(name, "eager")
    for batch in (1, 2):
        inputs = zoo.inputs(sdpa, batch=batch)
        reference = prefill_and_decode(eager, inputs, "dynamic")
        for cache in zoo.caches:
            for model in (sdpa, eager):
                run = prefill_and_decode(model, inputs, cache, tokens=reference.tokens)
                assert largest_difference(run, reference) < TOLERANCE, (cache, batch)
                assert (run.cache is None) == (cache == "none")
                assert torch.equal(run.tokens, reference.tokens)


@pytest.mark.parametrize("name", zoo_names())
def test_a_padded_row_equals_the_row_alone(name):
    zoo, model = get(name), model_of(name)
    assert zoo.padding_exact
    together = prefill_and_decode(model, zoo.inputs(model, batch=4))
    padding = zoo.inputs(model, batch=4)["attention_mask"].eq(0).sum(1)
    assert padding.count_nonzero() == 3  # ... or the test has no teeth
    for row in range(4):
        inputs = zoo.inputs(model, batch=1, first=row)
        alone = prefill_and_decode(model, inputs, tokens=together.tokens[row : row + 1])
        assert largest_difference(alone, [step[row : row + 1] for step in together]) < TOLERANCE, row


@pytest.mark.parametrize("name", zoo_names())
def test_decoding_is_not_degenerate(name):
    zoo, model = get(name), model_of(name)
    run = prefill_and_decode(model, zoo.inputs(model, batch=3), steps=6)
    logits = torch.stack(list(run))
    assert logits.isfinite().all()
    assert 1 < logits.std() < 10
    best = logits.topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-3  # no ties
    assert run.tokens.shape == (3, 7)  # nothing stopped early
    assert run.tokens.min() >= FIRST_TEXT
    assert run.tokens.max() <= LAST_TEXT  # never a special token
    assert run.tokens.unique().numel() > 7


@pytest.mark.parametrize("name", zoo_names())
def test_bfloat16_is_tame(name):
    zoo, model = get(name), model_of(name)
    half = zoo.make(dtype=torch.bfloat16)
    reference = prefill_and_decode(model, zoo.inputs(model, batch=2))
    run = prefill_and_decode(half, zoo.inputs(half, batch=2), tokens=reference.tokens)
    errors = torch.stack([(a - b).float().std() for a, b in zip(run, reference, strict=True)])
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert errors.max() < 0.15 * torch.stack(list(reference)).std()


@pytest.mark.parametrize("name", zoo_names())
def test_logits_depend_on_every_image(name):
    zoo, model = get(name), model_of(name)
    inputs = zoo.inputs(model, batch=1)
    before = prefill(model, inputs)[:, -1]
    values = inputs["pixel_values"]
    flat = values.flatten(0, 1) if name in ("smolvlm", "mllama", "llava_onevision") else values
    for index in (0, -1) if name != "mllama" else (0,):  # mllama's last image is padding
        changed = flat.clone()
        changed[index] = -changed[index]
        after = prefill(model, inputs | {"pixel_values": changed.view_as(values)})[:, -1]
        assert (after - before).abs().max() > 0.05, index


@pytest.mark.parametrize("name", zoo_names())
def test_visual_positions_are_where_pixels_enter_the_decoder(name):
    zoo = get(name)
    model = zoo.make()
    seen = []
    first = zoo.layers(model)[0]

    def note(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        inputs = zoo.inputs(model, batch=4)
        prefill(model, inputs)
        if name == "llava_onevision":  # learned newlines end each row of patches: visual, but no pixels
            model.model.image_newline.neg_()
        prefill(model, inputs | {"pixel_values": inputs["pixel_values"].flip(-1)})
    finally:
        handle.remove()
    moved = (seen[0] != seen[1]).any(-1)
    visual = zoo.visual_positions(model, inputs)
    assert visual.dtype == torch.bool
    assert torch.equal(moved, visual)
    assert not (visual & (inputs["input_ids"] == PAD)).any()
    if "cross" not in zoo.attention_kinds:
        counts = visual.sum(1).tolist()
        assert all(4 <= count <= 72 for count in counts[:3])
        if zoo.ragged:  # two images, three, one, none
            assert counts[3] == 0
            assert (counts[0] != 2 * counts[2]) == zoo.mixed_sizes


@pytest.mark.parametrize("name", zoo_names())
def test_images_of_a_row_are_separate_spans_with_text_around_them(name):
    zoo, model = get(name), model_of(name)
    if "cross" in zoo.attention_kinds:
        pytest.skip("no visual positions")
    visual = zoo.visual_positions(model, zoo.inputs(model))[0].int()
    starts = (visual.diff() == 1).sum()
    assert starts >= 2
    assert visual[0] == 0
    assert visual[-1] == 0


@pytest.mark.parametrize("name", ["llava", "plain_lvlm"])
def test_a_stand_in_forward_and_forced_tokens(name):
    zoo = get(name)
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    lengths = []
    stock = model.forward

    def forward(*args, **kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        lengths.append(ids.shape[1])
        return stock(*args, **kwargs)

    forced = torch.tensor([[20, 30, 40], [21, 31, 41]])
    run = prefill_and_decode(model, inputs, steps=3, forward=forward, tokens=forced)
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, 1]
    assert torch.equal(run.tokens[:, :3], forced)
    assert "forward" not in vars(model)
    free = prefill_and_decode(model, inputs, steps=3)
    assert torch.equal(run[0], free[0])
    assert not torch.equal(run[1], free[1])
