"""Mixed data through ``DistillationTrainer``: the student's own text is learned as the same text out of a file would be."""

from __future__ import annotations

import copy

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.generation.engine import Generated, generate
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.teachers.cached.layout import row_key
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.temperature.dts import DTS
from tests.support import reference
from tests.support.cached import cache_of
from tests.support.on_policy import ENDS, Gradients, recording
from tests.support.served import running, served_tiny
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, encoded, largest_difference, trainer_for

TEACHER = {"seed": 1, "layers": 3}
MIXED = {"fraction": 0.5, "max_new_tokens": 12}


def one_step(folder, on_policy=None, rows=ROWS, options=None, **more):
    """A trainer after one optimizer step, and the gradient of that step."""
    gradients = Gradients()
    args = arguments(folder, max_grad_norm=0.0, **{"per_device_train_batch_size": 16, **(options or {})})
    trainer = recording(args, rows=rows, on_policy=on_policy, callbacks=[gradients], **more)
    trainer.train()
    return trainer, gradients.found[0]


def as_data(texts):
    return [{"input_ids": ids, "labels": labels} for ids, labels in texts.values()]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal_weights(one, other):
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def logged(trainer):
    """Its log without what depends on the clock."""
    hidden = {"tokens_per_second", "generation_seconds"}
    return [
        {key: value for key, value in log.items() if key not in hidden and not key.startswith("train_")}
        for log in trainer.state.log_history
    ]


# ------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("packing", [False, True, {"tokens": 160}], ids=["padded", "packed", "packs"])
def test_the_gradient_is_that_of_the_same_text_as_data_with_kd_ratio_1(tmp_path, packing):
    """However the step is split, and whatever ``kd_ratio`` the data has."""
    small = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    if isinstance(packing, dict):
        packs = len(encoded().lengths) and 16  # so many micro-batches that all packs are in one step
        small = {"gradient_accumulation_steps": packs}
    split, gradient = one_step(tmp_path / "split", packing=packing, options=small)
    (texts,) = split.texts
    lengths = {len(ids) for ids, _ in texts.values()}
    assert len(texts) == 16 and len(lengths) > 5 and split.generated_step
    plain, expected = one_step(
        tmp_path / "plain", {"fraction": 0.0}, as_data(texts), kd_ratio=1.0, packing=bool(packing)
    )
    assert not plain.generated_step and largest_difference(gradient, expected) < 1e-6
    if not isinstance(packing, dict):
        whole, once = one_step(tmp_path / "whole", packing=packing)
        assert whole.texts == split.texts, "the text of a row does not depend on how the step is split"
        assert largest_difference(once, gradient) < 1e-6


def test_loss_and_gradient_are_those_of_the_dense_float64_reference(tmp_path):
    student, teacher = tiny_llama(seed=0).double(), tiny_llama(**TEACHER).double()
    start = copy.deepcopy(student)
    small = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    trainer, gradient = one_step(tmp_path, model=student, teacher=teacher, kd_ratio=0.3, options=small)
    z_s, z_t, targets = [], [], []
    for ids, labels in trainer.texts[0].values():
        kept = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
        tokens, before = torch.tensor([ids]), torch.tensor(kept) - 1
        z_s.append(start(input_ids=tokens).logits[0, before])
        z_t.append(teacher(input_ids=tokens).logits[0, before].detach())
        targets += [ids[place] for place in kept]
    options = {"temperature_student": 2.0, "temperature_teacher": 2.0, "kd_ratio": 1.0, "squared": True}
    loss = reference.distillation_loss(
        torch.cat(z_s), torch.cat(z_t), torch.tensor(targets), "forward_kl", {}, normalizer=len(targets), **options
    )
    loss.backward()
    dense = {name: p.grad for name, p in start.named_parameters()}
    assert largest_difference(gradient, dense) < 1e-9
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6) and log["kd_loss"] == pytest.approx(
        loss.item(), rel=1e-9
    )
    own = -torch.log_softmax(torch.cat(z_s), -1)[torch.arange(len(targets)), torch.tensor(targets)].mean()
    assert log["generated_ce_loss"] == pytest.approx(own.item(), rel=1e-9), "measured, and apart from that of the data"
    assert "ce_loss" not in log and "gap" not in log


