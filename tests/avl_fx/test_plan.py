"""The plan: round trips, presets, and a typed error for everything that is wrong with one."""

import copy
import json
import pickle
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx import plan as plan_module
from avl_fx.errors import PlanError, PlanFileError, PlanMismatchError, UnsupportedPlanError
from avl_fx.plan import LazyPolicy, Plan, PrefillFilter, TextPolicy, VisionPolicy

# ---- any valid plan --------------------------------------------------------------------------------------------------

ratios = st.floats(min_value=0, max_value=1, exclude_min=True, allow_nan=False)


@st.composite
def lazy_policies(draw):
    edges = draw(st.lists(st.integers(0, 200), unique=True, max_size=8).map(sorted))
    blocks = list(zip(edges[0::2], edges[1::2], strict=False))
    return LazyPolicy(
        blocks=tuple(draw(st.permutations(blocks))), mode=draw(st.sampled_from(["gla", "vla", "vla_scores"]))
    )


@st.composite
def plans(draw):
    core, secondary, keep = sorted(draw(st.tuples(ratios, ratios, ratios)))
    vision = VisionPolicy(
        core=core,
        secondary=secondary,
        refresh=draw(st.integers(0, 9)),
        scoring_window=draw(st.integers(1, 64)),
        spread=draw(st.floats(0, 1)),
        scores=draw(st.sampled_from(["shared", "per_kv_head"])),
    )
    text = TextPolicy(
        budget=draw(ratios), minimum=draw(st.integers(0, 99)), decay=draw(st.sampled_from(["forgetting", "none"]))
    )
    prefill = PrefillFilter(after_layer=draw(st.integers(0, 200)), keep=keep)
    return Plan(
        num_layers=draw(st.none() | st.integers(202, 999)),
        lazy=draw(st.none() | lazy_policies()),
        vision=draw(st.sampled_from([None, vision])),
        text=draw(st.sampled_from([None, text])),
        prefill=draw(st.sampled_from([None, prefill])),
        description=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=30)),
    )


@settings(deadline=None)  # other work may share the cores
@given(plans())
def test_round_trips(plan):
    text = plan.to_json()
    for twin in (
        Plan.from_json(text),
        Plan.from_dict(json.loads(text)),
        Plan.resolve(json.loads(text)),
        Plan.resolve(text),
        Plan.model_validate_json(text),
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
        copy.copy(plan),
    ):
        assert twin == plan
        assert hash(twin) == hash(plan)
        assert twin.fingerprint() == plan.fingerprint()
        assert twin.to_json() == text
        assert repr(twin) == repr(plan)


@settings(deadline=None)
@given(plans())
def test_questions_agree(plan):
    assert plan.is_lossless or not plan.is_identity
    if plan.is_identity:
        plan.check_supported()
    if plan.lazy_policy:
        lazy = plan.lazy_policy
        assert lazy.blocks == tuple(sorted(lazy.blocks))
        assert set(lazy.anchors).isdisjoint(lazy.lazy_layers)
        members = {layer: first for first, last in lazy.blocks for layer in range(first + 1, last + 1)}
        for layer in range(202):
            assert lazy.anchor_of(layer) == members.get(layer)
            assert lazy.is_lazy(layer) == (layer in lazy.lazy_layers)
    assert plan.combine(plan).fingerprint() == plan.fingerprint()
    assert plan.combine(Plan.identity()) == plan == Plan.identity().combine(plan)


@settings(deadline=None)
@given(plans(), st.text(max_size=5).filter(str.isascii))
def test_fingerprint_ignores_the_description(plan, note):
    other = Plan.from_dict({**json.loads(plan.to_json()), "description": note})
    assert other.fingerprint() == plan.fingerprint()


def test_files_round_trip(tmp_path):
    plan = Plan.lazy([(20, 30), [4, 12]], num_layers=32, description="köln, 中")
    path = tmp_path / "plan.json"
    assert plan.to_json(path) == path.read_text(encoding="utf-8")
    for spec in (path, str(path)):
        assert Plan.from_json(spec) == plan
        assert Plan.resolve(spec) == plan
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # what some editors on Windows put first
    assert Plan.from_json(path) == plan


