"""Features that are added under a mask are added everywhere, to the bit; whatever is not quite that stays as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from avl_fx import Plan
from avl_fx.passes.add_features import add_features
from tests.passes._graphs import Rewritten, counts, rewrite

BATCH, TOKENS, DIM = 2, 7, 4
PLAN = Plan.avl(core=0.3, secondary=0.5, refresh=3, prefill=0.5)
MASK = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)


def written(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """As Qwen3-VL does it."""
    h = h.clone()
    h[mask, :] = h[mask, :] + features
    return h * 2


def written_short(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    h = h.clone()
    h[mask] = features + h[mask]
    return h * 2


def written_in_turn(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    for factor in (1.0, 0.5):
        h = h * 3
        h = written(h, mask, features * factor)
    return h


def scattered(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """As Granite 4 Vision does it."""
    wide = mask.unsqueeze(-1)
    return h.masked_scatter(wide, (h[wide.squeeze(-1)] + features).view(-1)) * 2


def scattered_by_rows(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    return h.masked_scatter(mask.unsqueeze(-1), h[mask] + features) * 2


ACCEPTED = {written: 1, written_short: 1, written_in_turn: 2, scattered: 1, scattered_by_rows: 1}


def multiplied(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    h = h.clone()
    h[mask] = h[mask] * features
    return h


def another_mask(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    h = h.clone()
    h[mask] = h[mask.flip(0).flip(1)] + features
    return h


def another_tensor(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    copy[mask] = (h * 2)[mask] + features
    return copy


def not_its_own(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    h[mask] = h[mask] + features
    return h * 2


def read_before(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    before = copy * 2
    copy[mask] = copy[mask] + features
    return copy + before


def seen_through_a_view(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    first = copy[:, 0]
    copy[mask] = copy[mask] + features
    return copy + first[:, None]


def written_again(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    copy[mask] = copy[mask] + features
    copy.mul_(2.0)
    return copy


def the_copied_is_written(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    h = h * 2
    copy = h.clone()
    h.mul_(3.0)
    copy[mask] = copy[mask] + features
    return copy + h


def the_mask_is_written(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    mask, copy = mask.clone(), h.clone()
    total = copy[mask] + features
    mask.copy_(mask.flip(0).flip(1))
    copy[mask] = total
    return copy


def features_are_written(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    features, copy = features * 2, h.clone()
    total = copy[mask] + features
    features.mul_(2.0)
    copy[mask] = total
    return copy + features.sum()


def rows_are_read(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    rows = copy[mask]
    copy[mask] = rows + features
    return copy + rows.sum()


def the_sum_is_read(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    total = copy[mask] + features
    copy[mask] = total
    return copy + total.sum()


def other_dtype(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    copy[mask] = copy[mask] + features.half()
    return copy


def one_vector(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    copy[mask] = copy[mask] + features[0]
    return copy


def weighed(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    copy = h.clone()
    copy[mask] = torch.add(copy[mask], features, alpha=2)
    return copy


def into_other_places(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    other = mask.flip(0).flip(1).unsqueeze(-1)
    return h.masked_scatter(other, (h[mask] + features).view(-1))


REFUSED = (
    multiplied,
    another_mask,
    another_tensor,
    not_its_own,
    read_before,
    seen_through_a_view,
    written_again,
    the_copied_is_written,
    the_mask_is_written,
    features_are_written,
    rows_are_read,
    the_sum_is_read,
    other_dtype,
    one_vector,
    weighed,
    into_other_places,
)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(BATCH, TOKENS, DIM, generator=generator)
    return h, MASK.clone(), torch.randn(int(MASK.sum()), DIM, generator=generator)


def run(body, plan: Plan = PLAN, decode: bool = False) -> Rewritten:
    """The graph behind the pass; what it computes is what eager computes, to the bit."""

    def edit(ctx) -> None:
        ctx.partition, ctx.compact = SimpleNamespace(decode=decode), object()

    expected = body(*inputs())
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        done = rewrite(
            body, *inputs(), stages=(add_features,), plan=plan, mark=[(0, 0), (0, 1), (1, 0), (1, 1)], edit=edit
        )
    assert torch.equal(done.outputs[0], expected)
    return done


@pytest.mark.parametrize("body", ACCEPTED, ids=lambda body: body.__name__)
def test_features_are_added_everywhere(body):
    done = run(body)
    assert done.result("add_features").count == ACCEPTED[body]
    assert done.new_guards == 0
    assert "setitem" not in counts(done.gm)
    assert "masked_scatter" not in counts(done.gm)


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: body.__name__)
def test_anything_else_stays_as_it_was(body):
    assert run(body).result("add_features").count == 0


@pytest.mark.parametrize("case", [(Plan.identity(), False), (Plan.avl(core=0.3, secondary=0.5), False), (PLAN, True)])
def test_only_prompts_that_drop_tokens_are_touched(case):
    assert run(written, *case).result("add_features").count == 0


def test_features_that_do_not_fit_are_an_error():
    """As they are in the model: neither left out nor repeated."""
    h, mask, features = inputs()
    done = run(written)
    given = {"L_h_": h, "L_mask_": mask, "L_features_": features}
    order = [n.target for n in done.gm.graph.nodes if n.op == "placeholder"]
    ordered = [given.get(name, BATCH if i == 0 else TOKENS) for i, name in enumerate(order)]
    assert torch.equal(done.gm.forward(*ordered)[0], written(*inputs()))
    given["L_mask_"] = mask.index_fill(1, torch.tensor([0]), True)
    with pytest.raises(RuntimeError):
        done.gm.forward(*[given.get(name, old) for name, old in zip(order, ordered, strict=True)])
