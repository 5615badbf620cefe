"""`docs/models.md`: what every model answers, as a table that is written and read here alone."""

from pathlib import Path

from tests.families._ask import KEPT, QUESTIONS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = f"""# Models

Tiny random models of each architecture, built from transformers' own classes, asked by `python -m tests.families`,
which writes this page; `make test-families` asks again and fails where an answer is another. They run through the
rewritten graph without code generation, float32, up to three rows of different length.

**exact**: every attention layer of the decoder did what the plan asks for, and logits of the prompt and of each
decode step equal eager ones (identity) or an independent eager oracle's. **k of n**: so many layers did, the others
stayed dense for the reason below, and the oracle leaves the same ones dense. **told**: no graph shows which positions
are visual, so that everything is dense until `avl_fx.modality_ids` says it. Nothing here says what a plan costs in
answers.

- *identity*: nothing is left out; every cache that the stock model takes (none, dynamic, static).
- *lazy*: every layer behind the first that attends to everything inherits from it, `DynamicCache`.
- *A-VL*: core 0.3, secondary 0.5, a refresh every third step; *text window*: half of the text; *prompt filtered*:
  {KEPT:g} of the visual tokens go on behind layer 0, `AVLCache`.

Asked with the releases of `constraints.txt`, but apertus1p5, which transformers has from 5.24 on. Not asked: Qwen4-Exp,
whose indexer loops over queries in Python, so that no graph holds its attention and those layers run as the model wrote
them; HunYuan V4-VL and Inkling 2 Loop (sinks, as inkling2); Cosmos 3 Omni, IDEFICS and InstructBLIP-Video; encoders
with decoders (Florence-2, T5Gemma 2, UDOP) and captioners (BLIP, GIT, Pix2Struct); what does not decode token by token
(DiffusionGemma, PI0).
"""


def write(answers: dict[str, dict[str, str]], path: Path = PAGE) -> None:
    """``answers``: model -> question -> answer."""
    notes: dict[str, int] = {}
    lines = ["| model | " + " | ".join(QUESTIONS) + " |", "|---" * (len(QUESTIONS) + 1) + "|"]
    for name in sorted(answers):
        cells = []
        for question in QUESTIONS:
            share, _, why = answers[name][question].partition(": ")
            cells.append(f"{share} [{notes.setdefault(why, len(notes) + 1)}]" if why else share)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons = [f"{number}. {why}" for why, number in notes.items()]
    path.write_text("\n".join([_HEAD, *lines, "", "Reasons:", "", *reasons, ""]))


def read(path: Path = PAGE) -> dict[str, dict[str, str]]:
    """What `write` wrote."""
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| model |"))
    reasons = dict(line.split(". ", 1) for line in lines[first:] if line[:1].isdigit())
    found = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        split = [cell.rstrip("]").partition(" [") for cell in cells]
        said = [f"{share}: {reasons[note]}" if note else share for share, _, note in split]
        found[name] = dict(zip(QUESTIONS, said, strict=True))
    return found