def test_json_is_pleasant_to_read():
    expected = '{\n  "version": 1,\n  "lazy": {\n    "blocks": [\n      [4, 12]\n    ],\n    "mode": "gla"\n  }\n}\n'
    assert Plan.lazy([(4, 12)]).to_json() == expected


def test_fingerprint_is_stable_across_versions_and_tells_settings_apart():
    plan = Plan.lazy([(1, 3)], num_layers=8)
    assert plan.fingerprint() == "2d7937ef002ab9dea51a493b197229e6"  # caches outlive a process
    different = [Plan.identity(), Plan.lazy([(1, 2)], num_layers=8), Plan.lazy([(1, 3)]), Plan.lazy([(1, 3)], "vla")]
    assert len({p.fingerprint() for p in [plan, *different]}) == 5
    assert Plan.avl(core=0.5).fingerprint() != Plan.avl().fingerprint()
    # Before there was a setting `spread`; what was measured under such a plan is still true.
    assert Plan.avl(text=None).fingerprint() == "e9092771376dafc4b636d9bedc13f03d"
    assert Plan.avl(text=None, spread=0.5).fingerprint() != Plan.avl(text=None).fingerprint()
    assert Plan(num_layers=8, lazy=LazyPolicy(blocks=((1, 3),))).fingerprint() == plan.fingerprint()


# ---- presets and questions -------------------------------------------------------------------------------------------


def test_presets():
    assert Plan.identity() == Plan() == Plan.resolve(None) == Plan.resolve("identity") == Plan.resolve({})
    lazy = Plan.lazy([(4, 12)], num_layers=32)
    assert lazy.lazy_policy == LazyPolicy(blocks=((4, 12),), mode="gla")
    assert Plan.resolve(lazy) is lazy
    assert Plan.resolve(MappingProxyType({"lazy": MappingProxyType({"blocks": [[4, 12]]})})) == Plan.lazy([(4, 12)])
    avl = Plan.avl()
    assert (avl.vision_policy, avl.text_policy, avl.prefill_policy) == (VisionPolicy(), TextPolicy(), None)
    assert Plan.avl(text=None) == Plan.avl(text=1.0) == Plan.avl(text=1) == Plan(vision=VisionPolicy())
    assert Plan.avl(prefill=0.5).prefill_policy == PrefillFilter()
    assert Plan(lazy_policy=LazyPolicy(blocks=((4, 12),))) == Plan(lazy={"blocks": [(4, 12)]})


@pytest.mark.parametrize(
    ("plan", "identity", "lossless"),
    [
        (Plan.identity(), True, True),
        (Plan(num_layers=4, description="nothing"), True, True),
        (Plan.lazy([]), True, True),
        (Plan.lazy([(0, 1)]), False, False),
        (Plan.avl(), False, False),
        (Plan.avl(secondary=1.0, text=None), False, True),
        (Plan.avl(secondary=1.0), False, False),
        (Plan.avl(secondary=1.0, refresh=0, text=None), True, True),
        (Plan.avl(secondary=1.0, refresh=1, text=None), True, True),
        (Plan.avl(core=1.0, secondary=1.0, text=None), True, True),
        (Plan(text=TextPolicy(budget=1.0)), True, True),
        (Plan(prefill=PrefillFilter(keep=1.0)), True, True),
        (Plan(prefill=PrefillFilter()), False, False),
    ],
    ids=str,
)
def test_identity_and_lossless(plan, identity, lossless):
    assert (plan.is_identity, plan.is_lossless) == (identity, lossless)


def test_lazy_layers():
    policy = Plan.lazy([(8, 10), (1, 3)]).lazy_policy
    assert policy.blocks == ((1, 3), (8, 10))
    assert policy.lazy_layers == (2, 3, 9, 10)
    assert policy.anchors == (1, 8)
    assert [policy.anchor_of(layer) for layer in range(12)] == [
        None,
        None,
        1,
        1,
        None,
        None,
        None,
        None,
        None,
        8,
        8,
        None,
    ]


