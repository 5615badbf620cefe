"""What the documents say of the repository: links, commands, models and figures."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links to them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        where = (page.parent / name).resolve() if name else page
        assert where.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(where), f"{target}: no such heading"


@each_page
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.M):
        assert TARGETS.issuperset(filter(None, target)), f"make {target}"
    for module in re.findall(r"python -m ((?:benchmarks|examples|tests|avl_fx)[\w.]*)", text):
        path = ROOT.joinpath(*module.rstrip(".").split("."))
        if not path.is_dir():
            path = path.with_suffix(".py")
        assert path.exists() or (ROOT / "kernels" / path.name).exists(), f"python -m {module}"
    for command in re.findall(r"`pytest ([^`]+)`", text):
        for path in re.findall(r"tests/[\w./]+", command):
            assert (ROOT / path).exists(), f"pytest {command}"


def models() -> list[list[str]]:
    """Lines of the table of docs/models.md: model, identity twice, lazy twice, A-VL twice, prompt filtered."""
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    return rows[1:]


def test_the_readme_counts_models_as_their_page_does():
    rows, text = models(), (ROOT / "README.md").read_text(encoding="utf-8")

    def served(column: int) -> str:
        done = [row[column] for row in rows if not row[column].startswith(("0 of", "all tokens"))]
        partly = sum(" of " in answer for answer in done)
        return f"{len(done)}, in {partly} of them some layers" if partly else str(len(done))

    assert f"of {len(rows)} architectures" in text
    for plan, column in (("Plan.identity", 1), ("Plan.lazy", 3), ("Plan.avl", 5), ("prefill=0.5", 7)):
        (line,) = [
            line for line in text.splitlines() if re.match(rf"\| (the same with |nothing: )?`{re.escape(plan)}", line)
        ]
        assert line.endswith(f"| {served(column)} |"), f"{plan}: {served(column)}"


def measured(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def words(page: str) -> str:
    """A page in one line, so that what is said can be looked for wherever lines break."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def span(ratios: list[float], digits: int) -> str:
    return f"{min(ratios):.{digits}f}x to {max(ratios):.{digits}f}x"


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_what_a_second_machine_gains_is_said_too(page):
    text, rows = words(page), measured("decode_intel_xeon")
    assert len(rows) == 5
    for who in ("partitioned", "identity"):
        assert span([row[f"{who}, {c}"]["over_baseline"] for row in rows for c in ("dynamic", "static")], 1) in text


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_decode_steps_take_what_was_measured(page):
    text, rows = words(page), measured("decode")
    caches = ("dynamic", "static")

    def ms(row: dict, name: str) -> float:
        return row[name]["median_ms"]

    over = {
        who: [row[f"{who}, {c}"]["over_baseline"] for row in rows for c in caches]
        for who in ("partitioned", "identity")
    }
    own = [ms(row, f"identity, {c}") / ms(row, f"partitioned, {c}") for row in rows for c in caches]
    assert f"{len(rows)} sizes" in text
    for said in (span(over["partitioned"], 1), span(over["identity"], 1), span(own, 2)):
        assert said in text, said

    for heads, batch, visual in ((12, 4, 11520), (4, 4, 2880)):
        (row,) = [r for r in rows if (r["kv_heads"], r["batch"], r["visual"]) == (heads, batch, visual)]
        baseline, ours = ms(row, row["fastest_baseline"]), min(ms(row, f"partitioned, {c}") for c in caches)
        assert f"{baseline:.1f} ms" in text
        assert f"{ours:.1f} ms ({baseline / ours:.1f}x" in text
    exact = min(ms(row, f"identity, {c}") for c in caches)
    assert f"{exact:.1f} ms ({baseline / exact:.1f}x" in text


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_latent_attention_takes_what_was_measured(page):
    text, rows, caches = words(page), measured("latent_attention"), ("dynamic", "static")
    (row,) = [r for r in rows if (r["batch"], r["visual"]) == (1, 2880)]
    baseline = row[row["fastest_baseline"]]["median_ms"]
    ours = min(row[f"identity, {c}"]["median_ms"] for c in caches)
    assert f"{baseline:.1f} ms" in text
    assert f"{ours:.1f} ms ({baseline / ours:.1f}x)" in text
    if page == "docs/speed.md":
        assert span([r[f"identity, {c}"]["over_baseline"] for r in rows for c in caches], 1) in text
        own = [r[f"identity, {c}"]["median_ms"] / r[f"partitioned, {c}"]["median_ms"] for r in rows for c in caches]
        assert span(own, 1) in text


def test_attention_takes_what_was_measured():
    rows = [row for row in measured("partitioned_attention") if row["way"] == "core"]
    text = words("docs/speed.md")
    assert f"{span([row['over_dense'] for row in rows], 1)} as fast" in text
    assert f"{min(row['over_dense'] for row in rows if row['visual'] >= 2880):.1f}x or more from 2,880" in text
