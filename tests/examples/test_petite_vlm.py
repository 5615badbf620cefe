"""The small trained model: its arithmetic on tiny random models, its files, and (slow) its answers."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, LlamaConfig, LlavaForConditionalGeneration

from avl_fx import Plan
from examples.petite_vlm import parts
from examples.petite_vlm.ahead import Ahead
from examples.petite_vlm.convert import name_in_older_release
from examples.petite_vlm.data import Question, by_image, load_questions, shuffled_partner
from examples.petite_vlm.features import encode
from examples.petite_vlm.lazy_tuning import calibrated, tune
from examples.petite_vlm.lora import add_lora, merge_lora
from examples.petite_vlm.model import (
    ADAPTER,
    FEATURE_LAYERS,
    MIXTURE,
    READER,
    build_config,
    load_petite_vlm,
    named_as_here,
    read_adapter,
    trained_at,
    trained_under,
)
from examples.petite_vlm.onnx_weights import Node, read_onnx
from examples.petite_vlm.packing import Encoded, loss_and_hits, pack, packed_logits
from examples.petite_vlm.parts import ChecksumError, DownloadError, Part, PartsError, build_once, fetch
from examples.petite_vlm.sources import Epochs, Mixture
from examples.petite_vlm.trainer import Recipe, Trainer, teacher_forced_accuracy
from tests.oracle import lazy_oracle

FOLDER = ADAPTER.parent.parent
IMAGE_TOKEN = 5
PREFIX = [1, 6, 7, *[IMAGE_TOKEN] * 4]
RECIPE = Recipe(
    steps=4, images_per_step=2, questions_per_image=3, rank=2, warmup=1, cooldown=1, lora_lr=1e-2, projector_lr=1e-2
)


def tiny_model(feature_layers: tuple[int, ...] = FEATURE_LAYERS) -> LlavaForConditionalGeneration:
    """A random LLaVA: 28-pixel images make 4 image tokens."""
    text = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14, use_mask_token=False
    )
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(build_config(text, vision, IMAGE_TOKEN, feature_layers)).eval()
    for parameter in model.parameters():  # the default initialisation is too small to tell one computation from another
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_groups(images: int = 5) -> list[list[Encoded]]:
    """Questions of uneven length, 2 or 3 an image."""
    generator = torch.Generator().manual_seed(1)
    groups: list[list[Encoded]] = []
    for image in range(images):
        group: list[Encoded] = []
        for number in range(2 + image % 2):
            suffix = torch.randint(8, 48, (4 + number + image % 3,), generator=generator).tolist()
            group.append(Encoded(Question(image, f"q{number}", "a"), (*suffix, 2), 2 + number % 2))
        groups.append(group)
    return groups


def tiny_features(images: int = 5) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((images, 4, 16)).astype(np.float16)


def tiny_trainer(workers: int = 1, start: dict[str, torch.Tensor] | None = None, plans: Sequence[Plan] = ()) -> Trainer:
    recipe = replace(RECIPE, plans=tuple(plan.to_json() for plan in plans))
    source = Epochs(
        tiny_groups(), tiny_features(), PREFIX, recipe.images_per_step, recipe.questions_per_image, recipe.seed
    )
    return Trainer(tiny_model(), recipe, source, workers, start)


# ---------------------------------------------------------------------------------------------- training arithmetic


def test_merged_lora_equals_the_branches():
    branched, plain = tiny_model(), tiny_model()
    adapters = add_lora(branched.model.language_model, rank=3, scale=1.5)
    tensors = {}
    for name, adapter in adapters.items():
        torch.nn.init.normal_(adapter.B, std=0.2)
        tensors |= {f"lora.{name}.A": adapter.A.detach(), f"lora.{name}.B": adapter.B.detach()}
    assert len(adapters) == 2 * 7
    ids = torch.arange(8, 20)[None]
    before = plain(input_ids=ids).logits
    weights = plain.state_dict()
    merge_lora(weights, tensors, 1.5, prefix="model.language_model.")
    plain.load_state_dict(weights)
    merged = plain(input_ids=ids).logits
    assert (merged - before).abs().max() > 0.1
    torch.testing.assert_close(merged, branched(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_packing_changes_nothing():
    """Packed logits are those of every question alone, and those of the stock model from pixels."""
    model, groups = tiny_model(), tiny_groups()
    pixels = torch.randn(len(groups), 3, 28, 28, generator=torch.Generator().manual_seed(2))
    features = encode(model, pixels)
    batch = pack(groups, PREFIX)
    together = packed_logits(model, batch, features, IMAGE_TOKEN)
    alone, stock = [], []
    for image, group in enumerate(groups):
        for item in group:
            single = pack([[item]], PREFIX)
            alone.append(packed_logits(model, single, features[image : image + 1], IMAGE_TOKEN))
            ids = torch.tensor([[*PREFIX, *item.suffix]])
            logits = model(input_ids=ids, pixel_values=pixels[image : image + 1]).logits
            stock.append(logits[0, -item.answer_tokens - 1 : -1])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, torch.cat(stock), atol=1e-4, rtol=1e-4)
    expected = [token for group in groups for item in group for token in item.suffix[-item.answer_tokens :]]
    assert batch.targets.tolist() == expected


def test_hits_need_every_answer_token():
    groups = tiny_groups(2)
    batch = pack(groups, PREFIX)
    logits = torch.nn.functional.one_hot(batch.targets, 48).float() * 20
    loss, hits = loss_and_hits(logits, batch)
    assert loss < 1e-3
    assert hits.all()
    logits[1] = logits[1].roll(1)
    assert loss_and_hits(logits, batch)[1].tolist() == [False, True, True, True, True]


def test_training_learns_only_what_it_should():
    trainer = tiny_trainer()
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    losses = [trainer.train_step()["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_two_workers_compute_the_same_step():
    one, two = tiny_trainer(), tiny_trainer(workers=2)
    for _ in range(2):
        assert one.train_step()["loss"] == pytest.approx(two.train_step()["loss"], rel=1e-4)
    for name, value in one.adapter_tensors().items():
        torch.testing.assert_close(value, two.adapter_tensors()[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_steps_take_turns_under_the_plans(workers: int):
    """Each step is the one that autograd makes through the eager oracle of its mode; they train one set of weights."""
    blocks, modes = [(0, 1)], ("gla", "vla", "vla_scores")
    planned = tiny_trainer(workers, plans=[Plan.lazy(blocks, mode) for mode in modes])
    obvious, dense = tiny_trainer(), tiny_trainer()
    visual = torch.zeros(RECIPE.images_per_step, 64, dtype=torch.bool)
    visual[:, : len(PREFIX)] = torch.tensor(PREFIX) == IMAGE_TOKEN
    for mode in (*modes, modes[0]):
        with lazy_oracle(obvious.model, blocks, mode=mode, visual=visual):
            expected = obvious.train_step()["loss"]
        assert planned.train_step()["loss"] == pytest.approx(expected, rel=1e-3), mode
        assert dense.train_step()["loss"] != pytest.approx(expected, rel=1e-2), "a plan that changes nothing"
    for name, value in obvious.adapter_tensors().items():
        torch.testing.assert_close(planned.adapter_tensors()[name], value, atol=2e-3, rtol=1e-2)


def test_the_recipe_remembers_its_plans(tmp_path: Path):
    plan = Plan.lazy([(0, 1)])
    trainer = tiny_trainer(plans=[plan, plan])
    trainer.export(tmp_path / "adapter.safetensors")
    assert trained_under(tmp_path / "adapter.safetensors") == [plan]
    trainer.save(tmp_path / "checkpoint.pt")
    tiny_trainer(plans=[plan, plan]).resume(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another recipe"):
        tiny_trainer().resume(tmp_path / "checkpoint.pt")


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe()
    rates = [recipe.rate(step) for step in range(recipe.steps + 1)]
    assert rates[0] == 1 / recipe.warmup
    assert max(rates) == 1
    assert rates[-1] == 0
    assert rates[recipe.warmup :] == sorted(rates[recipe.warmup :], reverse=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_resumed_training_equals_uninterrupted(tmp_path: Path, workers: int):
    whole = tiny_trainer(workers)
    for _ in range(4):
        whole.train_step()
    first = tiny_trainer(workers)
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "checkpoint.pt")
    first.train_step()  # lost with the crash
    torch.manual_seed(99)
    second = tiny_trainer(workers)
    second.resume(tmp_path / "checkpoint.pt")
    assert second.step == 2
    for _ in range(2):
        second.train_step()
    assert [p["loss"] for p in second.curve] == [p["loss"] for p in whole.curve]
    for name, value in whole.adapter_tensors().items():
        assert torch.equal(value, second.adapter_tensors()[name]), name


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path):
    trainer = tiny_trainer()
    trainer.save(tmp_path / "checkpoint.pt")
    trainer.recipe = replace(RECIPE, steps=5)
    with pytest.raises(ValueError, match="another recipe"):
        trainer.resume(tmp_path / "checkpoint.pt")


def test_failed_checkpoint_keeps_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = tiny_trainer()
    trainer.save(tmp_path / "checkpoint.pt")
    trainer.train_step()

    def crash(state: object, file: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(tmp_path / "checkpoint.pt")
    again = tiny_trainer()
    again.resume(tmp_path / "checkpoint.pt")
    assert again.step == 0


def test_exported_adapter_round_trips(tmp_path: Path):
    trainer = tiny_trainer()
    trainer.train_step()
    path = tmp_path / "a.safetensors"
    path.with_suffix(".json").write_text("{}")  # describes an older file
    trainer.export(path)
    tensors, scale = read_adapter(path)
    assert scale == RECIPE.lora_scale
    for name, value in trainer.adapter_tensors().items():
        torch.testing.assert_close(tensors[name].float(), value, atol=1e-3, rtol=1e-3)


def test_training_goes_on_from_an_adapter():
    first = tiny_trainer()
    for _ in range(3):
        first.train_step()
    loss = first.curve[-1]["loss"]
    second = tiny_trainer(start=first.adapter_tensors())
    for name, value in first.adapter_tensors().items():
        assert torch.equal(value, second.adapter_tensors()[name]), name
    assert second.train_step()["loss"] < tiny_trainer().train_step()["loss"]
    assert loss < first.curve[0]["loss"]


def test_training_goes_on_from_a_projector_alone():
    """As `align` writes it: the decoder is as it came."""
    first = tiny_trainer()
    first.train_step()
    tensors = {n: value for n, value in first.adapter_tensors().items() if n.startswith("projector.")}
    second, fresh = tiny_trainer(start=tensors), tiny_trainer().adapter_tensors()
    for name, value in second.adapter_tensors().items():
        if name in tensors:
            assert torch.equal(value, tensors[name]), name
        elif name.endswith(".B"):
            assert torch.equal(value, fresh[name]), name
    with pytest.raises(ValueError, match="differs in 1 tensors"):
        tiny_trainer(start={name: value for name, value in tensors.items() if not name.endswith("linear_2.bias")})


@torch.no_grad()
def test_features_of_several_layers_are_what_the_projector_is_given():
    model = tiny_model(feature_layers=(1, -1))
    pixels = torch.randn(2, 3, 28, 28)
    features = encode(model, pixels)
    assert features.shape == (2, 4, 2 * model.config.vision_config.hidden_size)
    stock = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.stack(tuple(stock)), model.model.multi_modal_projector(features))


def test_half_precision_is_the_same_training_but_rougher():
    full, half = tiny_trainer(), tiny_trainer()
    half.recipe = replace(RECIPE, precision="bfloat16")
    a, b = full.train_step(), half.train_step()
    assert b["loss"] == pytest.approx(a["loss"], rel=0.03)
    assert b["loss"] != a["loss"]
    assert all(value.dtype == torch.float32 for value in half.adapter_tensors().values())
    assert half.train_step()["loss"] < b["loss"]


def test_an_adapter_of_another_rank_is_refused():
    tensors = tiny_trainer().adapter_tensors()
    name = next(name for name in tensors if name.endswith(".A"))
    tensors[name] = tensors[name][:1]
    with pytest.raises(ValueError, match="another rank"):
        tiny_trainer(start=tensors)


def test_tuning_under_a_plan_moves_what_the_plan_uses():
    """Queries and keys of the lazy layer stay, everything else learns; and the loss is the plan's."""
    trainer = tiny_trainer()
    before = {name: value.clone() for name, value in trainer.adapter_tensors().items()}
    tune(trainer, Plan.lazy([(0, 1)]), steps=3)
    losses = [point["loss"] for point in trainer.curve]
    assert losses[-1] < losses[0]
    assert abs(losses[0] - tiny_trainer().train_step()["loss"]) > 1e-3
    moved = {name for name, value in trainer.adapter_tensors().items() if not torch.equal(value, before[name])}
    kept = {name for name in before if re.match(r"lora\.layers\.1\.self_attn\.[qk]_proj\.", name)}
    assert moved == before.keys() - kept
    assert trainer.model.model.language_model._compiled_call_impl is None


