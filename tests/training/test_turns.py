"""Conversations of several turns through ``DistillationTrainer``: exactly what the assistant says is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dts_hf.errors import UserError
from tests.support import reference
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import trainer_for

TOKENIZER = tiny_tokenizer()
START, END = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


def conversation(number: int, turns: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}] if number % 2 else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Name {turn} fruits" + " again" * number})
        messages.append({"role": "assistant", "content": "plums " * (1 + turn + number % 3) + f"{number}."})
    return {"id": f"r{number}", "messages": messages}


ROWS = [conversation(number, 1 + number % 3) for number in range(8)]


def targets(row: dict[str, Any], last_only: bool) -> tuple[list[int], list[bool]]:
    """The tokens of the whole conversation, and which are learned: behind each header, up to the end of turn."""
    ids = TOKENIZER.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    header = TOKENIZER("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    learned = [False] * len(ids)
    starts = [k + len(header) for k in range(len(ids)) if ids[k : k + len(header)] == header]
    for start in starts[-1:] if last_only else starts:
        stop = ids.index(END, start) + 1
        learned[start:stop] = [True] * (stop - start)
    return ids, learned


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("train_on", [None, "last_turn"])
def test_a_step_equals_the_dense_loss_of_exactly_the_learned_tokens(tmp_path, packing, train_on):
    student, teacher = tiny_llama(seed=0).double(), tiny_llama(seed=1, layers=3).double()
    trainer = trainer_for(
        tmp_path, student, teacher, ROWS, kd_ratio=0.4, temperature=2.0, packing=packing, train_on=train_on,
        logits_budget_mb=0.05,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.model.train()
    trainer.temperature.begin_step(0.0)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}

    student.zero_grad()
    z_s, z_t, labels = [], [], []
    for row in ROWS:
        ids, learned = (torch.tensor(part) for part in targets(row, train_on == "last_turn"))
        z_s.append(student(input_ids=ids[None], use_cache=False).logits[0, :-1][learned[1:]])
        z_t.append(teacher(input_ids=ids[None], use_cache=False).logits[0, :-1][learned[1:]].detach())
        labels.append(ids[1:][learned[1:]])
    every = torch.cat(labels)
    assert int(count) == len(every)
    expected = reference.distillation_loss(
        torch.cat(z_s), torch.cat(z_t), every, "forward_kl", {}, 2.0, 2.0, 0.4, True, len(every)
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_reports_count_every_learned_token(tmp_path):
    trainer = trainer_for(tmp_path, rows=ROWS)
    report = trainer.encoding_reports["train_dataset"]
    assert report.response_tokens == sum(sum(targets(row, False)[1]) for row in ROWS)
    assert report.kept == 8 and report.template == "chat"


def test_names_of_the_trainers_options_are_checked(tmp_path):
    with pytest.raises(UserError, match=r"train_on: got 'last', expected last_turn, all_turns, completion"):
        trainer_for(tmp_path, rows=ROWS, train_on="last")
    with pytest.raises(UserError, match=r"prompt_template: got 'chatml', expected one of auto, alpaca, chat, plain"):
        trainer_for(tmp_path, rows=ROWS, prompt_template="chatml")
