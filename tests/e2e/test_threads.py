"""Two threads with two caches on one compiled model get the answers that one thread gets."""

import threading

import pytest
import torch

import avl_fx
from avl_fx import Plan
from avl_fx.modality import given
from avl_fx.modality_hook import ModalityHook
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, largest, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS, ROUNDS = 16, 3
CASES = [
    ("avl_fx.compile", "dynamic", "text"),
    ("torch.compile", "static", "text"),
    ("avl_fx.compile", "dynamic", "identity"),
    ("avl_fx.compile", "static", "lazy"),
]
PLANS = {
    "identity": None,
    "text": Plan.avl(0.2, 0.4, 2, text=0.4, text_minimum=4),
    "lazy": Plan.avl(0.2, 0.4, 2, text=None).combine(Plan.lazy([(1, 3)])),
}


def together(*jobs):
    """Run each job in a thread of its own, all started at once; their results. The first error is raised here."""
    results, errors, start = [None] * len(jobs), [], threading.Barrier(len(jobs))

    def run(index, job):
        try:
            start.wait()
            results[index] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return results


@pytest.mark.parametrize(
    ("door", "kind", "plan"),
    rest_in_matrix(CASES, CASES[::6], apart=True),
)
def test_two_threads_on_one_compiled_model(door, kind, plan):
    """Once it is compiled: Dynamo itself may crash where one thread runs a frame that another one is compiling."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = [zoo.inputs(model, batch=2, seed=seed) for seed in range(2)]
    forced = [prefill_and_decode(model, one, kind, steps=STEPS).tokens for one in inputs]

    def answer(one):
        return prefill_and_decode(model, inputs[one], kind, steps=STEPS, tokens=forced[one])

    with through(door, model, compiler="eager", plan=PLANS[plan]):
        alone = [answer(n) for n in range(2)]
        found = together(*([lambda n=n: [answer(n) for _ in range(ROUNDS)] for n in range(2)]))
    for runs, expected in zip(found, alone, strict=True):
        for run in runs:
            assert largest(run, expected) <= FLOAT32_TOLERANCE
    assert largest(alone[0], alone[1]) > 10 * FLOAT32_TOLERANCE, "the answers can be told apart"


def test_positions_that_one_thread_gives_are_its_own():
    seen, entered, checked = [], threading.Event(), threading.Event()

    def gives():
        with avl_fx.modality_ids(torch.tensor([[1, 0]])):
            entered.set()
            checked.wait()
            seen.append(given())

    def looks():
        entered.wait()
        seen.append(given())
        checked.set()

    together(gives, looks)
    assert seen[0] is None
    assert seen[1].tolist() == [[True, False]]


def test_forwards_of_two_threads_may_overlap_in_any_order():
    """The first to begin is the first to end, which no stack that they share survives."""
    model = ZOO["llava"].make()
    hook, turn, seen = ModalityHook(model), threading.Barrier(2), {}

    def forward(name, ids):
        if name == "second":
            turn.wait()  # the first has begun
        hook.before(model, (), {"input_ids": ids})
        if name == "first":
            turn.wait()
        turn.wait()  # both have begun
        seen[name] = given().tolist()
        if name == "second":
            turn.wait()  # the first has ended
        hook.after(model, (), None)
        if name == "first":
            turn.wait()
        assert given() is None

    image = model.config.image_token_id
    together(
        lambda: forward("first", torch.tensor([[image, 20, 20]])),
        lambda: forward("second", torch.tensor([[20, image, 20]])),
    )
    assert seen == {"first": [[True, False, False]], "second": [[False, True, False]]}
