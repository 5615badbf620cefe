"""When a decode step's logits are another layer's: the same query, keys, ranges, scale and mask, and nothing less."""

import pytest
import torch
from torch import fx

from avl_fx.kernels.partitioned_decode.schema import partitioned_decode  # noqa: F401  (registers the operator)
from avl_fx.passes.inherit_scores import _KEY, _NEW_KEY, _QUERY, _SEGMENTS, _beside, _decode_alike

DECODE = torch.ops.avl.partitioned_decode.default
SHARED = (_QUERY, _KEY, _NEW_KEY, _SEGMENTS)


def pair(changed: int | None = None, target=DECODE) -> tuple[fx.Node, fx.Node]:
    """Two layers' decode steps in one graph; the second has another argument ``changed``, and its own values."""
    graph = fx.Graph()
    arguments = [graph.placeholder(f"argument_{i}") for i in range(8)]
    anchor = graph.call_function(DECODE, (*arguments, 0.5))
    theirs = [*arguments, 0.5]
    theirs[2], theirs[4] = graph.placeholder("value"), graph.placeholder("new_value")
    if changed is not None:
        theirs[changed] = 0.25 if changed == 8 else graph.placeholder("another")
    return graph.call_function(target, tuple(theirs)), anchor


def test_two_layers_of_a_block():
    assert _decode_alike(*pair(), SHARED)


@pytest.mark.parametrize("changed", [*SHARED, 5, 8], ids=["query", "key", "new key", "ranges", "mask", "scale"])
def test_one_other_argument_and_the_logits_are_others(changed):
    assert not _decode_alike(*pair(changed), SHARED)


def test_own_queries_and_keys_do_not_matter_where_visual_logits_are_inherited():
    for own in (_QUERY, _KEY, _NEW_KEY):
        assert _decode_alike(*pair(own), (_SEGMENTS,))
    assert not _decode_alike(*pair(_SEGMENTS), (_SEGMENTS,))


@pytest.mark.parametrize("target", [torch.ops.avl.attention.default, torch.add])
def test_another_kernel(target):
    lazy, anchor = pair(target=target)
    assert not _decode_alike(lazy, anchor, SHARED)
    assert not _decode_alike(anchor, lazy, SHARED)


def test_keys_beside_each_other():
    """One product of twice the head dim gives each logit from the right pair, whatever the other keys hold."""
    generator = torch.Generator().manual_seed(0)
    own_q, own_k, anchor_q, anchor_k = (torch.randn(2, 3, 7, 4, generator=generator) for _ in range(4))
    flags = torch.rand(2, 7, generator=generator) > 0.5
    own_k = own_k.masked_fill(flags[:, None, :, None], torch.nan)
    anchor_k = anchor_k.masked_fill(~flags[:, None, :, None], torch.nan)
    logits = torch.cat([own_q, anchor_q], -1) @ _beside(flags, own_k, anchor_k).transpose(-1, -2)
    wanted = torch.where(flags[:, None, None], anchor_q @ anchor_k.mT, own_q @ own_k.mT)
    torch.testing.assert_close(logits, wanted)
