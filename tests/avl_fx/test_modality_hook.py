"""Which positions of a prompt are visual, as `avl_fx.compile` reads it from the arguments of a model's forward."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from avl_fx.modality import given
from avl_fx.modality_hook import ModalityHook

IDS = torch.tensor([[5, 90, 90, 6], [91, 7, 8, 90]])


class Model(nn.Module):
    """Notes what is known while its forward runs."""

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.seen = []

    def forward(self, input_ids=None, mm_token_type_ids=None, fail=False):
        self.seen.append(given())
        if fail:
            raise RuntimeError("of the model's own")


def known(model, *args, **kwargs):
    handles = ModalityHook.install(model)
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    assert given() is None
    return model.seen[-1]


@pytest.mark.parametrize(
    ("config", "visual"),
    [
        ({"image_token_id": 90}, [90]),
        ({"image_token_index": 90}, [90]),
        ({"image_token_id": 90, "video_token_id": 91}, [90, 91]),
        ({"vision_config": SimpleNamespace(image_token_id=90)}, [90]),  # Phi-4 multimodal
        ({"image_token_id": 91, "vision_config": SimpleNamespace(image_token_id=90)}, [90, 91]),
        ({"sub_configs": ("vlm_config",), "vlm_config": SimpleNamespace(image_token_id=90)}, [90]),  # ColPali, PI0
        ({"image_token_id": 90, "audio_token_id": 91}, [90]),
    ],
)
def test_token_ids_that_the_configuration_names(config, visual):
    got = known(Model(**config), IDS)
    assert torch.equal(got, torch.isin(IDS, torch.tensor(visual)))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"vision_config": {"image_token_id": 90}},
        {"image_token_id": None},
        {"image_token_id": 90, "is_encoder_decoder": True},
        {"image_token_id": 90, "get_text_config": lambda: SimpleNamespace(cross_attention_layers=[1])},
    ],
)
def test_nothing_is_said_where_nothing_is_named(config):
    assert known(Model(**config), IDS) is None


def test_types_of_tokens_go_before_ids():
    """As transformers' processors number them: images are 1, videos 2, and audio, which is no image, 3."""
    types = torch.tensor([[0, 1, 2, 3], [3, 0, 0, 1]])
    visual = torch.tensor([[False, True, True, False], [False, False, False, True]])
    assert torch.equal(known(Model(image_token_id=90), IDS, mm_token_type_ids=types), visual)


def test_a_decode_step_says_nothing():
    assert known(Model(image_token_id=90), IDS[:, :1]) is None


def test_what_was_said_is_taken_back_from_a_forward_that_raises():
    with pytest.raises(RuntimeError, match="own"):
        known(Model(image_token_id=90), IDS, fail=True)
    assert given() is None
