"""What a user may do to a stock cache between two steps: crop, copy, reorder, hand it to another plan or model.

A session of turns and operations runs three times: compiled under a plan, in the oracle, and (where said) densely. The
oracle is told what leaves the state of the cache unknown; from there on it is dense, over the rows as they are.
"""

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import avl_fx
from avl_fx import Plan
from avl_fx.errors import CacheStateError
from tests.e2e._doors import FLOAT32_TOLERANCE, largest, through
from tests.oracle import avl_oracle
from tests.zoo import ZOO

SETTINGS = {"core": 0.1, "secondary": 0.3, "refresh": 2}
PLANS = {
    "vision": Plan.avl(**SETTINGS, text=None),
    "text": Plan.avl(**SETTINGS, text=0.3, text_minimum=2),
}


class Session:
    """One cache and what is done to it; `logits` of the last position of each forward."""

    def __init__(self, model, inputs, kind="dynamic", oracle=None):
        config, batch = model.config.get_text_config(), len(inputs["input_ids"])
        room = inputs["input_ids"].shape[1] + 24
        self.cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=room)
        self.model, self.inputs, self.oracle = model, inputs, oracle
        self.mask = torch.zeros(batch, 0, dtype=torch.long)
        self.logits, self.next = [], 20

    @torch.no_grad()
    def forward(self, ids, mask, **more):
        self.mask = torch.cat([self.mask, mask], 1)
        out = self.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **more
        ).logits
        self.logits.append(out[:, -1].float())

    def prompt(self):
        more = {k: v for k, v in self.inputs.items() if k not in ("input_ids", "attention_mask")}
        self.forward(self.inputs["input_ids"], self.inputs["attention_mask"], **more)

    def say(self, count):
        """`count` tokens in one forward: a decode step, or a turn of text."""
        ids = torch.arange(self.next, self.next + count).expand(len(self.mask), -1)
        self.next += count
        self.forward(ids, torch.ones_like(ids))

    def steps(self, count):
        for _ in range(count):
            self.say(1)

    def lose(self, told=False):
        if self.oracle is not None:
            self.oracle.lose(self.mask.shape[1], told)

    def crop(self, count):
        self.cache.crop(-count)
        if count:
            self.mask = self.mask[:, :-count]
            self.lose()

    def select(self, rows):
        self.cache.batch_select_indices(torch.tensor(rows))
        self.mask = self.mask[rows]
        self.lose()

    def repeat(self, count):
        self.cache.batch_repeat_interleave(count)
        self.mask = self.mask.repeat_interleave(count, 0)
        self.lose()

    def reorder(self, rows, told=False):
        self.cache.reorder_cache(torch.tensor(rows))
        self.mask = self.mask[rows]
        self.lose(told)


def crop_an_answer(session):
    session.prompt()
    session.steps(5)
    session.crop(2)
    session.steps(3)
    session.say(3)
    session.crop(1)
    session.steps(2)


def crop_nothing(session):
    session.prompt()
    session.steps(3)
    session.crop(0)
    session.steps(3)


def crop_into_the_question(session):
    session.prompt()
    session.steps(2)
    session.crop(6)
    session.say(4)
    session.steps(2)


def crop_into_an_image(session):
    session.prompt()
    session.steps(3)
    session.crop(3 + 9 + 5)  # five rows of the longest prompt's last image
    session.say(4)
    session.steps(2)


def crop_twice(session):
    session.prompt()
    session.steps(4)
    session.crop(2)
    session.crop(3)
    session.steps(2)


def crop_everything(session):
    session.prompt()
    session.steps(2)
    session.crop(len(session.mask[0]) + 5)  # more than is stored: transformers leaves an empty cache
    session.mask = session.mask[:, :0]
    session.lose()
    if session.oracle is not None:
        session.oracle.see(session.visual)
    session.prompt()
    session.steps(4)


def select_rows(session):
    session.prompt()
    session.steps(2)
    session.select([2, 0])
    session.steps(3)


def repeat_rows(session):
    session.prompt()
    session.steps(2)
    session.repeat(2)
    session.steps(3)


def reorder_rows(session):
    session.prompt()
    session.steps(2)
    session.reorder([1, 1, 0])
    session.steps(3)
    session.say(3)
    session.steps(2)


def copy_and_crop(session):
    session.prompt()
    session.steps(3)
    session.cache = copy.deepcopy(session.cache)
    session.steps(2)
    session.cache = copy.deepcopy(session.cache)
    session.crop(4)
    session.steps(2)


