"""``packing={"tokens": N}`` through the trainer: the rows of an epoch, the loss of a step, resume, processes, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dts_hf.data.collators import PaddedCollator
from dts_hf.data.samplers import DUMMY_ROW, PackSampler, best_fit
from dts_hf.errors import UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.training.pair import set_up_models
from dts_hf.training.workload import workload_of
from tests.support.launching import WORKERS
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import (
    ROWS,
    arguments,
    encoded,
    largest_difference,
    losses,
    plain,
    step_gradients,
    trainer_for,
)
from tests.support.warm import run_warm

BUDGET = {"tokens": 170}
LOGGED = 3e-7  # the Trainer adds losses up in fp32
#: Of 16 rows of 28 to 72 tokens: five packs.
EPOCHS = {"max_steps": -1, "num_train_epochs": 3}


def batches_of(trainer: Any) -> list[dict[str, Any]]:
    """The batches of training, as they come."""
    seen: list[dict[str, Any]] = []
    step = trainer.training_step

    def note(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return step(model, inputs, *rest, **more)

    trainer.training_step = note
    trainer.train()
    return seen


@pytest.mark.parametrize("workers", [0, 1])
def test_every_epoch_takes_every_row_once_in_full_batches(tmp_path: Path, workers: int) -> None:
    options = {**EPOCHS, "dataloader_num_workers": workers, "dataloader_pin_memory": False}
    trainer = trainer_for(tmp_path, packing=BUDGET, options=options)
    lengths = trainer.train_dataset.lengths
    packs = len(best_fit(lengths, 170))
    planned = trainer.planned_steps()
    batches = batches_of(trainer)
    assert planned == trainer.state.max_steps == trainer.state.global_step == len(batches) == 3 * packs
    for epoch in range(3):
        rows = [batch["row_id"].tolist() for batch in batches[packs * epoch : packs * (epoch + 1)]]
        assert sorted(row for of_batch in rows for row in of_batch) == list(range(16))
    tokens = [batch["input_ids"].shape for batch in batches]
    assert all(rows == 1 and 150 < count <= 170 for rows, count in tokens)
    assert trainer.tokens_seen == 3 * sum(lengths)
    assert len({len(batch["row_id"]) for batch in batches}) > 1  # batches of unequal numbers of rows


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_step_equals_the_padded_step_of_the_same_rows(tmp_path: Path, accumulation: int) -> None:
    """In float64, micro-batches of unequal row counts and labels included: loss and gradients."""
    options = {"max_steps": 1, "gradient_accumulation_steps": accumulation, "learning_rate": 0.0, "optim": "sgd"}
    models = tiny_llama(seed=0).double(), tiny_llama(seed=1, layers=3).double()
    trainer = trainer_for(tmp_path, *models, packing=BUDGET, options=options)
    batches = batches_of(trainer)
    assert len(batches) == accumulation
    rows = [row for batch in batches for row in batch["row_id"].tolist()]
    padded = [PaddedCollator(2)([encoded()[row] for row in rows])]
    expected, packed = step_gradients(trainer, padded), step_gradients(trainer, batches)
    assert largest_difference(packed, expected) < 1e-10
    again = trainer_for(tmp_path, *models, rows=[ROWS[row] for row in rows], options={
        **options, "gradient_accumulation_steps": 1, "per_device_train_batch_size": len(rows)})  # fmt: skip
    again.train()
    assert losses(trainer) == pytest.approx(losses(again), rel=LOGGED)


def test_max_steps_may_end_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, packing=BUDGET, options={"max_steps": 7, "gradient_accumulation_steps": 2})
    batches = batches_of(trainer)
    assert trainer.planned_steps() == trainer.state.global_step == 7
    packs = len(best_fit(trainer.train_dataset.lengths, 170))
    steps = -(-packs // 2)  # of an epoch, the last one shorter where the number of packs is odd
    assert len(batches) == 7 // steps * packs + 7 % steps * 2


@pytest.mark.parametrize("steps", [{"max_steps": 10}, {"max_steps": -1, "num_train_epochs": 2}])
def test_the_speed_is_one_of_rows(tmp_path: Path, steps: dict[str, int]) -> None:
    """Of 16 rows in five packs, whatever ``per_device_train_batch_size`` says."""
    metrics = trainer_for(tmp_path, packing=BUDGET, options=steps).train().metrics
    assert metrics["train_samples_per_second"] / metrics["train_steps_per_second"] == pytest.approx(16 / 5, rel=1e-3)


def test_packs_are_not_made_by_one_process_for_all(tmp_path: Path) -> None:
    """Accelerate would join them to one batch, and fail on their lengths."""
    pair = set_up_models(tiny_llama(seed=0), tiny_llama(seed=1), tiny_tokenizer(), None, "strict", arguments(tmp_path))
    args: Any = SimpleNamespace(world_size=2, accelerator_config=SimpleNamespace(dispatch_batches=True))
    with pytest.raises(UserError, match="accelerator_config: got dispatch_batches: True, expected None or False"):
        pair.collator(True, None, args)


@pytest.mark.parametrize("checkpoint", [2, 7])
@pytest.mark.parametrize("rows", [ROWS, plain()], ids=["text", "tokens"])
def test_a_resume_in_the_middle_of_an_epoch_ends_in_the_same_bits(tmp_path: Path, rows: Any, checkpoint: int) -> None:
    options = {**EPOCHS, "save_strategy": "steps", "save_steps": checkpoint}
    more = {"rows": rows, "options": options, "packing": BUDGET}
    straight = trainer_for(tmp_path, tiny_gpt2(seed=0), tiny_gpt2(seed=1), **more)
    straight.train()
    torch.manual_seed(99)
    again = trainer_for(tmp_path, tiny_gpt2(seed=5), tiny_gpt2(seed=1), **more)
    torch.manual_seed(98)
    again.train(str(tmp_path / f"checkpoint-{checkpoint}"))
    assert losses(again) == losses(straight)
    one, other = (trainer.model.state_dict() for trainer in (again, straight))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("packing", "options", "says"),
    [
        ({"tokens": 160}, {}, r"batches were filled to another number of tokens \(data.packing\)"),
        (True, {}, "batches were filled to another number of tokens"),
        (BUDGET, {"gradient_accumulation_steps": 2}, "an optimizer step had 1 packs and would have 2"),
    ],
)
def test_a_resume_with_other_batches_is_refused(tmp_path: Path, packing: Any, options: Any, says: str) -> None:
    saved = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    trainer_for(tmp_path, packing=BUDGET, options=saved).train()
    with pytest.raises(UserError, match=says):
        trainer_for(tmp_path, packing=packing, options={**saved, **options}).train(str(tmp_path / "checkpoint-2"))


def test_held_out_rows_are_as_ever(tmp_path: Path) -> None:
    metrics = [
        trainer_for(
            tmp_path, packing=packing, eval_dataset=ROWS[:7], options={"per_device_eval_batch_size": 3}
        ).evaluate()
        for packing in (True, BUDGET)
    ]
    for values in metrics:
        for name in [name for name in values if "second" in name or "runtime" in name or "preparation" in name]:
            del values[name]
    assert metrics[0] == metrics[1] and metrics[0]["eval_rows"] == 7


@pytest.mark.parametrize(
    ("packing", "options", "says"),
    [
        ({"tokens": 70}, {}, r"{tokens: 70}: row r\d+ has 7\d tokens and fits into no batch; expected at least 7\d"),
        ({"tokens": 0}, {}, "packing: got {'tokens': 0}, expected true, false, or a budget of tokens"),
        ({"tokens": 2**21}, {}, "packing: got {'tokens': 2097152}"),
        ({"token": 170}, {}, "packing: got {'token': 170}"),
        ({"tokens": True}, {}, "packing: got"),
        (170, {}, "packing: got 170"),
        (BUDGET, {"train_sampling_strategy": "group_by_length"}, "got group_by_length, expected random"),
        (BUDGET, {"train_sampling_strategy": "sequential"}, "train_sampling_strategy: got sequential, expected random"),
        (BUDGET, {"dataloader_drop_last": True}, "dataloader_drop_last: got True, expected False beside data.packing"),
        (BUDGET, {"auto_find_batch_size": True}, "auto_find_batch_size: got True, expected False"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_before_training(
    tmp_path: Path, packing: Any, options: Any, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        trainer_for(tmp_path, packing=packing, options=options)


def test_tokenised_rows_are_named_by_number_and_streams_are_refused(tmp_path: Path) -> None:
    rows = plain()
    with pytest.raises(UserError, match=r"row \d+ has 7\d tokens"):
        trainer_for(tmp_path, rows=rows, packing={"tokens": 70})

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(rows)

    with pytest.raises(UserError, match="an iterable data set has no lengths to pack by"):
        trainer_for(tmp_path, rows=Stream(), packing=BUDGET)


def run(out: Path, world: int, accumulation: int, resume: str = "") -> None:
    out.mkdir()
    words = [str(out), str(accumulation), *filter(None, [resume])]
    done = run_warm(WORKERS / "packs_worker.py", world, words, "single" if world == 1 else "ddp")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_estimate_counts_a_full_pack(tmp_path: Path) -> None:
    """As many labels as 170 tokens can bring, whichever rows are in it; no more tokens than there are."""
    data = encoded()
    sections = {"student": {"model": "s"}, "teacher": {"model": "t"}, "output": {"dir": "o"}}
    found = {}
    for tokens in (170, 10_000):
        recipe = Recipe.from_dict(
            {**sections, "data": {"train": "t.jsonl", "packing": {"tokens": tokens}}}, deep=False
        )
        found[tokens] = workload_of(recipe, arguments(tmp_path), None, data)  # type: ignore[arg-type]
    full, everything = found[170], found[10_000]
    assert (full.rows, full.tokens, full.attention) == (1, 170, "packed")
    assert (everything.rows, everything.tokens) == (1, sum(data.lengths))
    labels = [length - prompt for length, prompt in zip(data.lengths, data.prompt_lengths, strict=True)]
    assert everything.labelled == sum(labels)
    sampler = PackSampler(data.lengths, 170)
    most = 0
    for epoch in range(20):
        sampler.set_epoch(epoch)
        most = max(most, *(sum(labels[row] for row in pack) for pack in sampler))
    assert most <= full.labelled <= 170


# ---------------------------------------------------------- two processes; tests/distributed has more of their strategies


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with two packs a step, two with one each."""
    out = tmp_path_factory.mktemp("packs")
    run(out / "one", 1, 2)
    run(out / "two", 2, 1)
    return out


