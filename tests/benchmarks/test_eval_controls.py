"""Controls of the evaluation: each keeps as many keys as it says, and the keys that it says."""

import pytest
import torch

from avl_fx import Contender
from avl_fx._answers import dense_answers
from benchmarks.eval.controls import (
    CONTROLS,
    DENSE_LAYERS,
    SINKS,
    Kept,
    Prompt,
    control,
    down_sampled,
    other_pictures,
)
from benchmarks.eval.prompts import Attended, Prompts
from tests.zoo import ZOO

LLAVA = ZOO["llava"]
KEYS, PADDED = 24, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def prompt(layer: int = 3, share: float = 0.5, seed: int = 0) -> Prompt:
    """Two rows, the first of them padded; visual keys 5 to 16, and 8 to 13."""
    weights = torch.rand(2, 4, KEYS, KEYS, generator=torch.Generator().manual_seed(1)).tril()
    visual = torch.zeros(2, KEYS, dtype=torch.bool)
    visual[0, 5:17] = visual[1, 8:14] = True
    visible = torch.ones(2, KEYS, dtype=torch.bool)
    visible[0, :PADDED] = False
    weights = weights * visible[:, None, None]
    weights = (weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)).mean(1)
    return Prompt(layer, Attended(weights[:, -1], weights[:, -8:].sum(1), weights.sum(1)), visual, share, seed, {})