def copy_rows(session):
    session.prompt()
    session.steps(3)
    session.cache = copy.deepcopy(session.cache)
    session.steps(4)


def a_wrong_crop(session):
    stored = DynamicCache()
    stored.update(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), 0)
    with contextlib.suppress(ValueError):
        stored.crop(3)
        pytest.skip("this release of transformers takes a positive number for the length that remains")
    session.prompt()
    session.steps(2)
    with pytest.raises(ValueError, match="positive"):
        session.cache.crop(3)
    session.steps(3)


SCRIPTS = {
    "dynamic": [
        crop_an_answer,
        crop_nothing,
        crop_into_the_question,
        crop_into_an_image,
        crop_twice,
        crop_everything,
        select_rows,
        repeat_rows,
        reorder_rows,
        copy_and_crop,
        a_wrong_crop,
    ],
    "inference": [crop_an_answer, crop_into_an_image],
    "static": [reorder_rows, copy_rows],
}
"""By cache; `inference`: a dynamic one under inference mode, which keeps neither versions nor views."""
GROUPS = {f"{plan}-{kind}": (plan, kind) for plan in PLANS for kind in SCRIPTS}
"""Sessions that share what was compiled: a fixture is made anew for every other *object*, not for every other value."""
MATRIX = pytest.mark.matrix
OFTEN = {
    ("text", "dynamic"): (crop_into_an_image, copy_and_crop),
    ("text", "inference"): (crop_an_answer,),
    ("text", "static"): (reorder_rows,),
}
CASES = [
    # A text window asks for all that the visual partition alone does, and for more.
    pytest.param(
        group,
        script,
        id=f"{name}-{script.__name__}",
        marks=() if script in OFTEN.get(group, ()) else MATRIX,
    )
    for name, group in GROUPS.items()
    for script in SCRIPTS[group[1]]
]