@pytest.mark.soak
def test_two_processes_take_the_same_packs_and_end_in_the_same_weights(runs: Path) -> None:
    one, first, second = (json.loads((runs / name).read_text()) for name in ("one/0.json", "two/0.json", "two/1.json"))
    assert one["steps"] == first["steps"] == second["steps"] == one["planned"] == first["planned"] == 9
    shared = [pack for packs in zip(first["rows"], second["rows"], strict=True) for pack in packs]
    # Five packs an epoch: in its last step the second process has a dummy row.
    assert [pack for pack in shared if pack != [DUMMY_ROW]] == one["rows"] and shared.count([DUMMY_ROW]) == 3
    assert first["weights"] == second["weights"]
    assert first["losses"] == pytest.approx(one["losses"], rel=LOGGED)
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-9, abs=1e-12)
    assert first["tokens"] == one["tokens"]


@pytest.mark.soak
def test_two_processes_go_on_from_the_checkpoint_of_one(runs: Path) -> None:
    run(runs / "resumed", 2, 1, str(runs / "one" / "run" / "checkpoint-6"))
    resumed, straight = (json.loads((runs / name / "0.json").read_text()) for name in ("resumed", "two"))
    assert resumed["steps"] == straight["steps"]
    assert resumed["weights"] == pytest.approx(straight["weights"], rel=1e-9, abs=1e-12)
    assert resumed["losses"] == pytest.approx(straight["losses"], rel=LOGGED)