def test_text_form_is_short():
    assert repr(Plan()) == str(Plan()) == "Plan(identity)"
    plan = Plan.avl(prefill=0.5, num_layers=32).combine(Plan.lazy([(4, 12), (20, 30)]))
    assert str(plan) == (
        "Plan(lazy: gla 4..12, 20..30; vision: core 0.3, secondary 0.5, refresh 3; text: budget 0.6; "
        "prefill: keep 0.5 after layer 2; 32 layers)"
    )


def test_text_form_names_what_is_not_usual():
    """Plans that differ look different, also where two are named in one error."""
    plan = Plan.avl(scoring_window=8, scores="per_kv_head", spread=0.5, text_minimum=0, decay="none")
    assert str(plan) == (
        "Plan(vision: core 0.3, secondary 0.5, refresh 3, scoring_window 8, scores per_kv_head, spread 0.5; "
        "text: budget 0.6, minimum 0, decay none)"
    )


def test_combine():
    plan = Plan.avl(num_layers=32, description="a").combine(Plan.lazy([(4, 12)], description="b"))
    assert plan.num_layers == 32
    assert plan.description == "a; b"
    assert plan.lazy_policy == LazyPolicy(blocks=((4, 12),))
    with pytest.raises(PlanError, match=r"^vision: both plans set it.*Fix: ") as caught:
        Plan.avl().combine(Plan.avl(core=0.1))
    assert caught.value.field == "vision"
    with pytest.raises(PlanMismatchError, match=r"32 layers.*28") as caught:
        Plan(num_layers=32).combine(Plan(num_layers=28))
    assert caught.value.field == "num_layers"
    with pytest.raises(PlanError, match=r"lazy.blocks\[0\]"):
        Plan(num_layers=8).combine(Plan.lazy([(4, 12)]))


def test_plans_are_immutable():
    plan = Plan.avl()
    for change in (
        lambda: setattr(plan, "num_layers", 3),
        lambda: setattr(plan.vision_policy, "core", 0.1),
        lambda: delattr(plan, "num_layers"),
    ):
        with pytest.raises(PlanError, match=r"immutable.*Fix: "):
            change()
    assert plan == Plan.avl()


# ---- the model and the version ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "depth", "field"),
    [
        (Plan(num_layers=32), 28, "num_layers"),
        (Plan.lazy([(4, 12)], num_layers=32), 28, "num_layers"),
        (Plan.lazy([(0, 2), (4, 12)]), 12, "lazy.blocks[1]"),
        (Plan.avl(prefill=0.5), 3, "prefill.after_layer"),
    ],
)
def test_plan_for_another_model(plan, depth, field):
    with pytest.raises(PlanMismatchError) as caught:
        plan.check_depth(depth)
    assert caught.value.field == field
    assert caught.value.remedy
    assert str(depth) in str(caught.value)


def test_plan_for_this_model():
    for plan in (Plan(), Plan(num_layers=13), Plan.lazy([(4, 12)]), Plan.lazy([(4, 12)], num_layers=13)):
        plan.check_depth(13)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        *(Plan.lazy([(4, 12)], mode) for mode in ("gla", "vla", "vla_scores")),
        Plan.avl(),
        Plan(text=TextPolicy()),
        Plan.avl(prefill=0.5),
        Plan.avl(prefill=0.5, prefill_after_layer=3).combine(Plan.lazy([(1, 3), (4, 12)])),
        Plan(prefill=PrefillFilter(keep=1.0)),
    ],
)
def test_supported(plan):
    plan.check_supported()


@pytest.mark.parametrize(
    ("plan", "field", "words"),
    [
        (Plan(prefill=PrefillFilter()), "prefill", "Fix: add a section 'vision' with secondary <= 0.5"),
        (
            Plan.lazy([(0, 1), (2, 12)]).combine(Plan.avl(prefill=0.5)),
            "prefill.after_layer",
            r"lazy.blocks\[1\] = \(2, 12\)\)\. Fix: filter after layer 12 or 1, or end the block at 2",
        ),
        (
            Plan.lazy([(0, 4)]).combine(Plan.avl(prefill=0.5)),
            "prefill.after_layer",
            "Fix: filter after layer 4, or end the block at 2",
        ),
    ],
)
def test_unsupported(plan, field, words):
    with pytest.raises(UnsupportedPlanError, match=words) as caught:
        plan.check_supported()
    assert caught.value.field == field


