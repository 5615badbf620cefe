"""Which token ids stand for images, videos and audio, as a model's configuration names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["audio_token_ids", "visual_token_ids"]

_VISUAL = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_AUDIO = ("audio_token_id", "audio_token_index")


def visual_token_ids(config: Any) -> frozenset[int]:
    """Ids of image and video tokens, named by ``config`` or by its parts (Phi-4 multimodal)."""
    return _named(config, _VISUAL)


def audio_token_ids(config: Any) -> frozenset[int]:
    """Ids of tokens that stand for audio alone, named by ``config`` or by its parts."""
    return _named(config, _AUDIO) - visual_token_ids(config)


def _named(config: Any, names: tuple[str, ...]) -> frozenset[int]:
    own = (getattr(config, name, None) for name in names)
    return frozenset(i for i in own if isinstance(i, int)).union(*(_named(part, names) for part in _parts(config)))


def _parts(config: Any) -> Iterator[Any]:
    # Code of its own need not list the parts of its configuration.
    for name in dict.fromkeys((*getattr(config, "sub_configs", ()), "vision_config")):
        if (part := getattr(config, name, None)) is not None:
            yield part