# ----------------------------------------------------------------------------------------------------------- the ends


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_labels_hold_exactly_the_ends_that_were_reached(tmp_path, packing):
    """The tokenizer's padding token is its end of turn, and the prompts are full of ends of turns."""
    assert tiny_tokenizer().pad_token_id == tiny_tokenizer().eos_token_id == 2
    said = {}

    def watched(model, prompts, settings, **options):
        answers = generate(model, prompts, settings, **options)
        said.update({int(key.split("\x1f")[0]): one for key, one in zip(options["row_keys"], answers, strict=True)})
        return answers

    trainer = recording(arguments(tmp_path, per_device_train_batch_size=16), packing=packing)
    trainer.rollout.answer = watched
    batches = []
    inner = trainer.compute_loss

    def seen(model, inputs, *args, **kwargs):
        batches.append(inputs["labels"].clone())
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = seen
    trainer.train()
    reached = [one.end for one in said.values() if one.finished]
    assert len({*reached}) > 3 and len(reached) < 16, "by several ends, and some by none"
    labels = batches[0][batches[0] != IGNORE_INDEX].tolist()
    assert sorted(label for label in labels if label in ENDS) == sorted(reached)
    assert len(labels) == sum(len(one.tokens) + one.finished for one in said.values())
    log = trainer.state.log_history[0]
    assert log["generated_ended"] == len(reached) / 16 and log["generated_truncated"] == 1 - len(reached) / 16
    assert log["generated_length"] == pytest.approx(len(labels) / 16) and log["generated_share"] == 1


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("answer", [Generated([], True, 2), Generated([], False)], ids=["only the end", "nothing"])
def test_empty_answers_have_the_end_alone_or_no_label(tmp_path, packing, answer):
    trainer = recording(arguments(tmp_path, max_steps=2), packing=packing, on_policy={"fraction": 0.5})
    trainer.rollout.answer = lambda model, prompts, *_, **__: [answer] * len(prompts)
    trainer.generates = lambda step, steps: step == 0
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert trainer.kinds == [True, False] and all(line["loss"] == line["loss"] for line in log)
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())
    labels = [label for batches in trainer.answered[0] for row in batches for label in row["labels"]]
    assert sum(label != IGNORE_INDEX for label in labels) == (8 if answer.finished else 0)
    assert ("generated_kl" in log[0]) == answer.finished


# ---------------------------------------------------------------------------------------------- nothing else is moved


def with_dropout(seed=0):
    model = tiny_llama(seed=seed)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


def test_fraction_0_is_a_plain_run_to_the_bit(tmp_path):
    options = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    plain = trainer_for(tmp_path / "plain", with_dropout(), options=options)
    plain.train()
    mixed = trainer_for(tmp_path / "mixed", with_dropout(), options=options, on_policy={"fraction": 0})
    mixed.train()
    assert_equal_weights(weights(plain), weights(mixed))
    shares = [log.pop("generated_share", 0.0) for log in mixed.state.log_history]
    assert logged(mixed) == logged(plain) and not any(shares)