def test_one_table_says_what_is_supported(monkeypatch):
    monkeypatch.setattr(plan_module, "EXECUTED", {"lazy": frozenset({"gla", "vla"}), "vision": None})
    Plan.lazy([(4, 12)], "vla").combine(Plan.avl(text=None)).check_supported()
    with pytest.raises(UnsupportedPlanError, match=r"only identity plans, lazy \(mode gla or vla\), vision;.*Fix: "):
        Plan(text=TextPolicy()).check_supported()


# ---- everything that can be wrong ------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def blocks(*given, **more):
    return {"lazy": {"blocks": list(given)}, **more}


BAD = [  # what is given, the field that the error names, a piece of the message
    ({"lazzy": {}}, "lazzy", "did you mean 'lazy'?"),
    ({"completely": 1}, "completely", "the keys are: version, num_layers, lazy"),
    ({"lazy": {"blokcs": []}}, "lazy.blokcs", "did you mean 'blocks'?"),
    ({"vision": {"coer": 0.1}}, "vision.coer", "did you mean 'core'?"),
    ({"text": {"": 1}}, "text.", "unknown key"),
    ({3: 4}, None, "keys must be text, got int 3"),
    ({"lazy": {3: 4}}, "lazy", "keys must be text, got int 3"),
    ({"lazy": None, "lazy_policy": None}, "lazy_policy", "given twice"),
    ({"lazy": {}}, "lazy.blocks", "is missing"),
    ({"lazy": []}, "lazy", "got list []"),
    ({"lazy": "gla"}, "lazy", "got str 'gla'"),
    ({"vision": TextPolicy()}, "vision", "got TextPolicy"),
    ({"lazy": {"blocks": 4}}, "lazy.blocks", "got int 4"),
    ({"lazy": {"blocks": "0-3"}}, "lazy.blocks", "got str '0-3'"),
    ({"lazy": {"blocks": None}}, "lazy.blocks", "got None"),
    (blocks(4, 12), "lazy.blocks[0]", "got int 4"),
    (blocks([0, 1], [4]), "lazy.blocks[1]", "got list [4]"),
    (blocks([0, 1], [4, 5, 6]), "lazy.blocks[1]", "got list [4, 5, 6]"),
    (blocks([[4, 5]]), "lazy.blocks[0]", "must be a pair"),
    (blocks("45"), "lazy.blocks[0]", "got str '45'"),
    (blocks([0, 1], ["4", 5]), "lazy.blocks[1][0]", "got str '4'"),
    (blocks([True, 5]), "lazy.blocks[0][0]", "got bool True"),
    (blocks([0, 5.0]), "lazy.blocks[0][1]", "got float 5.0"),
    (blocks([0, None]), "lazy.blocks[0][1]", "got None"),
    (blocks([-1, 5]), "lazy.blocks[0]", "count decoder layers from 0"),
    (blocks([0, 1], [5, 5]), "lazy.blocks[1]", "has no lazy layer"),
    (blocks([5, 4]), "lazy.blocks[0]", "write (4, 5)"),
    (blocks([0, 4], [4, 8]), "lazy.blocks[1]", "overlaps blocks[0] = (0, 4)"),
    (blocks([6, 9], [0, 20]), "lazy.blocks[1]", "merge them into (0, 20)"),
    (blocks([0, 1], [0, 1]), "lazy.blocks[1]", "overlaps"),
    (blocks([0, 1], [4, 12], num_layers=12), "lazy.blocks[1]", "12 decoder layers are 0..11"),
    ({"lazy": {"blocks": [], "mode": "gal"}}, "lazy.mode", "got str 'gal'"),
    ({"lazy": {"blocks": [], "mode": None}}, "lazy.mode", "got None"),
    ({"num_layers": 0}, "num_layers", "at least 1"),
    ({"num_layers": "32"}, "num_layers", "got str '32'"),
    ({"num_layers": True}, "num_layers", "got bool True"),
    ({"num_layers": 32.0}, "num_layers", "got float 32.0"),
    ({"version": 2}, "version", "got int 2"),
    ({"version": "1"}, "version", "got str '1'"),
    ({"version": True}, "version", "got bool True"),
    ({"version": 1.0}, "version", "got float 1.0"),
    ({"version": None}, "version", "got None"),
    ({"description": None}, "description", "got None"),
    ({"description": "\ud800"}, "description", "UTF-8"),
    ({"vision": {"core": NAN}}, "vision.core", "got float nan"),
    ({"vision": {"secondary": INF}}, "vision.secondary", "got float inf"),
    ({"vision": {"core": 0}}, "vision.core", "greater than 0"),
    ({"vision": {"core": -0.1}}, "vision.core", "greater than 0"),
    ({"vision": {"secondary": 1.1}}, "vision.secondary", "less than or equal to 1"),
    ({"vision": {"core": True}}, "vision.core", "got bool True"),
    ({"vision": {"core": "0.3"}}, "vision.core", "got str '0.3'"),
    ({"vision": {"core": 10**400}}, "vision.core", "must be"),
    ({"vision": {"core": 0.6}}, "vision.core", "0.6 > 0.5"),
    ({"vision": {"refresh": -1}}, "vision.refresh", "got int -1"),
    ({"vision": {"refresh": 2.5}}, "vision.refresh", "got float 2.5"),
    ({"vision": {"scoring_window": 0}}, "vision.scoring_window", "at least 1"),
    ({"vision": {"scores": "per_head"}}, "vision.scores", "per_kv_head"),
    ({"vision": {"spread": -0.1}}, "vision.spread", "0 to 1"),
    ({"vision": {"spread": 1.5}}, "vision.spread", "less than or equal to 1"),
    ({"vision": {"spread": NAN}}, "vision.spread", "got float nan"),
    ({"vision": {"core": 0, "refresh": -1}}, "vision.core", "1 more: refresh"),
    ({"text": {"budget": NAN}}, "text.budget", "got float nan"),
    ({"text": {"budget": 0}}, "text.budget", "greater than 0"),
    ({"text": {"minimum": -1}}, "text.minimum", "0 or more"),
    ({"text": {"decay": "forget"}}, "text.decay", "'forgetting'"),
    ({"prefill": {"keep": 0.4}, "vision": {}}, "prefill.keep", "vision.secondary = 0.5"),
    ({"prefill": {"keep": NAN}}, "prefill.keep", "got float nan"),
    ({"prefill": {"after_layer": -1}}, "prefill.after_layer", "got int -1"),
    ({"prefill": {"after_layer": 3}, "num_layers": 4}, "prefill.after_layer", "no layer follows"),
]


