"""Which token ids stand for audio, as a configuration names them."""

from types import SimpleNamespace

import pytest

from avl_fx.token_ids import audio_token_ids


def nested(**names):
    return SimpleNamespace(sub_configs={"audio_config": None, "left_out": None}, audio_config=SimpleNamespace(**names))


@pytest.mark.parametrize(
    ("config", "audio"),
    [
        (None, set()),
        (SimpleNamespace(audio_token_id=7), {7}),
        (SimpleNamespace(audio_token_index=7, image_token_id=8), {7}),
        (SimpleNamespace(audio_token_id=None), set()),
        (nested(audio_token_id=7), {7}),
        (SimpleNamespace(audio_token_id=8, image_token_id=8), set()),  # one placeholder for everything
    ],
)
def test_ids_of_audio(config, audio):
    assert audio_token_ids(config) == audio
