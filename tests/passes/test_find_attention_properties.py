"""However a model writes its attention, the passes recognise it exactly, or leave it alone and say why."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.pipeline import STAGES
from avl_fx.passes.site import Status
from tests.passes._graphs import Rewritten, check, counts
from tests.passes._spellings import BOOLEAN, CACHES, MASKS, Spelling

EXAMPLES = int(os.environ.get("AVL_EXAMPLES", "50"))
"""Generated modules a property; raise it to search longer."""

SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="AVL_EXAMPLES" not in os.environ,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def pick(*values: object) -> st.SearchStrategy:
    return st.sampled_from(values)


@st.composite
def spellings(draw: st.DrawFn, **fixed: object) -> Spelling:
    """Any spelling that runs in eager."""
    style = fixed.get("style") or draw(pick("sdpa", "softmax"))
    kv_heads = draw(pick(1, 2, 3))
    groups = draw(pick(1, 2, 4))
    head_dim = draw(pick(8, 16))
    fields: dict[str, object] = {
        "style": style,
        "layout": draw(pick("bhsd", "transpose", "permute", "linear")),
        "heads": kv_heads * groups,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": draw(pick(head_dim, head_dim, 24)),
        "batch": draw(pick(1, 2)),
        "queries": draw(pick(1, 5)),
        "dtype": draw(pick(torch.float32, torch.float32, torch.bfloat16)),
        "repeat": draw(
            pick("expand", "expand", "unsqueeze", "interleave", "flatten", *(["gqa"] if style == "sdpa" else []))
        ),
        "after_repeat": draw(pick("none", "none", "contiguous", "slice")),
        "scale": draw(pick(None, None, 0.3)),
        "mask": draw(st.sampled_from(MASKS)),
        "masking": draw(pick("add", "radd", "inplace", *BOOLEAN)),
        "mask_in_graph": draw(st.booleans()),
        "cache": draw(st.sampled_from(CACHES)),
        "dynamic": draw(pick("no", "no", "mark", "all")),
        "output": draw(pick("transpose", "plain")),
    }
    if style == "softmax":
        fields |= {
            "scaling": draw(pick("mul", "rmul", "div", "inplace", "query", "key", "key_and_query", "none")),
            "transpose": draw(pick("(2, 3)", "(-1, -2)", "mT", "permute")),
            "product": draw(pick("torch.matmul", "@", "method")),
            "softmax": draw(pick("functional", "torch", "method", "module")),
            "maximum": draw(pick("kept", "kept", "max", "amax")),
            "upcast": draw(pick("none", "dtype", "logits")),
            "dropout": draw(pick("none", "zero", "eval", "module")),
        }
    return Spelling(**{**fields, **fixed})  # type: ignore[arg-type]


def run(spelling: Spelling, stages: tuple = (find_attention,), **kwargs: object) -> Rewritten:
    """Rewrite the module that ``spelling`` describes and hold it against eager."""
    return check(
        spelling.module(),
        *spelling.inputs(),
        dtype=spelling.dtype,
        stages=stages,
        mark=spelling.marks(),
        dynamic=True if spelling.dynamic == "all" else None,
        **kwargs,  # type: ignore[arg-type]
    )


def assert_recognised(rewritten: Rewritten, spelling: Spelling) -> None:
    site = rewritten.site
    assert site.reason is None, f"{site.reason} {site.detail}"
    found = {name: getattr(site, name) for name in spelling.expected()}
    found["scale"] = pytest.approx(found["scale"])
    assert found == spelling.expected()
    if spelling.dynamic == "no":
        assert (site.batch, site.queries, site.keys) == (spelling.batch, spelling.queries, spelling.keys)


SDPA, SOFTMAX = Spelling(mask="causal"), Spelling(style="softmax", mask="causal", scale=0.3, upcast="dtype")
CHANGES: dict[str, tuple[object, ...]] = {
    "layout": ("bhsd", "permute", "linear"),
    "kv_heads": (1, 4),
    "value_dim": (24,),
    "queries": (1,),
    "dtype": (torch.bfloat16, torch.float16),
    "repeat": ("unsqueeze", "interleave", "flatten"),
    "after_repeat": ("contiguous", "slice"),
    "scale": (0.7,),
    "mask": tuple(m for m in MASKS if m != "causal"),
    "masking": ("radd", "inplace", *BOOLEAN),
    "mask_in_graph": (True,),
    "cache": CACHES[1:],
    "dynamic": ("mark", "all"),
    "output": ("plain",),
}
SOFTMAX_CHANGES: dict[str, tuple[object, ...]] = {
    "scaling": ("rmul", "div", "inplace", "query", "key", "key_and_query", "none"),
    "transpose": ("(-1, -2)", "mT", "permute"),
    "product": ("@", "method"),
    "softmax": ("torch", "method", "module"),
    "maximum": ("max", "amax"),
    "upcast": ("none", "logits"),
    "dropout": ("zero", "eval", "module"),
}


def one_change(base: Spelling, changes: dict[str, tuple[object, ...]]) -> list[object]:
    return [
        pytest.param(dataclasses.replace(base, **{name: value}), id=f"{base.style}-{name}-{value}")  # type: ignore[arg-type]
        for name, values in changes.items()
        for value in values
    ]


@pytest.mark.parametrize(
    "spelling",
    [
        *one_change(SDPA, {**CHANGES, "repeat": (*CHANGES["repeat"], "gqa")}),
        *one_change(SOFTMAX, {**CHANGES, **SOFTMAX_CHANGES}),
    ],
)
def test_one_change_at_a_time(spelling: Spelling) -> None:
    """Readable failures, before hypothesis mixes everything."""
    rewritten = run(spelling)
    if spelling.plain:
        assert_recognised(rewritten, spelling)
    else:
        assert rewritten.site.reason is not None


@SETTINGS
@given(spellings())
def test_every_spelling_is_rewritten_exactly_or_refused(spelling: Spelling) -> None:
    rewritten = run(spelling)
    result = rewritten.result("find_attention")
    if spelling.plain or rewritten.site.status is not Status.REFUSED:
        assert_recognised(rewritten, spelling)
        assert result.count == 1
        (canonical,) = rewritten.canonical
        assert canonical is rewritten.site.node
        left = counts(rewritten.gm)
        assert not left["softmax"], "nothing of the model's own attention stays"
        assert not left["scaled_dot_product_attention"]
        assert not left["matmul"]
    else:
        assert rewritten.site.reason is not None
        assert result.refused == {str(rewritten.site.reason): 1}
        assert not rewritten.canonical


@settings(SETTINGS, max_examples=EXAMPLES // 2)
@given(spellings())
def test_every_spelling_survives_the_whole_pipeline(spelling: Spelling) -> None:
    """Lowered, and traced as Inductor traces it: recorded shapes and layouts hold."""
    rewritten = run(spelling, stages=STAGES, aot=True)
    assert not rewritten.canonical
    assert rewritten.new_guards == 0 or spelling.dynamic == "all"
    if spelling.plain:
        assert rewritten.site.status is Status.REWRITTEN
        assert counts(rewritten.gm)["scaled_dot_product_attention"] == 1
