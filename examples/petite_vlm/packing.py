"""Several questions about one image behind one image prefix, so that the 144 image tokens are paid for once.

A row is `prefix | question 1 + answer 1 | question 2 + answer 2 | ...`. A block mask lets every question see the prefix
and itself, and every question's positions start right after the prefix: each one computes exactly what it would compute
alone (a test holds that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from avl_fx import modality_ids

from .data import Question
from .processor import PetiteProcessor


@dataclass(frozen=True)
class Encoded:
    """A question in tokens: `suffix` is all after the image tokens; its last `answer_tokens` are to be learnt."""

    question: Question
    suffix: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Batch:
    """R packed rows of length L = P + longest tail; all on one device.

    prefix [P], tail [R, L-P], positions [R, L] int64; mask [R, 1, L, L] bool, True is visible; `at` [T, 2] int64: row
    and position of the states that predict `targets` [T] int64; `owner` [T] int64: which of `questions` each target
    belongs to.
    """

    prefix: torch.Tensor
    tail: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    at: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    questions: tuple[Question, ...]


def encode_question(processor: PetiteProcessor, question: Question, image_token_id: int) -> tuple[list[int], Encoded]:
    """The shared prefix, up to the last image token, and the question's own tokens with answer and end of turn."""
    tokenizer = processor.tokenizer
    prompt = tokenizer(processor.prompt(question.text))["input_ids"]
    answer = [*tokenizer(question.answer)["input_ids"], tokenizer.eos_token_id]
    split = len(prompt) - prompt[::-1].index(image_token_id)
    return prompt[:split], Encoded(question, tuple(prompt[split:] + answer), len(answer))


def pack(rows: Sequence[Sequence[Encoded]], prefix: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """One packed row for each group of questions; the questions of a group share an image."""
    start = len(prefix)
    length = start + max(sum(len(q.suffix) for q in row) for row in rows)
    tail = torch.full((len(rows), length - start), prefix[0])
    positions = torch.arange(length).repeat(len(rows), 1)
    segment = torch.full((len(rows), length), -1)  # -1: padding, seen by padding only
    segment[:, :start] = 0
    at: list[tuple[int, int]] = []
    targets: list[int] = []
    owner: list[int] = []
    questions: list[Question] = []
    for r, row in enumerate(rows):
        here = start
        for number, item in enumerate(row, start=1):
            end = here + len(item.suffix)
            tail[r, here - start : end - start] = torch.tensor(item.suffix)
            positions[r, here:end] = torch.arange(start, start + len(item.suffix))
            segment[r, here:end] = number
            for place in range(end - item.answer_tokens, end):
                at.append((r, place - 1))
                targets.append(item.suffix[place - start - (here - start)])
                owner.append(len(questions))
            questions.append(item.question)
            here = end
    segment, order = segment.to(device), torch.arange(length, device=device)
    same = segment[:, :, None] == segment[:, None, :]
    mask = (order[:, None] >= order) & (same | (segment[:, None, :] == 0))
    return Batch(
        prefix=torch.tensor(prefix, device=device),
        tail=tail.to(device),
        positions=positions.to(device),
        mask=mask[:, None],
        at=torch.tensor(at, device=device),
        targets=torch.tensor(targets, device=device),
        owner=torch.tensor(owner, device=device),
        questions=tuple(questions),
    )


def packed_logits(
    model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor, image_token_id: int
) -> torch.Tensor:
    """Logits [T, vocabulary] at the answer positions only; `features` [R, image tokens, vision width]."""
    embed = model.get_input_embeddings()
    rows = features.shape[0]
    image = model.model.multi_modal_projector(features)
    prefix = embed(batch.prefix).expand(rows, -1, -1)
    prefix = prefix.masked_scatter((batch.prefix == image_token_id)[None, :, None], image.to(prefix.dtype))
    visual = torch.zeros_like(batch.positions, dtype=torch.bool)
    visual[:, : len(batch.prefix)] = batch.prefix == image_token_id
    with modality_ids(visual):  # the decoder is called directly, and a plan may ask
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([prefix, embed(batch.tail)], dim=1),
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
    return model.lm_head(hidden[batch.at[:, 0], batch.at[:, 1]])


def loss_and_hits(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over answer tokens, and for each question whether greedy decoding would answer it: bool [Q].

    Greedy decoding gives the answer exactly when every answer token, the end of turn included, is the most likely one
    after the correct tokens before it.
    """
    loss = nn.functional.cross_entropy(logits.float(), batch.targets)
    wrong = (logits.argmax(-1) != batch.targets).long()
    misses = torch.zeros(len(batch.questions), dtype=torch.long, device=logits.device).index_add_(0, batch.owner, wrong)
    return loss, misses == 0