def test_blocks_that_nobody_measured_are_refused():
    assert len(calibrated(15).lazy_policy.lazy_layers) == 15
    with pytest.raises(ValueError, match="not 14"):
        calibrated(14)


@torch.no_grad()
def test_teacher_forcing_counts_answers_and_tokens():
    """Of a model that is asked for what it would say: all right; with other pictures, not."""
    model, groups = tiny_model(), tiny_groups()
    features = torch.from_numpy(tiny_features().astype(np.float32))

    def own(rows):
        return features[[row[0].question.image for row in rows]]

    def others(rows):
        return 3 * features[[(row[0].question.image + 1) % 5 for row in rows]]

    batch = pack(groups, PREFIX)
    said = packed_logits(model, batch, own(groups), IMAGE_TOKEN).argmax(-1)
    place = 0
    willing: list[list[Encoded]] = []
    for group in groups:  # only the first answer token: it does not depend on the answer before it
        willing.append([])
        for item in group:
            suffix = item.suffix[: len(item.suffix) - item.answer_tokens]
            willing[-1].append(replace(item, suffix=(*suffix, int(said[place])), answer_tokens=1))
            place += item.answer_tokens
    assert teacher_forced_accuracy(model, willing, own, PREFIX, rows_at_once=2) == (1.0, 1.0)
    assert max(teacher_forced_accuracy(model, willing, others, PREFIX)) < 1.0