@pytest.mark.parametrize(("data", "field", "words"), BAD, ids=lambda value: repr(value)[:50])
def test_bad_data(data, field, words):
    for build in (Plan.from_dict, Plan.resolve, lambda d: Plan(**d)):
        if build is not Plan.from_dict and not all(isinstance(key, str) for key in data):
            continue  # Python itself refuses such keywords
        with pytest.raises(PlanError) as caught:
            build(data)
        error = caught.value
        assert type(error) is PlanError
        assert error.field == field
        assert error.remedy
        assert words in str(error)
        assert str(error).endswith((f"Fix: {error.remedy}.", f"Fix: {error.remedy}"))


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Plan.lazy([(3, 3)]), "lazy.blocks[0]"),
        (lambda: Plan.lazy(3), "lazy.blocks"),
        (lambda: Plan.lazy([(0, 3)], "best"), "lazy.mode"),
        (lambda: Plan.lazy([(0, 3)], num_layers=3), "lazy.blocks[0]"),
        (lambda: Plan.avl(core=0.9), "vision.core"),
        (lambda: Plan.avl(text=True), "text.budget"),
        (lambda: Plan.avl(text=0), "text.budget"),
        (lambda: Plan.avl(prefill=0.1), "prefill.keep"),
        (lambda: VisionPolicy(core=2.0), "core"),
        (lambda: LazyPolicy(), "blocks"),
        (lambda: Plan.model_validate({"vision": {"core": 2}}), "vision.core"),
        (lambda: Plan.model_validate_json('{"vision": {"core": 2}}'), "vision.core"),
    ],
)
def test_bad_arguments(build, field):
    with pytest.raises(PlanError, match="Fix: ") as caught:
        build()
    assert caught.value.field == field


