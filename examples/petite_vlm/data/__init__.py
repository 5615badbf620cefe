"""The data sets of the petite model: easy-VQA, and five more over three tasks.

All are made of pinned packages and held out by picture; what is read, also by word and by font.
"""

from __future__ import annotations

from .captions import Captions
from .documents import Documents
from .easy_vqa import EasyVqa, easy_vqa_dir, load_questions, open_image
from .questions import Dataset, Question, Split, by_image, shuffled_partner
from .regions import Located
from .scenes import Composites, Scenes
from .sheets import Sheets
from .words import Words

DATASETS: dict[str, Dataset] = {
    d.name: d for d in (EasyVqa(), Composites(), Captions(), Scenes(), Words(), Documents())
}
"""Every data set, by name."""

LOCATED: dict[str, Located] = {d.name: d for d in (Composites(), Scenes(), Words(), Documents(), Sheets())}
"""Those that know where their things are, and sheets of type, of which nothing is asked."""

__all__ = [
    "DATASETS",
    "LOCATED",
    "Dataset",
    "Question",
    "Split",
    "by_image",
    "easy_vqa_dir",
    "load_questions",
    "open_image",
    "shuffled_partner",
]