# ------------------------------------------------------------------------------------------------------------- data


def test_shuffled_partner_has_no_fixed_point():
    images = [3, 5, 8, 13, 21]
    partner = shuffled_partner(images)
    assert sorted(partner) == sorted(partner.values()) == images
    assert all(image != other for image, other in partner.items())
    assert partner == shuffled_partner(images)


def test_questions_leave_yes_and_no_out(tmp_path: Path):
    rows = [["what is the red shape?", "circle", 1], ["is it red?", "yes", 0], ["what color is the shape?", "teal", 0]]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "questions.json").write_text(json.dumps(rows))
    questions = load_questions(tmp_path, "test")
    assert [(q.image, q.kind) for q in questions] == [(1, "shape"), (0, "colour")]
    assert [group[0].image for group in by_image(questions)] == [0, 1]


# ------------------------------------------------------------------------------------------------------------ parts

FAKE = Part("nothing", "1.0", "nothing-1.0-py3-none-any.whl", "0" * 64, "none")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVL_FX_CACHE", str(tmp_path))
    return tmp_path


def test_changed_bytes_are_refused(cache: Path):
    (cache / "downloads").mkdir()
    (cache / "downloads" / FAKE.filename).write_bytes(b"tampered")
    with pytest.raises(ChecksumError, match=r"not the pinned nothing==1\.0.*Delete the file"):
        fetch(FAKE)


