"""Which rows of a decoder's input embeddings are no token's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avl_fx.modality import given as given_positions
from avl_fx.spliced_rows import SplicedRows, _embedded, fingerprints

HIDDEN = 12


class Decoder(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(50, HIDDEN).requires_grad_(False).to(dtype)
        self.embed.weight.copy_(torch.randn(50, HIDDEN, generator=generator))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        raise AssertionError("asked for its arguments alone")


@pytest.fixture
def decoder():
    return watched(Decoder())


@pytest.fixture(autouse=True)
def nothing_embedded():
    token = _embedded.set(None)
    yield
    _embedded.reset(token)


def watched(decoder):
    (handle,) = SplicedRows.watch(decoder)
    decoder.handle = handle
    return decoder


def positions(decoder, *args, **kwargs):
    found = SplicedRows(decoder).positions(args, kwargs)
    return None if found is None else found.int().tolist()


def image(*shape):
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_whatever_is_spliced_in_is_found(dtype, data):
    """Over embeddings in place, or between those of pieces; of any dtype."""
    _embedded.set(None)
    decoder = watched(Decoder(dtype))
    flags = data.draw(st.lists(st.booleans(), min_size=2, max_size=20).filter(lambda x: not all(x)))
    flags = torch.tensor(flags)
    ids = torch.randint(50, flags.shape)
    if data.draw(st.booleans(), label="in place"):
        embeds = decoder.embed(ids[None])
        embeds[0, flags] = image(int(flags.sum())).to(dtype)
    else:
        embeds = image(1, len(flags)).to(dtype)
        for at in (~flags).nonzero().flatten().tolist():
            embeds[0, at] = decoder.embed(ids[at])
    assert positions(decoder, inputs_embeds=embeds) == [flags.int().tolist()]
    assert positions(decoder, None, None, embeds.repeat(3, 1, 1)) == [flags.int().tolist()] * 3, "beams"


def test_padding_is_not_visual(decoder):
    embeds = decoder.embed(torch.arange(6).repeat(2, 1))
    embeds[:, 2:4] = image(2, 2)
    embeds[0, 0] = 0
    embeds[1, :1] = image(1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    wanted = [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]
    assert positions(decoder, inputs_embeds=embeds, attention_mask=mask) == wanted
    past = torch.cat([torch.zeros(2, 9, dtype=mask.dtype), mask], 1)
    assert positions(decoder, inputs_embeds=embeds, attention_mask=past) == wanted, "behind nine others"
    seen = [[0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0]]
    for of_another_kind in (None, mask[:, None, None, :], mask[:, 1:], {"full": mask}):
        assert positions(decoder, inputs_embeds=embeds, attention_mask=of_another_kind) == seen


def test_a_prompt_in_pieces_and_the_next_one(decoder):
    embeds = decoder.embed(torch.arange(8)[None])
    embeds[:, 3:6] = image(1, 3)
    assert positions(decoder, inputs_embeds=embeds[:, :4]) == [[0, 0, 0, 1]]
    assert positions(decoder, inputs_embeds=embeds[:, 4:]) == [[1, 1, 0, 0]]
    after = decoder.embed(torch.arange(20, 23)[None])
    assert positions(decoder, inputs_embeds=after) == [[0, 0, 0]]
    assert len(_embedded.get().rows) == 1, "what belonged to the prompt before is forgotten"


def test_what_is_not_known(decoder):
    assert positions(decoder, inputs_embeds=image(1, 4)) is None, "nothing was embedded"
    embeds = decoder.embed(torch.arange(4)[None])
    assert positions(decoder, inputs_embeds=embeds * 2) is None, "somebody changed all of them"
    assert positions(decoder, inputs_embeds=embeds[:, :1]) is None, "a decode step"
    assert positions(decoder, torch.arange(4)[None]) is None, "token ids"
    assert positions(decoder, 1, 2, 3, 4, 5) is None, "more than it takes"
    assert positions(decoder, inputs_embeds=embeds[0]) is None


def test_what_is_computed_inside_of_a_graph_is_not_remembered(decoder):
    torch.compile(decoder.embed, backend="eager")(torch.arange(4))
    assert _embedded.get() is None
    decoder.handle.remove()
    decoder.embed(torch.arange(4))
    assert _embedded.get() is None


def test_decoders_without_an_embedding_are_not_watched():
    class Bare(nn.Module):
        def get_input_embeddings(self):
            raise NotImplementedError

    assert SplicedRows.watch(Bare()) == SplicedRows.watch(nn.Linear(2, 2)) == ()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fingerprints_tell_rows_apart(width, dtype):
    rows = torch.eye(width + 1, width).to(dtype)
    found = fingerprints(rows)
    assert found.shape == (width + 1,)
    assert found[-1] == 0
    assert found.unique().numel() == width + 1
    assert torch.equal(fingerprints(rows.t().contiguous().t()), found), "however it lies in memory"
    assert given_positions() is None
