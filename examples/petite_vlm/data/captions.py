"""Single stamps with their descriptions, none of which was trained on: what a model can only say by looking well."""

from __future__ import annotations

from PIL import Image

from .canvas import SIZE, ground
from .cutouts import stamps
from .questions import Question, Split, Task, seeded


class Captions:
    """One stamp, large, and the first sentence of what its author wrote about it."""

    name = "captions"
    task: Task = "caption"
    max_new_tokens = 24

    def images(self, split: Split) -> int:
        return len(stamps(split))

    def picture(self, split: Split, image: int) -> Image.Image:
        draw = seeded(self.name, split, image)
        canvas = ground(draw)
        with Image.open(stamps(split)[image].file) as stamp:
            scale = draw.uniform(0.7, 0.95) * SIZE / max(stamp.size)
            size = [max(1, round(side * scale)) for side in stamp.size]
            sized = stamp.convert("RGBA").resize((size[0], size[1]), Image.Resampling.LANCZOS)
        canvas.paste(sized, (draw.randint(0, SIZE - size[0]), draw.randint(0, SIZE - size[1])), sized)
        return canvas

    def questions(self, split: Split, image: int) -> list[Question]:
        return [Question(image, "what does the picture show?", stamps(split)[image].caption, "stamp")]