def test_changed_download_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def pip(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
        (Path(cwd) / FAKE.filename).write_bytes(b"tampered")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(parts.subprocess, "run", pip)
    with pytest.raises(ChecksumError):
        fetch(FAKE)
    assert list((cache / "downloads").iterdir()) == []


def test_offline_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(parts.subprocess, "run", pip)
    with pytest.raises(DownloadError, match=r"No matching distribution.*put nothing-1\.0-py3-none-any\.whl") as error:
        fetch(FAKE)
    assert str(cache / "downloads") in str(error.value)


def test_interrupted_build_leaves_nothing(cache: Path):
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("part", build)
    assert list((cache / "petite_vlm").iterdir()) == []
    folder = build_once("part", lambda f: (f / "whole").write_text("1") and None)
    assert [p.name for p in folder.iterdir()] == ["whole"]
    assert build_once("part", build) == folder  # not built again


def _field(number: int, payload: bytes | int) -> bytes:
    if isinstance(payload, int):
        return bytes([number << 3, payload])
    return bytes([number << 3 | 2, len(payload)]) + payload


def test_onnx_reader(tmp_path: Path):
    tensor = _field(1, 2) + _field(1, 3) + _field(2, 1) + _field(8, b"w") + _field(9, struct.pack("<6f", *range(6)))
    other = _field(1, 1) + _field(2, 7) + _field(8, b"int") + _field(9, b"\0" * 8)
    node = _field(1, b"x") + _field(1, b"w") + _field(2, b"y") + _field(4, b"MatMul")
    path = tmp_path / "m.onnx"
    path.write_bytes(_field(1, 8) + _field(7, _field(1, node) + _field(5, tensor) + _field(5, other)))
    weights, nodes = read_onnx(path)
    assert nodes == [Node("MatMul", ("x", "w"), ("y",))]
    assert list(weights) == ["w"]
    assert weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut short"):
        read_onnx(path)


# -------------------------------------------------------------------------------------------------- committed files


def test_adapter_is_the_described_one_and_small():
    described = json.loads(ADAPTER.with_suffix(".json").read_text())
    tensors, scale = read_adapter(ADAPTER)  # checks the sha256
    assert ADAPTER.stat().st_size == described["bytes"] <= 20 * 2**20
    assert scale == described["recipe"]["lora_scale"]
    assert len([key for key in tensors if key.startswith("lora.")]) == 30 * 7 * 2
    assert described["held_out"]["accuracy"]["all"] >= 0.9
    assert described["held_out"]["accuracy_shuffled"]["all"] < 0.45


def described(adapter: Path) -> dict[str, Any]:
    """What was written of an adapter of all data sets, by kind of question, in the order of the README."""
    facts = json.loads(adapter.with_suffix(".json").read_text())
    tensors, scale = read_adapter(adapter)  # checks the sha256
    assert adapter.stat().st_size == facts["bytes"] <= 20 * 2**20
    assert scale == facts["recipe"]["lora_scale"]
    assert trained_at(adapter) == (224, (4, 7, -3))
    assert tensors["projector.linear_1.weight"].shape == (576, 3 * 384)
    found = facts["held_out"]["found"]
    return {
        "`easy_vqa`": found["easy_vqa"]["all"],
        "`composites`: what, which": found["composites"]["what"],
        "`composites`: where": found["composites"]["where"],
        "`composites`: which colour": found["composites"]["colour"],
        "`composites`: which digit": found["composites"]["digit"],
        "`composites`: how many": found["composites"]["how many"],
        "`documents`": found["documents"]["all"],
        "`words`": found["words"]["all"],
        "`captions`": found["captions"]["all"],
    }


def test_what_the_adapters_answer_is_what_the_readme_says():
    mixture, reader, readme = described(MIXTURE), described(READER), (FOLDER / "README.md").read_text()
    for name, share in mixture.items():
        right, other, tokens = (f"{share[key]:.1%}" for key in ("right", "another image", "tokens"))
        assert f"| {name} | {share['questions']} | {right} | {other} | {tokens} |" in readme, name
        own, unseen, spelt = (f"{reader[name][key]:.1%}" for key in ("right", "another image", "tokens"))
        assert f"| {name} | {share['questions']} | {right} | {own} | {unseen} | {spelt} |" in readme, name


def test_damaged_adapter_is_refused(tmp_path: Path):
    damaged = bytearray(ADAPTER.read_bytes())
    damaged[-1] ^= 1
    copy = tmp_path / ADAPTER.name
    copy.write_bytes(damaged)
    copy.with_suffix(".json").write_text(ADAPTER.with_suffix(".json").read_text())
    with pytest.raises(ChecksumError, match="same commit"):
        read_adapter(copy)


def test_readme_states_the_recorded_accuracy():
    described = json.loads(ADAPTER.with_suffix(".json").read_text())["held_out"]
    stated = re.findall(r"\d+\.\d%", (FOLDER / "README.md").read_text())
    for key in ("accuracy", "accuracy_shuffled"):
        for kind in ("all", "colour", "shape"):
            assert f"{described[key][kind]:.1%}" in stated


def test_readme_states_what_tuning_won_back():
    found = json.loads((FOLDER / "lazy_layers" / "tuning_15.json").read_text())
    stated = (FOLDER / "README.md").read_text()
    for row in found["rows"]:
        cells = (f"{row[key]:.1%}" for key in ("dense", "lazy", "lazy, other pictures"))
        assert f"| {row['when']} | {' | '.join(cells)} |" in stated
    assert f"{found['training_questions']} questions" in stated


# -------------------------------------------------------------------------------- the real model (downloads the parts)


@pytest.fixture(scope="module")
def petite():
    return load_petite_vlm()


def test_weights_go_by_the_names_of_this_release():
    model = tiny_model()
    own = dict(model.state_dict())
    assert named_as_here(model.config, own).keys() == own.keys()
    newest = {f"model.vision_tower.encoder.layer.0.attention.{name}.weight" for name in ("q_proj", "o_proj")}
    older = {
        "model.vision_tower.encoder.layer.0.attention.attention.query.weight",
        "model.vision_tower.encoder.layer.0.attention.output.dense.weight",
    }
    assert {name_in_older_release(name) for name in newest} == older
    assert newest <= own.keys() or older <= own.keys()
    lacking = {name: value for name, value in own.items() if name != "model.vision_tower.layernorm.weight"}
    with pytest.raises(PartsError, match=r"names 1 weights otherwise, for example model\.vision_tower\.layernorm"):
        named_as_here(model.config, lacking)


@pytest.mark.slow
def test_pictures_painted_ahead_are_the_same(petite):
    model, processor = petite
    mixture = Mixture(model, processor, {"words": 2, "composites": 1}, 3, 2, seed=5)
    ahead = Ahead(mixture, steps=3, processes=2)
    assert ahead.prefix == mixture.prefix
    for step in (1, 2, 0):  # another step than the next one starts anew
        rows = mixture.rows_of(step)
        assert ahead.rows_of(step) == rows
        assert torch.equal(ahead.features_of(rows[1:]), mixture.features_of(rows[1:]))


@pytest.mark.slow
def test_real_model_is_the_stock_class(petite):
    model, processor = petite
    assert type(model) is LlavaForConditionalGeneration
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "transformers"}
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert processor.image_tokens == 144


