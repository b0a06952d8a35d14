"""Which runs are of one kind: the same recipe but for the seed, on the same rows and models wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dts_hf.errors import UserError
from dts_hf.experiments.kinds import baseline_of, read_kinds
from dts_hf.runs.lock import lock, unlock
from tests.support.planted_runs import plant


def change(run: Path, **data: Any) -> Path:
    """The run with other keys in the section ``data`` of its recipe."""
    path = run / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= data
    path.write_text(yaml.safe_dump(recipe))
    return run


def at_temperature(run: Path, /, **policy: Any) -> Path:
    """The run with another temperature in its recipe."""
    path = run / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["temperature"] = policy
    path.write_text(yaml.safe_dump(recipe))
    return run


def record(run: Path, digest: str | None) -> Path:
    """The run with this digest of its training rows in its manifest; None: without a manifest."""
    path = run / "data_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["sha256"] = digest
    path.unlink() if digest is None else path.write_text(json.dumps(manifest))
    return run


def names(runs: list[Path]) -> list[str]:
    return [kind.name for kind in read_kinds(runs)]


def test_the_same_rows_in_two_folders_are_one_kind(tmp_path: Path) -> None:
    runs = [change(plant(tmp_path / f"r{s}", 1.0, s), train=f"folder-{s}/rows.jsonl") for s in (1, 2)]
    runs += [change(plant(tmp_path / f"t{s}", 2.0, s), train=f"folder-{s}/rows.jsonl") for s in (1, 2)]
    kinds = read_kinds(runs)
    assert [kind.name for kind in kinds] == ["temperature.value=1.0", "temperature.value=2.0"], (
        "no path tells them apart"
    )
    assert [sorted(kind.runs) for kind in kinds] == [[1, 2], [1, 2]]


def test_other_rows_under_one_name_are_another_kind(tmp_path: Path) -> None:
    """The file was changed between the runs: what each has recorded counts, not its name."""
    runs = [record(plant(tmp_path / f"r{digest}", 1.0, 1), digest * 64) for digest in "ab"]
    runs.append(record(plant(tmp_path / "again", 1.0, 2), "b" * 64))
    assert [len(kind.runs) for kind in read_kinds(runs)] == [1, 2] and len(set(names(runs))) == 2


def test_without_a_record_the_files_that_lie_here_are_read(tmp_path: Path) -> None:
    for folder, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(json.dumps({"instruction": text, "output": text}) + "\n")
    runs = [
        record(change(plant(tmp_path / f"r{place}", 1.0, place), train=str(tmp_path / folder / "rows.jsonl")), None)
        for place, folder in enumerate("abc")
    ]
    kinds = read_kinds(runs)
    assert [sorted(kind.runs) for kind in kinds] == [[0, 1], [2]]
    assert [kind.name for kind in kinds] == [f"data.train={tmp_path / folder / 'rows.jsonl'}" for folder in "ac"]


def test_rows_that_are_gone_and_not_recorded_are_told_apart_by_their_path(tmp_path: Path) -> None:
    runs = [record(change(plant(tmp_path / f, 1.0, 1), train=f"gone/{f}.jsonl"), None) for f in ("a", "b")]
    assert names(runs) == ["data.train=gone/a.jsonl", "data.train=gone/b.jsonl"]


def test_shares_that_are_held_out_are_kinds_though_the_file_is_one(tmp_path: Path) -> None:
    runs = [change(plant(tmp_path / f"r{share}", 1.0, 1), validation=share) for share in (0.1, 0.2)]
    assert names(runs) == ["data.validation=0.1", "data.validation=0.2"]


@pytest.mark.parametrize("same", [True, False])
def test_weights_are_read_where_paths_differ(tmp_path: Path, same: bool) -> None:
    runs = []
    for seed in (1, 2):
        model = tmp_path / f"model-{seed}"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(b"weights" if same else bytes([seed]))
        run = plant(tmp_path / f"r{seed}", 1.0, seed)
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["teacher"]["model"] = str(model)
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        runs.append(run)
    assert len(names(runs)) == (1 if same else 2)


def test_no_weights_are_read_where_all_runs_name_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("dts_hf.experiments.identity._of_place", lambda place: read.append(place) or place)
    model = tmp_path / "model"
    model.mkdir()
    for value in (1.0, 2.0):
        run = plant(tmp_path / f"t{value}", value, 1)
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["teacher"]["model"] = str(model)
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert len(read_kinds([tmp_path / "t1.0", tmp_path / "t2.0"])) == 2 and read == []


def test_a_run_that_is_still_loading_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``compare studies/mine/*`` beside a sweep that is at work."""
    runs = [plant(tmp_path / f"run-{value}", value, 1) for value in (1.0, 2.0)]
    lock(tmp_path / "loading")
    try:
        kinds = read_kinds([*runs, tmp_path / "loading"])
    finally:
        unlock()
    assert [len(kind.runs) for kind in kinds] == [1, 1] and not any(kind.failed for kind in kinds)
    assert "loading is left out: its run is still loading" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run directory"):
        read_kinds([*runs, tmp_path / "empty"])