@pytest.fixture(scope="module")
def plain():
    """A model that stays as it is, its prompt of three ragged rows, and the visual positions."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=3)
    return model, inputs, zoo.visual_positions(model, inputs)


@pytest.fixture(scope="module")
def compiled(request, plain):
    """The same model, compiled once for all sessions of one kind under one plan."""
    plan, kind = request.param
    model = ZOO["llava"].make()
    with through("avl_fx.compile", model, compiler="eager", plan=PLANS[plan]):
        yield model, plan, kind


def oracle_of(plain, plan):
    model, _, visual = plain
    return avl_oracle(model, visual, **SETTINGS, text=0.3 if plan == "text" else 1.0, minimum=2)


@pytest.mark.parametrize(("compiled", "script"), CASES, indirect=["compiled"])
def test_operations_between_steps(compiled, script, plain):
    (model, plan, kind), (dense, inputs, visual) = compiled, plain
    cache = "static" if kind == "static" else "dynamic"
    with oracle_of(plain, plan) as oracle:
        expected = Session(dense, inputs, cache, oracle)
        expected.visual = visual
        script(expected)
    got = Session(model, inputs, cache)
    with torch.inference_mode() if kind == "inference" else contextlib.nullcontext():
        script(got)
    assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE
    never = Session(dense, inputs, cache)
    script(never)
    assert largest(never.logits, expected.logits) > 10 * FLOAT32_TOLERANCE, "partitioned steps are among them"


@pytest.mark.parametrize(
    "compiled", [pytest.param(GROUPS["vision-dynamic"], marks=MATRIX), GROUPS["vision-static"]], indirect=True
)
def test_reordered_rows_whose_visual_positions_are_told_start_late(compiled, plain):
    """`modality_ids` says of every row of the batch where its images are, here of rows that are alike."""
    (model, plan, kind), (dense, _, _) = compiled, plain
    zoo = ZOO["llava"]
    inputs = {k: torch.cat([v, v]) for k, v in zoo.inputs(dense, batch=1).items()}
    visual = zoo.visual_positions(dense, inputs)

    def script(session):
        session.prompt()
        session.steps(2)
        session.reorder([1, 0], told=True)
        session.steps(6)

    assert plan == "vision", "copied rows have no age any more, which a text window asks for"
    with avl_oracle(dense, visual, **SETTINGS, text=1.0) as oracle:
        expected = Session(dense, inputs, kind, oracle)
        script(expected)
    got = Session(model, inputs, kind)
    with avl_fx.modality_ids(visual):
        script(got)
    assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE


# ---- other plans, other models ---------------------------------------------------------------------------------------


def use(door, model, plan):
    """Compile `model` inside a `through` block once more, under another plan."""
    options = {"compiler": "eager", "strict": True, "plan": plan}
    if door == "avl_fx.compile":
        avl_fx.compile(model, options=options)
    else:
        vars(model).pop("forward", None)
        model.forward = torch.compile(model.forward, backend="avl", options=options)


@pytest.mark.parametrize(
    ("kind", "door", "other"),
    [
        pytest.param("dynamic", "avl_fx.compile", Plan.identity(), marks=MATRIX),
        ("dynamic", "torch.compile", Plan.avl(0.2, 0.4, text=0.5, text_minimum=2)),
        pytest.param(
            "static", "avl_fx.compile", Plan.avl(0.2, 0.4, text=0.5, text_minimum=2), marks=pytest.mark.matrix
        ),
    ],
    ids=["dynamic-identity", "dynamic-partition", "static-partition"],
)
def test_a_cache_of_another_plan_is_dense(kind, door, other, plain):
    dense, inputs, _ = plain
    model = ZOO["llava"].make()

    def script(session, change):
        session.prompt()
        session.steps(3)
        change()
        session.lose()
        session.steps(3)
        if kind == "dynamic":  # the rows are back where they entered
            session.crop(4)
            session.steps(2)

    with oracle_of(plain, "text") as oracle:
        expected = Session(dense, inputs, kind, oracle)
        script(expected, lambda: None)
    with through(door, model, compiler="eager", plan=PLANS["text"]):
        got = Session(model, inputs, kind)
        script(got, lambda: use(door, model, other))
    assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=MATRIX)])
def test_a_cache_of_another_model_is_dense(kind, plain):
    """Weights that were tuned further, on the cache of the weights before: nothing that the first model saw holds."""
    zoo, (first, inputs, _) = ZOO["llava"], plain
    second = zoo.make(seed=1)

    def script(session, other):
        session.prompt()
        session.steps(3)
        session.model = other
        session.lose()
        session.steps(4)

    with oracle_of(plain, "vision") as oracle:
        expected = Session(first, inputs, kind, oracle)
        script(expected, second)
    mine = zoo.make()
    with through("avl_fx.compile", mine, compiler="eager", plan=PLANS["vision"]):
        use("avl_fx.compile", second, PLANS["vision"])
        try:
            got = Session(mine, inputs, kind)
            script(got, second)
        finally:
            avl_fx.uncompile(second)
    assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("door", "kind"), [pytest.param("avl_fx.compile", "dynamic", marks=MATRIX), ("torch.compile", "static")]
)
def test_a_cache_that_is_refused_stays_as_it_was(door, kind, plain):
    """The keys of lazy layers are missing: a dense plan is told so, and the lazy one goes on as if nothing happened."""
    _, inputs, _ = plain
    model = ZOO["llava"].make()
    lazy = Plan.lazy([(1, 3)])

    def script(session, between):
        session.prompt()
        session.steps(2)
        between(session)
        session.steps(3)

    def refused(session):
        use(door, model, Plan.identity())
        mask, token = session.mask, session.next
        with pytest.raises(CacheStateError, match="decoder layer 2") as caught:
            session.steps(1)
        assert caught.value.field == "cache"
        assert caught.value.remedy
        session.mask, session.next = mask, token
        assert int(session.cache.get_seq_length()) == mask.shape[1]
        use(door, model, lazy)

    with through(door, model, compiler="eager", plan=lazy):
        expected, got = Session(model, inputs, kind), Session(model, inputs, kind)
        script(expected, lambda session: None)
        script(got, refused)
    assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE


def test_a_crop_that_nobody_can_undo_is_an_error(plain):
    """Two caches share their rows; one goes on and moves them, then the other is cropped."""
    _, inputs, _ = plain
    model = ZOO["llava"].make()
    with through("avl_fx.compile", model, compiler="eager", plan=PLANS["text"]):
        one = Session(model, inputs)
        one.prompt()
        one.steps(2)
        other = copy.copy(one)
        other.cache = copy.copy(one.cache)
        other.cache.layers = [copy.copy(layer) for layer in one.cache.layers]
        one.steps(2)
        other.crop(1)
        with pytest.raises(CacheStateError, match="1 rows were cut off") as caught:
            other.steps(1)
        assert caught.value.field == "cache"
        assert "deepcopy" in caught.value.remedy
        one.steps(1)  # is not concerned