@pytest.mark.slow
def test_real_model_answers_the_assets(petite):
    """One left-padded batch, then each alone."""
    from examples.petite_vlm.evaluate import answer

    model, processor = petite
    asked = json.loads((FOLDER / "assets" / "questions.json").read_text())
    images = [Image.open(FOLDER / "assets" / row["image"]) for row in asked]
    questions, expected = [row["question"] for row in asked], [row["answer"] for row in asked]
    assert len({len(processor.tokenizer(q)["input_ids"]) for q in questions}) > 1
    assert answer(model, processor, images, questions) == expected
    assert [answer(model, processor, [i], [q])[0] for i, q in zip(images, questions, strict=True)] == expected


@pytest.mark.slow
@torch.inference_mode()
def test_real_features_are_the_projector_input(petite):
    model, processor = petite
    image = Image.open(next((FOLDER / "assets").glob("*.png")))
    pixels = processor.prepare([image], ["what color is the shape?"])["pixel_values"]
    seen: list[torch.Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model.get_image_features(pixels)
    finally:
        hook.remove()
    assert torch.equal(seen[0], encode(model, pixels))
    assert seen[0].shape == (1, 144, 384)


@pytest.mark.slow
def test_real_tokenizer_keeps_the_image_tokens_apart(petite):
    model, processor = petite
    inputs = processor.prepare([Image.new("RGB", (9, 5))] * 2, ["what is it?", "what color is the shape in 2024?"])
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) == 144).all()
    assert inputs["attention_mask"][0, 0] == 0  # left
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert inputs["pixel_values"].shape == (2, 3, 168, 168)
    text = "Füße, 2024 naïve  tokens\n"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
