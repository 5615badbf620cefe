"""Backend options: defaults, merging, and a typed error for every mistake."""

import copy
import pickle
from pathlib import Path
from types import MappingProxyType

import pytest

from avl_fx import _compat
from avl_fx.errors import OptionError, PlanError, PlanFileError
from avl_fx.options import BackendOptions, parse_options
from avl_fx.plan import Plan


def test_defaults():
    for given in ((), (None, None), (None, {}), ("default", None), (None, {"mode": "default", "plan": None})):
        options = parse_options(*given)
        assert options == BackendOptions()
        assert options.inductor_config() == {}
    assert BackendOptions().plan.is_identity
    assert (BackendOptions().compiler, BackendOptions().strict, BackendOptions().dump) == ("inductor", False, None)


def test_everything_at_once(tmp_path):
    Plan.lazy([(4, 12)]).to_json(tmp_path / "plan.json")
    options = parse_options(
        None,
        MappingProxyType(
            {
                "plan": tmp_path / "plan.json",
                "strict": True,
                "inductor": {"max-autotune": False, "triton.cudagraphs": True},
                "compiler": "inductor",
                "mode": "max-autotune",
                "dump": str(tmp_path / "out"),
            }
        ),
    )
    assert options.plan == Plan.lazy([(4, 12)])
    assert options.strict
    assert options.dump == tmp_path / "out"
    assert not options.dump.exists()
    assert options.inductor == {"max_autotune": False, "triton.cudagraphs": True}
    expected = {**_compat.inductor_modes()["max-autotune"], "max_autotune": False, "triton.cudagraphs": True}
    assert options.inductor_config() == expected
    for twin in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert twin == options
        assert hash(twin) == hash(options)


@pytest.mark.parametrize("mode", [mode for mode in _compat.inductor_modes() if mode != "default"])
def test_mode_by_either_way(mode):
    assert parse_options(mode) == parse_options(None, {"mode": mode}) == parse_options(mode, {"mode": mode})
    assert parse_options(mode).inductor_config() == _compat.inductor_modes()[mode]


def test_the_options_given_are_neither_kept_nor_changed():
    given = {"inductor": {"max_autotune": True}, "dump": Path("out")}
    options = parse_options(None, given)
    given["inductor"]["max_autotune"] = False
    assert options.inductor_config() == {"max_autotune": True}
    options.inductor_config()["max_autotune"] = None
    assert options.inductor_config() == {"max_autotune": True}


def test_other_compilers_ignore_the_mode_of_torch_compile():
    assert parse_options("reduce-overhead", {"compiler": "aot_eager"}).compiler == "aot_eager"


BAD = [  # mode=, options=, the field that the error names, a piece of the message
    (None, {"paln": "identity"}, "paln", "did you mean 'plan'?"),
    (None, {"verbose": True}, "verbose", "the options are: plan, strict, inductor, compiler, mode, dump"),
    (None, {3: True}, "3", "unknown option"),
    (None, ["plan"], "options", "got list ['plan']"),
    (None, {"max_autotune": True}, "max_autotune", 'options={"inductor": {"max_autotune": True}}'),
    (None, {"max-autotune": True}, "max-autotune", 'options={"inductor": {"max_autotune": True}}'),
    (None, {"triton.cudagraphs": True}, "triton.cudagraphs", 'options={"inductor": {"triton.cudagraphs": True}}'),
    (None, {"inductor": {"max_autotone": True}}, "inductor.max_autotone", "did you mean 'max_autotune'?"),
    (None, {"inductor": {"cudagraphs": True}}, "inductor.cudagraphs", "did you mean 'triton.cudagraphs'?"),
    (None, {"inductor": {"zzzzzz": True}}, "inductor.zzzzzz", "list_options"),
    (None, {"inductor": {3: True}}, "inductor.3", "no such setting"),
    (None, {"inductor": {"max_autotune": "yes"}}, "inductor.max_autotune", "must be bool, got str 'yes'"),
    (None, {"inductor": True}, "inductor", "got bool True"),
    (None, {"strict": 1}, "strict", "got int 1"),
    (None, {"strict": "true"}, "strict", "got str 'true'"),
    (None, {"compiler": "eagre"}, "compiler", "did you mean 'eager'?"),
    (None, {"compiler": 3}, "compiler", "got int 3"),
    (None, {"compiler": ["eager"]}, "compiler", "got list ['eager']"),
    (None, {"compiler": "eager", "mode": "max-autotune"}, "mode", "no effect with compiler 'eager'"),
    (None, {"compiler": "aot_eager", "inductor": {"max_autotune": True}}, "inductor", "no effect"),
    ("max-autotine", None, "mode", "did you mean 'max-autotune'?"),
    (3, None, "mode", "got int 3"),
    (None, {"mode": "fast"}, "mode", "must be one of 'default'"),
    ("reduce-overhead", {"mode": "max-autotune"}, "mode", "contradicts mode='reduce-overhead'"),
    (None, {"dump": 3}, "dump", "got int 3"),
    (None, {"dump": ""}, "dump", "got str ''"),
    (None, {"dump": __file__}, "dump", "is a file"),
]


@pytest.mark.parametrize(("mode", "options", "field", "words"), BAD, ids=lambda value: repr(value)[:50])
def test_bad_options(mode, options, field, words):
    with pytest.raises(OptionError) as caught:
        parse_options(mode, options)
    assert caught.value.field == field
    assert caught.value.remedy
    assert words in str(caught.value)


def test_a_bad_plan_is_a_plan_error(tmp_path):
    with pytest.raises(PlanFileError) as caught:
        parse_options(None, {"plan": str(tmp_path / "none.json")})
    assert caught.value.field == "plan"
    with pytest.raises(PlanError) as caught:
        parse_options(None, {"plan": {"lazy": {"blocks": [[4, 4]]}}})
    assert caught.value.field == "lazy.blocks[0]"


def test_a_float_setting_takes_a_whole_number():
    key = next(key for key, declared in _compat.inductor_config_types().items() if declared is float)
    assert parse_options(None, {"inductor": {key: 2}}).inductor == {key: 2}


def test_every_mode_passes_its_own_check():
    for mode, patches in _compat.inductor_modes().items():
        assert parse_options(mode, {"inductor": patches}).inductor == patches