def test_a_run_that_goes_on_is_one_without_a_break_to_the_bit(tmp_path):
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    asked = {**MIXED, "schedule": "linear", "fraction": 0.6, "end_fraction": 0.4, "seed": 13}

    def run(student, resume=None):
        args = arguments(tmp_path / "run", **options)
        trainer = recording(args, student, on_policy=asked, temperature={"name": "dts"})
        trainer.train(resume)
        return trainer

    straight = run(with_dropout())
    assert {*straight.kinds[:3]} == {*straight.kinds[3:]} == {True, False}, "both kinds before and after the break"
    resumed = run(with_dropout(9), str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.kinds == straight.kinds[3:]
    assert resumed.texts == straight.texts[sum(straight.kinds[:3]) :]
    assert_equal_weights(weights(straight), weights(resumed))
    assert logged(resumed)[:-1] == logged(straight)[:-1]
    args, another = arguments(tmp_path / "run", **options), {**asked, "top_p": 0.9}
    other = recording(args, with_dropout(), on_policy=another, temperature={"name": "dts"})
    with pytest.raises(UserError, match=r"on_policy.top_p: was 1.0, now 0.9"):
        other.train(str(tmp_path / "run" / "checkpoint-3"))


class Stop(Exception):
    """Breaks an answer off."""


@pytest.mark.parametrize("breaks", [False, True], ids=["answers", "breaks off"])
def test_dropout_and_checkpointing_are_off_meanwhile_and_then_as_before(tmp_path, breaks):
    student = with_dropout()
    recompute = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, **recompute)
    trainer = recording(args, student)
    state, recomputed, widths = [], [], []

    def look():
        return [(m.training, getattr(m, "gradient_checkpointing", None), getattr(m, "_gradient_checkpointing_func", None))
                for m in student.modules()]  # fmt: skip

    def answer(model, prompts, settings, **options):
        recomputed.clear()
        if not state:  # the first batch is drawn before the Trainer switches to training
            state.append(None)
            return generate(model, prompts, settings, **options)
        state.append((look(), torch.get_rng_state()))
        for layer in model.model.layers:
            own = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *a, own=own, **k: recomputed.append(1) or own(*a, **k)
        state.append((look(), None))

        def watch(module, positional, keywords):
            assert not any(inner.training for inner in model.modules())
            widths.append(keywords["input_ids"].shape[1])
            if breaks and len(widths) == 3:
                raise Stop

        handle = model.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            found = generate(model, prompts, settings, **options)
        finally:
            handle.remove()
            assert not recomputed, "nothing is recomputed without a backward pass"
            assert look() == state[2][0], "also where it breaks off"
            assert torch.equal(torch.get_rng_state(), state[1][1]), "nobody else's randomness is used"
        return found

    trainer.rollout.answer = answer
    if breaks:
        with pytest.raises(Stop):
            trainer.train()
        return
    trainer.train()
    assert widths[0] > 1 and {*widths[1:]} == {1}, "the cache is on"
    assert state[1][0][0][0] and recomputed, "and training goes on with dropout, and recomputes"


# ------------------------------------------------------------------------------------------------- temperature and log


def test_the_policy_is_not_told_of_text_of_the_students_own(tmp_path, monkeypatch):
    told, end_step = [], DTS.end_step
    monkeypatch.setattr(DTS, "end_step", lambda self, stats: told.append(stats) or end_step(self, stats))
    args = arguments(tmp_path, max_steps=6, per_device_train_batch_size=4)
    trainer = recording(args, on_policy=MIXED, temperature={"name": "dts", "rule": "gap"})
    trainer.train()
    kinds = trainer.kinds
    assert {*kinds} == {True, False} and len(told) == kinds.count(False)
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert [log["generated_share"] for log in logs] == [float(kind) for kind in kinds]
    of_data = [log for log, kind in zip(logs, kinds, strict=True) if not kind]
    assert [log["gap"] for log in of_data] == pytest.approx([stats.student_ce - stats.teacher_ce for stats in told])
    assert not any("generated_ce_loss" in log for log in of_data)
    assert not any("gap" in log for log, kind in zip(logs, kinds, strict=True) if kind)


def test_a_line_over_steps_of_both_kinds_keeps_them_apart(tmp_path):
    found = {}
    for every in (1, 6):
        args = arguments(tmp_path, max_steps=6, per_device_train_batch_size=4, logging_steps=every)
        trainer = recording(args, on_policy=MIXED)
        trainer.train()
        found[every] = [log for log in trainer.state.log_history if "kl" in log]
    (line,), lines = found[6], found[1]
    assert line["generated_share"] == pytest.approx(sum(log["generated_share"] for log in lines) / 6)
    for name in ("ce_loss", "teacher_ce", "gap", "generated_ce_loss", "generated_kl", "generated_length"):
        values = [log[name] for log in lines if name in log]
        assert 0 < len(values) < 6 and min(values) <= line[name] <= max(values), name
    assert line["gap"] == pytest.approx(line["ce_loss"] - line["teacher_ce"])


# ------------------------------------------------------------------------------------------- teachers, rows, refusals


def cached(folder, live):
    teacher = tiny_llama(**TEACHER)
    return CachedTeacher(cache_of(folder / "states", teacher), LiveTeacher(teacher) if live else None)