NOT_PLANS = [3, 1.5, True, b"plan.json", [("lazy", None)], object()]


@pytest.mark.parametrize("spec", NOT_PLANS, ids=lambda spec: type(spec).__name__)
def test_not_a_plan(spec):
    for build in (Plan.resolve, Plan.from_json):
        with pytest.raises(PlanError, match=r"got .*Fix: ") as caught:
            build(spec)
        assert caught.value.field == "plan"


def test_not_a_preset_and_not_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        PlanFileError, match=r"neither a preset \(identity\) nor an existing file.*'identity'\?"
    ) as caught:
        Plan.resolve("identty")
    assert caught.value.field == "plan"
    Plan().to_json("plan.json")
    with pytest.raises(PlanFileError, match=r"did you mean 'plan.json'\?"):
        Plan.resolve("plan.jsn")
    for odd in ("", "\0", "x" * 5000, "~nobody-of-that-name/plan.json"):
        with pytest.raises(PlanFileError, match="Fix: "):
            Plan.resolve(odd)


BAD_TEXT = [  # JSON text, line, column, a piece of the message
    ('{"version": 1,\n "lazy": {"blocks": [[4, 12]}}', 2, 29, "line 2, column 29"),
    ("{", 1, 2, "line 1, column 2"),
    ("{'version': 1}", 1, 2, "double quotes"),
    ('{"version": 1}\n}', 2, 1, "Extra data"),
    ('{"version": 1,\n "version": 1}', None, None, "stands there twice"),
    ('{"num_layers": ' + "1" * 5000 + "}", None, None, "cannot be read"),
    ("[" * 100_000, None, None, "cannot be read"),
]


@pytest.mark.parametrize(("text", "line", "column", "words"), BAD_TEXT, ids=lambda value: repr(value)[:30])
def test_corrupt_json(text, line, column, words, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    for spec, name in ((text, None), (path, str(path))):
        with pytest.raises(PlanFileError, match="Fix: ") as caught:
            Plan.from_json(spec)
        assert (caught.value.path, caught.value.line, caught.value.column) == (name, line, column)
        assert words in str(caught.value)
        assert name is None or "stands there twice" in words or name in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"version": 1, "description": "\xe9"}', "not UTF-8 text (byte 31)"),
        ('{"version": 1}'.encode("utf-16"), "not UTF-8 text (byte 0)"),
        (b"plan", "line 1, column 1"),
    ],
)
def test_unreadable_files(content, words, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanFileError, match="Fix: ") as caught:
        Plan.from_json(path)
    assert caught.value.path == str(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[]", None),
        ("3", None),
        ("null", None),
        ('"identity"', None),
        ('{"lazzy": 1}', "lazzy"),
        ('{"vision": {"core": NaN}}', "vision.core"),
        ('{"vision": {"core": Infinity}}', "vision.core"),
        ('{"vision": {"core": 1e999}}', "vision.core"),
        ('{"lazy": {"blocks": [[0, 1.0]]}}', "lazy.blocks[0][1]"),
        ('{"lazy": {"blocks": ' + "[" * 400 + "]" * 400 + "}}", "lazy.blocks[0]"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_json_that_is_no_plan_names_the_file(text, field, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match="Fix: ") as caught:
        Plan.from_json(path)
    assert type(caught.value) is PlanError
    assert caught.value.field == field
    assert str(path) in str(caught.value)


def test_missing_file_directory_and_unwritable_path(tmp_path):
    Plan().to_json(tmp_path / "plan.json")
    missing = tmp_path / "plans.json"
    with pytest.raises(PlanFileError, match=r"no plan file.*did you mean '.*plan\.json'\?") as caught:
        Plan.from_json(missing)
    assert caught.value.path == str(missing)
    for spec in (tmp_path, str(tmp_path)):
        with pytest.raises(PlanFileError, match=r"is a directory.*Fix: "):
            Plan.resolve(spec)
    for target in (tmp_path, tmp_path / "none" / "plan.json"):
        with pytest.raises(PlanFileError, match=r"cannot write.*Fix: ") as caught:
            Plan().to_json(target)
        assert caught.value.path == str(target)
