"""The data sets of the petite model: easy-VQA, and five more over three tasks.

All are made of pinned packages and held out by picture; what is read, also by word and by font.
"""

from __future__ import annotations

from .captions import Captions
from .close_ups import CloseUps
from .documents import Documents
from .easy_vqa import EasyVqa, easy_vqa_dir, load_questions, open_image
from .few import Few
from .questions import Dataset, Question, Split, by_image, shuffled_partner
from .regions import Located
from .scenes import Composites, Scenes
from .sheets import Sheets
from .words import Words

DATASETS: dict[str, Dataset] = {
    d.name: d for d in (EasyVqa(), Composites(), Captions(), Scenes(), Words(), Documents())
}
"""Every data set, by name."""

TRAINING_SETS: dict[str, Dataset] = DATASETS | {d.name: d for d in (CloseUps(), Few(), Sheets())}
"""What a model may be trained on: these, and what prepares it for them."""

LOCATED: dict[str, Located] = {d.name: d for d in (Composites(), Scenes(), Words(), Documents(), Sheets())}
"""Those that know where their things are."""

__all__ = [
    "DATASETS",
    "LOCATED",
    "TRAINING_SETS",
    "Dataset",
    "Question",
    "Split",
    "by_image",
    "easy_vqa_dir",
    "load_questions",
    "open_image",
    "shuffled_partner",
]