def test_a_cached_teacher_answers_live_and_one_elsewhere_is_asked(tmp_path):
    """The same losses as of the live one, in steps of both kinds; nothing that was asked of the data is kept."""
    args = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}

    def losses(teacher):
        trainer = recording(arguments(tmp_path, **args), teacher=teacher, on_policy=MIXED)
        trainer.train()
        assert {*trainer.kinds} == {True, False}
        return trainer, [log["loss"] for log in trainer.state.log_history if "kl" in log]

    expected = losses(tiny_llama(**TEACHER))[1]
    assert losses(cached(tmp_path, live=True))[1] == pytest.approx(expected, rel=1e-5)
    with running(served_tiny()) as url:
        trainer, found = losses(RemoteTeacher(url))
        assert found == pytest.approx(expected, rel=1e-5)
        assert len(trainer.teacher.of_rows._asked) <= 1, "at most the batch that accelerate has drawn ahead"


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_answers_to_the_students_own_text_are_not_kept(tmp_path, several):
    """Nobody asks for them again, and of a long run they are as many labels as training has."""
    args = arguments(tmp_path, max_steps=4, per_device_train_batch_size=4)
    with running(served_tiny()) as url:
        far = RemoteTeacher(url, cache=tmp_path / "kept")
        other = {"teachers": {"a": tiny_llama(seed=2), "far": far}, "teacher_weights": {"a": 0.5, "far": 0.5}}
        trainer = recording(args, on_policy=MIXED, **(other if several else {"teacher": far}))
        trainer.train()
        assert {*trainer.kinds} == {True, False}
        answered = [row for batches in trainer.answered for rows in batches for row in rows]
        far.asking._look_again()
        kept = {*far.asking._places}
    keys = [{row_key(row["input_ids"], row["labels"]) for row in rows} for rows in (answered, encoded())]
    assert kept and kept <= keys[1] and not kept & keys[0]


def test_each_row_keeps_its_teacher(tmp_path):
    rows = [{**row, "who": ("a", "b")[number % 3 == 0]} for number, row in enumerate(ROWS)]
    teachers = {"a": tiny_llama(**TEACHER), "b": tiny_llama(seed=2)}
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer = recording(args, rows=rows, teachers=teachers, teacher_column="who", on_policy=MIXED)
    trainer.generates = lambda step, steps: step == 1
    trainer.train()
    found = [row for batches in trainer.answered[0] for row in batches]
    assert [row["teacher_number"] for row in found] == [int(row["row_id"] % 3 == 0) for row in found]
    first, second = (log for log in trainer.state.log_history if "kl" in log)
    assert first["labels/a"] and first["labels/b"] and not second["labels/a"], "of the data alone"


def test_the_student_says_only_what_the_teacher_knows(tmp_path):
    """Its head has rows behind the vocabulary, which it prefers by far; the teacher has none."""
    student = tiny_llama(vocab=340, tie=False)
    with torch.no_grad():
        student.lm_head.weight[320:] *= 20
    trainer = recording(arguments(tmp_path), student, vocab_alignment="truncate_to_tokenizer")
    trainer.train()
    said = [label for _, labels in trainer.texts[0].values() for label in labels if label != IGNORE_INDEX]
    assert said and max(said) < 320
    wide = generate(student, [[5, 6]] * 8, trainer.rollout.generation, eos_token_ids=[], pad_token_id=2)
    assert any(token >= 320 for one in wide for token in one.tokens), "without the limit it would say others"


def test_of_several_turns_the_last_is_answered(tmp_path):
    messages = [
        {"role": "user", "content": "Name a fruit"}, {"role": "assistant", "content": "a plum"},
        {"role": "user", "content": "and one more"}, {"role": "assistant", "content": "a pear"},
    ]  # fmt: skip
    trainer = recording(arguments(tmp_path), rows=[{"messages": messages}] * 8)
    trainer.train()
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, tokenize=True, return_dict=False)
    for ids, labels in trainer.texts[0].values():
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :] and len(ids) > len(prompt)


def test_rows_of_a_stream_are_answered_too(tmp_path):
    def rows():
        yield from ROWS

    listed = recording(arguments(tmp_path, train_sampling_strategy="sequential"))
    streamed = recording(arguments(tmp_path), rows=rows)
    for trainer in (listed, streamed):
        trainer.train()
    assert streamed.texts == listed.texts


