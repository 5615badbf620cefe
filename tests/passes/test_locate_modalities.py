"""Where visual positions come from: found where the graph tells, and never guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avl_fx.modality import audio_masks
from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.locate_modalities import locate_modalities
from avl_fx.passes.pipeline import STAGES
from tests.passes._graphs import Rewritten, check, rewrite

IMAGE, VIDEO, HIDDEN = 50, 51, 8
IDS = torch.tensor([[1, IMAGE, IMAGE, 4, VIDEO, 6], [7, 8, IMAGE, 9, VIDEO, VIDEO]])
VISUAL, FILM = IDS == IMAGE, IDS == VIDEO
TABLE = torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(0))
PICTURES = 10 + torch.arange(3.0 * HIDDEN).reshape(3, HIDDEN)
FRAMES = 90 + torch.arange(3.0 * HIDDEN).reshape(3, HIDDEN)


class Decoder(nn.Module):
    """One layer of causal attention with a cache that it returns, after ``splice`` has put the images in."""

    def __init__(self, splice: Callable[..., Tensor]) -> None:
        super().__init__()
        self.splice, self.project = splice, nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, ids: Tensor, pictures: Tensor, frames: Tensor) -> Any:
        hidden = self.splice(F.embedding(ids, TABLE), ids, pictures, frames)
        query, key, value = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in self.project(hidden).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return hidden + out.transpose(1, 2).reshape(hidden.shape), key, value


def masked_scatter(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    return embeds.masked_scatter((ids == IMAGE).unsqueeze(-1).expand_as(embeds), pictures)


def masked_scatter_in_place(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    embeds.masked_scatter_((ids == IMAGE)[..., None], pictures)
    return embeds


def where(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    spread = F.pad(pictures[None], (0, 0, 0, 3)).expand(2, 6, HIDDEN)
    return torch.where((ids == IMAGE)[:, :, None], spread, embeds)


def where_method(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    spread = F.pad(pictures[None], (0, 0, 0, 3)).expand(2, 6, HIDDEN)
    return spread.where(ids.eq(IMAGE).unsqueeze(2).expand(2, 6, HIDDEN), embeds)


def image_then_video(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    embeds = masked_scatter(embeds, ids, pictures, frames)
    return embeds.masked_scatter((ids == VIDEO).unsqueeze(-1).expand_as(embeds), frames)


def image_or_video(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    either = (ids == IMAGE) | (ids == VIDEO)
    return embeds.masked_scatter(either.unsqueeze(-1).expand_as(embeds), torch.cat([pictures, frames]))


def where_image_or_video(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    either = torch.logical_or(ids == IMAGE, ids == VIDEO)
    spread = torch.cat([pictures, frames])[None].expand(2, 6, HIDDEN)
    return torch.where(either[..., None], spread, embeds)


def twice_the_same(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    """Deep features on top of the first ones: the same positions again."""
    mask = (ids == IMAGE).unsqueeze(-1).expand_as(embeds)
    return embeds.masked_scatter(mask, pictures) + torch.zeros_like(embeds).masked_scatter(mask, pictures * 2)


def united_in_place(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    mask = ids == IMAGE
    mask |= ids == VIDEO
    return embeds.masked_scatter(mask[..., None], torch.cat([pictures, frames]))


def twice_by_way_of_a_device(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    """As Granite 4 Vision: each layer moves the one mask to where it is itself."""
    mask = (ids == IMAGE).unsqueeze(-1).expand_as(embeds)
    first = embeds.masked_scatter(mask.to(embeds.device), pictures)
    return first + torch.zeros_like(embeds).masked_scatter(mask.to(embeds.device), pictures * 2)


FOUND = {
    masked_scatter: VISUAL,
    masked_scatter_in_place: VISUAL,
    where: VISUAL,
    where_method: VISUAL,
    image_then_video: VISUAL | FILM,
    image_or_video: VISUAL | FILM,
    where_image_or_video: VISUAL | FILM,
    twice_the_same: VISUAL,
    united_in_place: VISUAL | FILM,
    twice_by_way_of_a_device: VISUAL,
}


def arguments() -> tuple[Tensor, ...]:
    return IDS.clone(), PICTURES.clone(), FRAMES.clone()


@pytest.mark.parametrize("splice", FOUND, ids=lambda s: s.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_splices_are_found(splice: Callable[..., Tensor], dynamic: bool) -> None:
    marks = [(0, 1)] if dynamic and "where" not in splice.__name__ else []
    model = Decoder(splice)
    rewritten = check(model, *arguments(), mark=marks)
    assert rewritten.ctx.visual is not None
    assert rewritten.ctx.visual.how == "discovered"
    assert rewritten.site.visual == "discovered"
    assert rewritten.result("locate_modalities").count == 1
    carried = getattr(rewritten.outputs[0], "_avl_visual_positions", None)
    assert carried is not None, "positions ride on the hidden states"
    assert torch.equal(carried, FOUND[splice])


# ---- indexed assignment: a graph of its own where Dynamo breaks on the mask -----------------------------------------


def test_indexed_assignment_is_found() -> None:
    def splice(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
        embeds = embeds.clone()
        embeds[ids == IMAGE] = pictures
        return embeds

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        rewritten = check(Decoder(splice), *arguments())
    assert rewritten.ctx.visual is not None
    assert torch.equal(rewritten.outputs[0]._avl_visual_positions, VISUAL)


def halves_of_experts(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    """As Ernie 4.5 puts together what its experts of images and its experts of text made."""
    mixed = torch.zeros_like(embeds)
    mixed[ids != IMAGE] = embeds[ids != IMAGE]
    mixed[ids == IMAGE] = pictures
    return mixed


def text_assigned(embeds: Tensor, ids: Tensor, pictures: Tensor, frames: Tensor) -> Tensor:
    embeds = embeds.clone()
    embeds[~(ids == IMAGE)] = embeds[~(ids == IMAGE)] * 2
    return embeds


@pytest.mark.parametrize("splice", [halves_of_experts, text_assigned], ids=lambda s: s.__name__)
def test_indexed_assignment_of_text_is_no_splice(splice: Callable[..., Tensor]) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        rewritten = check(Decoder(splice), *arguments())
    assert rewritten.ctx.visual is None


# ---- what must not match --------------------------------------------------------------------------------------------


def padding_zeroed(embeds, ids, pictures, frames):
    embeds = embeds.clone()
    embeds[ids == 1] = 0.0
    return embeds


def mask_token(embeds, ids, pictures, frames):
    embeds = embeds.clone()
    embeds[ids == 1] = pictures[0]
    return embeds


def padding_zeroed_by_where(embeds, ids, pictures, frames):
    return torch.where((ids == 1)[..., None], torch.zeros_like(embeds), embeds)


def padding_zeroed_by_a_number(embeds, ids, pictures, frames):
    return torch.where((ids == 1)[..., None], 0.0, embeds)


def text_put_into_images(embeds, ids, pictures, frames):
    """The same splice, said the other way round: the mask is that of the text."""
    spread = F.pad(pictures[None], (0, 0, 0, 3)).expand(2, 6, HIDDEN)
    return torch.where(~(ids == IMAGE)[:, :, None], embeds, spread)


def text_put_into_images_by_not_equal(embeds, ids, pictures, frames):
    spread = F.pad(pictures[None], (0, 0, 0, 3)).expand(2, 6, HIDDEN)
    return torch.where((ids != IMAGE)[:, :, None], embeds, spread)


def where_from_values(embeds, ids, pictures, frames):
    return torch.where(embeds == embeds.amax(dim=-1, keepdim=True), embeds * 2, embeds)


def where_on_the_ids(embeds, ids, pictures, frames):
    return F.embedding(torch.where(ids == IMAGE, 0, ids), TABLE)


def scatter_over_hidden_units(embeds, ids, pictures, frames):
    """Rank 2: not embeddings of a sequence."""
    return embeds + torch.zeros(6, HIDDEN).masked_scatter(torch.ones(6, 1).bool(), pictures.repeat(2, 1))


def mask_written_later(embeds, ids, pictures, frames):
    """What it says here is not what it says behind the splice."""
    mask = ids == IMAGE
    embeds = embeds.masked_scatter(mask[..., None], pictures)
    mask.logical_or_(ids == 1)
    return embeds + mask[..., None]


def no_splice(embeds, ids, pictures, frames):
    return embeds + 1


NOT_FOUND = [
    padding_zeroed,
    mask_token,
    padding_zeroed_by_where,
    padding_zeroed_by_a_number,
    text_put_into_images,
    text_put_into_images_by_not_equal,
    where_from_values,
    where_on_the_ids,
    scatter_over_hidden_units,
    mask_written_later,
    no_splice,
]


@pytest.mark.parametrize("splice", NOT_FOUND, ids=lambda s: s.__name__)
def test_positions_are_not_guessed(splice: Callable[..., Tensor]) -> None:
    rewritten = check(Decoder(splice), *arguments())
    assert rewritten.ctx.visual is None
    assert rewritten.site.visual == "none"
    assert rewritten.result("locate_modalities").count == 0
    assert not hasattr(rewritten.outputs[0], "_avl_visual_positions")


class TwoSequences(Decoder):
    """A vision tower that hides some of its patches, before the decoder gets the rest."""

    def forward(self, ids: Tensor, pictures: Tensor, frames: Tensor) -> Any:
        patches = torch.stack([pictures, frames])
        patches = patches.masked_scatter((patches[..., :1] > 50).expand_as(patches), frames)
        return super().forward(ids, patches[0], patches[1])


def test_only_splices_into_the_decoders_sequence_count() -> None:
    rewritten = check(TwoSequences(masked_scatter), *arguments())
    assert torch.equal(rewritten.outputs[0]._avl_visual_positions, VISUAL)


def test_splices_into_two_sequences_without_a_decoder_are_unknown() -> None:
    def function(ids: Tensor, pictures: Tensor, frames: Tensor) -> Any:
        patches = torch.stack([pictures, frames])
        patches = patches.masked_scatter((patches[..., :1] > 50).expand_as(patches), frames)
        return masked_scatter(F.embedding(ids, TABLE), ids, pictures, frames), patches

    assert check(function, *arguments()).ctx.visual is None


# ---- audio: spliced in as images are, and text to a plan ------------------------------------------------------------


def with_audio(ctx: Any) -> None:
    ctx.audio_ids = frozenset({VIDEO, 40})


def in_views(embeds, ids, pictures, frames):
    mask = ids.eq(VIDEO).unsqueeze(-1)
    embeds = embeds.masked_scatter(mask.expand_as(embeds).to(embeds.device), frames)
    return masked_scatter(embeds, ids, pictures, frames)


def of_two_tokens(embeds, ids, pictures, frames):
    either = ((ids == VIDEO) | (ids == 40))[..., None]
    return masked_scatter(embeds, ids, pictures, frames).masked_scatter(either, frames)


@pytest.mark.parametrize("splice", [image_then_video, in_views, of_two_tokens], ids=lambda s: s.__name__)
def test_audio_is_not_visual(splice: Callable[..., Tensor]) -> None:
    rewritten = check(Decoder(splice), *arguments(), edit=with_audio)
    assert torch.equal(rewritten.outputs[0]._avl_visual_positions, VISUAL)


def united_by_name(embeds, ids, pictures, frames):
    either = torch.logical_or(input=ids == VIDEO, other=ids == IMAGE)
    return embeds.masked_scatter(either.unsqueeze(-1), torch.cat([pictures, frames]))


def united_with_audio_in_place(embeds, ids, pictures, frames):
    mask = ids == VIDEO
    mask.logical_or_(ids == IMAGE)
    return embeds.masked_scatter(mask[..., None], torch.cat([pictures, frames]))


@pytest.mark.parametrize(
    "splice", [image_or_video, united_by_name, united_with_audio_in_place], ids=lambda s: s.__name__
)
def test_one_mask_of_images_and_audio_is_visual(splice: Callable[..., Tensor]) -> None:
    """Nothing tells them apart, and features of images are among them."""
    rewritten = check(Decoder(splice), *arguments(), edit=with_audio)
    assert torch.equal(rewritten.outputs[0]._avl_visual_positions, VISUAL | FILM)


def test_masks_of_audio_are_known_to_the_next_graph() -> None:
    def masks(ids: Tensor) -> Any:
        return ids == IMAGE, (ids == VIDEO)[..., None], ids + 1

    def scatter(embeds: Tensor, picture: Tensor, pictures: Tensor, sound: Tensor, frames: Tensor) -> Any:
        embeds = embeds.masked_scatter(picture[..., None], pictures)
        return embeds.masked_scatter(sound, frames), sound.squeeze(-1)

    first = check(masks, IDS.clone(), edit=with_audio)
    assert first.ctx.returned_audio_masks == (1,)
    picture, sound, _ = first.outputs
    assert audio_masks([IDS, sound, picture]) == {1}

    def edit(ctx: Any) -> None:
        ctx.audio_masks = audio_masks(inputs)

    inputs = F.embedding(IDS, TABLE), picture, PICTURES.clone(), sound, FRAMES.clone()  # as the graph takes them
    second = rewrite(scatter, *inputs, edit=edit)
    assert torch.equal(second.outputs[0]._avl_visual_positions, VISUAL)
    assert audio_masks(second.outputs) == {1}, "and to the one behind it"


# ---- positions from elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["carried", "given"])
def test_positions_from_elsewhere_serve_graphs_that_show_none(how: str) -> None:
    def edit(ctx: Any) -> None:
        ctx.carried_visual = how

    rewritten = rewrite(Decoder(no_splice), *arguments(), edit=edit)
    assert rewritten.site.visual == how
    assert rewritten.ctx.visual is not None
    assert rewritten.ctx.visual.node is None


def test_what_the_graph_shows_wins() -> None:
    def edit(ctx: Any) -> None:
        ctx.carried_visual = "given"

    assert rewrite(Decoder(masked_scatter), *arguments(), edit=edit).site.visual == "discovered"


def test_the_mask_survives_until_the_last_stage() -> None:
    """No node uses it before `finish_outputs`: dead code elimination must spare it."""
    stages = (find_attention, locate_modalities, *STAGES[2:])
    rewritten: Rewritten = rewrite(Decoder(image_then_video), *arguments(), stages=stages)
    assert rewritten.ctx.visual is not None
    assert rewritten.ctx.visual.node in list(rewritten.gm.graph.nodes)


def test_a_vision_tower_has_no_visual_positions() -> None:
    """Only decoder sites see visual keys by position."""

    class Tower(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
            x = x.masked_scatter(mask, features)
            query = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(query, query, query)

    rewritten = check(Tower(), torch.randn(2, 6, HIDDEN), VISUAL[..., None].expand(2, 6, HIDDEN), PICTURES)
    assert rewritten.site.role == "encoder"
    assert rewritten.site.visual == "none"