def test_a_baseline_is_found_by_the_folder_of_a_run_that_failed(tmp_path: Path) -> None:
    runs = [plant(tmp_path / "a", 1.0, 1), plant(tmp_path / "b", 2.0, 1, ended=False)]
    kinds = read_kinds(runs)
    assert baseline_of(kinds, str(runs[1])).name == "temperature.value=2.0"
    with pytest.raises(UserError, match="is no kind of these runs"):
        baseline_of(kinds, "temperature.value=3")


def test_a_setting_is_no_part_of_another_one(tmp_path: Path) -> None:
    kinds = read_kinds([plant(tmp_path / f"{value:g}", value, 1) for value in (1.0, 1.5, 16.0)])
    for wanted in ("temperature.value=1", "value=1", "value=1.0", "temperature.value=1.0"):
        assert baseline_of(kinds, wanted).name == "temperature.value=1.0"
    assert baseline_of(kinds, "value=16").name == "temperature.value=16.0"
    assert baseline_of(kinds, "=1.5").name == "temperature.value=1.5"


def test_a_baseline_that_fits_several_kinds_names_them(tmp_path: Path) -> None:
    fine = [plant(tmp_path / f"{t:g}-{rate:g}", t, 1, learning_rate=rate) for t in (1.0, 16.0) for rate in (0.1, 0.2)]
    with pytest.raises(UserError) as caught:
        baseline_of(read_kinds(fine), "temperature.value=1")
    assert "fits several kinds" in str(caught.value) and str(caught.value).count("temperature.value=1.0") == 2
    assert "16" not in str(caught.value)


def test_controls_that_replay_the_run_of_their_own_seed_are_one_kind(tmp_path: Path) -> None:
    seeds = (1, 2, 3)
    warm, cold = (
        [
            at_temperature(plant(tmp_path / f"{t}-{s}", 1.0, s), name="dts", rule="gap", t_init=t, t_max=t)
            for s in seeds
        ]
        for t in (2.0, 3.0)
    )
    for seed, run in zip(seeds, warm, strict=True):
        (run / "log.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "temperature": 1.0 + seed}))
    matched = {
        name: [
            at_temperature(plant(tmp_path / f"{name}-{seed}", 1.0, seed), name="cosine", t_min=1.0, match_mean_of=str(run))
            for seed, run in zip(seeds, replayed, strict=True)
        ]
        for name, replayed in (("own", warm), ("other", warm[1:] + warm[:1]), ("cold", cold))
    }  # fmt: skip
    replays = [
        at_temperature(plant(tmp_path / f"open-{seed}", 1.0, seed), name="replay", run=str(run))
        for seed, run in zip(seeds, matched["own"], strict=True)
    ]
    kinds = read_kinds([*warm, *matched["own"], *matched["other"], *matched["cold"], *replays])
    assert [sorted(kind.runs) for kind in kinds] == [[1, 2, 3]] * 5
    assert ["of the same seed" in kind.name for kind in kinds] == [False, True, False, True, True]
    assert "match_mean_of=dts of another seed" in kinds[2].name and "run=cosine of the same seed" in kinds[4].name
    assert len(read_kinds(matched["own"])) == 1, "the runs that are replayed lie here, but are not compared"
    for run in warm:
        (run / "recipe.yaml").unlink()
    assert len(read_kinds(matched["own"])) == 3, "what is gone is told by its folder"
