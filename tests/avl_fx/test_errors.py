"""Typed errors: wording, copies, and the way through Dynamo."""

import copy
import inspect
import pickle

import pytest
import torch

from avl_fx import errors
from avl_fx.errors import AvlError, OptionError, PlanError, PlanFileError

CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_every_error_is_exported():
    defined = {
        name for name, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("cls", CLASSES)
def test_message_names_field_and_ends_with_the_remedy(cls):
    error = cls("is wrong", field="lazy.blocks[1]", remedy="put it right")
    assert isinstance(error, AvlError)
    assert str(error) == "lazy.blocks[1]: is wrong. Fix: put it right."
    assert (error.message, error.field, error.remedy) == ("is wrong", "lazy.blocks[1]", "put it right")


def test_message_without_field_and_remedy():
    assert str(AvlError("Something is wrong!")) == "Something is wrong!"
    assert str(AvlError("wrong", remedy="is it?")) == "wrong. Fix: is it?"


@pytest.mark.parametrize(
    "duplicate",
    [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_copies_are_equal(cls, duplicate):
    details = {"path": "plan.json", "line": 3, "column": 7} if cls is PlanFileError else {}
    error = cls("is wrong", field="plan", remedy="put it right", **details)
    error.add_note("seen in a test")
    twin = duplicate(error)
    assert type(twin) is cls
    assert str(twin) == str(error)
    assert (twin.message, twin.field, twin.remedy) == (error.message, error.field, error.remedy)
    assert {name: getattr(twin, name) for name in details} == details
    assert twin.__notes__ == ["seen in a test"]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_backend_raises_it_through_dynamo_unwrapped(cls):
    def backend(gm, example_inputs):
        raise cls("is wrong", field="plan", remedy="put it right")

    torch._dynamo.reset()
    with pytest.raises(cls) as caught:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert type(caught.value) is cls
    assert str(caught.value) == "plan: is wrong. Fix: put it right."  # without Dynamo's advice on its own switches
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_one_except_clause_catches_a_family():
    for cls in CLASSES:
        assert issubclass(cls, RuntimeError)
    for cls in (PlanFileError, errors.PlanMismatchError, errors.UnsupportedPlanError):
        assert issubclass(cls, PlanError)
    assert not issubclass(OptionError, PlanError)