def test_the_student_may_be_an_adapter(tmp_path):
    from peft import LoraConfig

    def adapter():
        torch.manual_seed(0)
        return LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")

    trainer, gradient = one_step(tmp_path, peft_config=adapter())
    (texts,) = trainer.texts
    assert gradient and all("lora_" in name for name in gradient)
    whole, _ = one_step(tmp_path)
    assert texts == whole.texts[0], "a fresh adapter changes nothing, and its dropout is off while it answers"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"teacher": "cached"}, r"^on_policy: the cached teacher knows the rows of the data alone.*missing: live"),
        ({"teacher": None, "kd_ratio": 0.0}, "^on_policy: there is no teacher"),
        ({"data_collator": "own"}, "^data_collator: got function beside on_policy"),
        ({"rows": [{"text": "Apples and pears grow on trees."}] * 4}, "train_dataset: row .*has no prompt"),
        ({"on_policy": {"max_new_tokens": 1000}}, r"a prompt of \d+ tokens.*max_new_tokens = 1000.*1,024 positions"),
    ],
)
def test_what_mixed_data_does_not_go_with_is_refused_before_the_first_step(tmp_path, more, named):
    if more.get("teacher") == "cached":
        more = {**more, "teacher": cached(tmp_path, live=False)}
    if more.get("data_collator") == "own":
        data = encoded()
        rows = [{name: data[k][name] for name in ("input_ids", "labels")} for k in range(len(data))]
        more = {"rows": rows, "data_collator": lambda examples: {
            name: torch.tensor([examples[0][name]]) for name in ("input_ids", "labels")}}  # fmt: skip
    options = {"teacher": tiny_llama(**TEACHER), "temperature": 2.0, "on_policy": MIXED, **more}
    with pytest.raises(UserError, match=named):
        trainer_for(tmp_path, **options) if options["teacher"] is not None else _without_teacher(tmp_path, options)


@pytest.mark.parametrize("how", [{"teacher_column": "who"}, {"teacher_weights": {"a": 0.5, "b": 0.5}}], ids=str)
def test_one_of_several_that_knows_the_data_alone_is_refused_by_its_name(tmp_path, how):
    rows = [{**row, "who": "ab"[number % 2]} for number, row in enumerate(ROWS)]
    teachers = {"a": tiny_llama(seed=2), "b": cached(tmp_path, live=False)}
    with pytest.raises(
        UserError, match=r"^on_policy: the cached teachers\.b knows.*expected teachers\.b\.missing: live"
    ):
        recording(arguments(tmp_path), rows=rows, teachers=teachers, on_policy=MIXED, **how)


def test_prompts_are_measured_against_a_server_that_is_one_of_several(tmp_path):
    with running(served_tiny(tiny_llama(**TEACHER, max_positions=64))) as url:
        teachers = {"a": tiny_llama(seed=2), "far": RemoteTeacher(url)}
        with pytest.raises(UserError, match=rf"max_new_tokens = 60.*64 positions of the teacher at {url}"):
            recording(
                arguments(tmp_path), teachers=teachers, teacher_weights={"a": 0.5, "far": 0.5},
                on_policy={"max_new_tokens": 60}, max_length=64, max_prompt_length=48,
            )  # fmt: skip


def test_a_scheduled_share_is_of_a_run_of_one_length(tmp_path):
    """With nothing else that is scheduled: a longer run would have the shares of neither."""
    asked = {"fraction": 0.0, "schedule": "linear", "end_fraction": 1.0, "max_new_tokens": 4}
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    recording(arguments(tmp_path, **options, max_steps=2), on_policy=asked).train()
    longer = recording(arguments(tmp_path, **options, max_steps=4), on_policy=asked)
    with pytest.raises(UserError, match=r"run of 2 steps; this is one of 4.*own text \(on_policy\.schedule\)"):
        longer.train(str(tmp_path / "checkpoint-1"))


def _without_teacher(folder, options):
    from dts_hf.training.trainer import DistillationTrainer

    DistillationTrainer(
        tiny_llama(), None, args=arguments(folder), train_dataset=ROWS, processing_class=tiny_tokenizer(), kd_ratio=0.0,
        on_policy=options["on_policy"],
    )  # fmt: skip