@pytest.mark.parametrize("name", [n for n in CONTROLS if n != "FastV-like"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_it_keeps_its_budget(name, share):
    seen = prompt(share=share)
    keep = CONTROLS[name](seen)
    assert not (keep & ~seen.visible).any()
    for row in range(2):
        text = int((seen.visible[row] & ~seen.visual[row]).sum())
        assert int(keep[row].sum()) == text + int(share * int(seen.visual[row].sum()))
        if name not in ("window", "H2O"):
            assert (keep[row] >= (seen.visible & ~seen.visual)[row]).all()


def test_random_differs_by_layer_row_and_seed():
    first = CONTROLS["random"](prompt())
    assert torch.equal(first, CONTROLS["random"](prompt()))
    assert not torch.equal(first, CONTROLS["random"](prompt(layer=4)))
    assert not torch.equal(first, CONTROLS["random"](prompt(seed=1)))


@pytest.mark.parametrize(("name", "rows"), [("no refresh", "by_last"), ("SnapKV-like", "by_late")])
def test_the_best_of_the_last_rows_are_kept(name, rows):
    seen = prompt()
    keep = CONTROLS[name](seen)
    scores = getattr(seen.attended, rows)[0]
    kept, dropped = keep[0] & seen.visual[0], ~keep[0] & seen.visual[0]
    assert scores[kept].min() > scores[dropped].max()


def test_fastv_chooses_once():
    seen = prompt(layer=DENSE_LAYERS)
    chosen = CONTROLS["FastV-like"](seen)
    assert torch.equal(chosen, CONTROLS["no refresh"](seen))
    later = prompt(layer=DENSE_LAYERS + 3)
    later.chosen[DENSE_LAYERS] = chosen
    assert torch.equal(CONTROLS["FastV-like"](later), chosen)
    assert torch.equal(CONTROLS["FastV-like"](prompt(layer=0)), seen.visible)


def test_a_window_keeps_both_ends():
    keep = CONTROLS["window"](prompt(share=0.1))
    kept = keep[0].nonzero().flatten().tolist()
    assert kept[:SINKS] == list(range(PADDED, PADDED + SINKS))
    assert kept[SINKS:] == list(range(KEYS - len(kept) + SINKS, KEYS))


def test_heavy_hitters_keep_the_latest():
    keep = CONTROLS["H2O"](prompt(share=0.1))
    assert keep[:, -4:].all()


@pytest.fixture(scope="module")
def model():
    return LLAVA.make("sdpa")


@pytest.mark.parametrize("name", CONTROLS)
def test_keeping_everything_is_dense(model, name):
    inputs = LLAVA.inputs(model, batch=2)
    dense = dense_answers(model, Contender("dense"), inputs, 4)
    found = dense_answers(model, control(name, 1.0, Prompts(LLAVA.decoder_prefix)), inputs, 4)
    assert torch.equal(found.tokens, dense.tokens)
    torch.testing.assert_close(found.log_probabilities, dense.log_probabilities, atol=1e-4, rtol=1e-4)
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", CONTROLS)
def test_keeping_little_is_not(model, name):
    inputs = LLAVA.inputs(model, batch=2)
    dense = dense_answers(model, Contender("dense"), inputs, 4)
    found = dense_answers(model, control(name, 0.1, Prompts(LLAVA.decoder_prefix)), inputs, 4)
    torch.testing.assert_close(found.log_probabilities[0], dense.log_probabilities[0], atol=1e-4, rtol=1e-4)
    assert (found.log_probabilities[1] - dense.log_probabilities[1]).abs().max() > 0.01, "the prompt alone is dense"


@torch.no_grad()
def test_a_prompt_is_computed_once(model, monkeypatch):
    """For all controls, and not mixed up with another batch's; nobody changes what the next one begins with."""
    inputs, others = LLAVA.inputs(model, batch=2), LLAVA.inputs(model, batch=2, first=1)
    prompts, computed = Prompts(LLAVA.decoder_prefix), []
    compute = prompts._computed
    monkeypatch.setattr(prompts, "_computed", lambda *args: computed.append(1) or compute(*args))
    first = dense_answers(model, control("strided", 0.3, prompts), inputs, 4)
    for asked in (inputs, others):
        for name in CONTROLS:
            dense_answers(model, control(name, 0.1, prompts), asked, 4)
    assert len(computed) == 2
    again = dense_answers(model, control("strided", 0.3, prompts), inputs, 4)
    assert torch.equal(again.tokens, first.tokens)
    assert torch.equal(again.log_probabilities, first.log_probabilities)


@torch.no_grad()
def test_what_a_prompt_attended_to(model):
    """Against the weights that transformers' own eager attention returns."""
    eager = LLAVA.make("eager")
    inputs = LLAVA.inputs(eager, batch=2)
    attended, behind = Prompts(LLAVA.decoder_prefix).of(eager, inputs)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    weights = eager(**inputs, position_ids=positions, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    assert len(attended) == len(weights)
    for layer, expected in enumerate(weights):
        torch.testing.assert_close(attended[layer].by_last, expected.mean(1)[:, -1], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(attended[layer].by_late, expected.mean(1)[:, -8:].sum(1), atol=1e-5, rtol=1e-4)
        assert torch.equal(attended[layer].by_last > 0, real)
        rows = torch.where(real[:, :, None], attended[layer].by_all[:, None, :], 0)[:, -1]
        seen = expected.mean(1).sum(1)
        torch.testing.assert_close(rows[real.all(1)], seen[real.all(1)], atol=1e-5, rtol=1e-4)
    assert behind["past_key_values"].get_seq_length() == inputs["input_ids"].shape[1] - 1
    assert "pixel_values" not in behind


def test_a_step_reads_what_is_kept_and_what_came_since():
    """By hand: attention over the kept keys alone; the last token of the prompt reads all of them."""
    generator = torch.Generator().manual_seed(3)
    keep = torch.tensor([[True, False, True, True, False, False, True, True]])
    attention = Kept({0: keep})
    q, k, v = (torch.randn(1, 2, rows, 4, generator=generator) for rows in (1, 8, 8))
    dense = ((q @ k.mT) * 0.5).softmax(-1) @ v
    torch.testing.assert_close(attention.attend(0, q, k, v, None, 0.5, False), dense)
    more = torch.randn(2, 1, 2, 2, 4, generator=generator)
    key, value = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
    got = attention.attend(0, q, key, value, None, 0.5, False)
    read = torch.cat([keep[0], torch.ones(2, dtype=torch.bool)])
    expected = ((q @ key[:, :, read].mT) * 0.5).softmax(-1) @ value[:, :, read]
    torch.testing.assert_close(got, expected)


class Stub(torch.nn.Module):
    class config:
        image_token_id = 9

        class vision_config:
            patch_size = 2


def test_a_smaller_picture_has_fewer_tokens():
    ids = torch.tensor([[0, 0, 1, *[9] * 16, 5, 6], [1, 2, 3, *[9] * 16, 5, 6]])
    pixels = torch.randn(2, 3, 8, 8)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}
    with down_sampled(0.3).around(Stub(), inputs) as used:
        assert used["pixel_values"].shape == (2, 3, 4, 4)
        assert used["input_ids"].tolist() == [[0, 0, 1, *[9] * 4, 5, 6], [1, 2, 3, *[9] * 4, 5, 6]]
        assert used["attention_mask"].tolist() == [[0, 0, *[1] * 7], [1] * 9]
        torch.testing.assert_close(used["pixel_values"].mean(), pixels.mean(), atol=0.2, rtol=0)


def test_other_pictures_are_others():
    pixels = torch.arange(3.0)[:, None, None, None]
    with other_pictures().around(Stub(), {"pixel_values": pixels}) as used:
        assert (used["pixel_values"] != pixels).all()
