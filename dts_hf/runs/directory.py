"""The run directory is an API: everything that a run leaves behind, and the only thing that reports read.

    recipe.yaml  environment.json  data_manifest.json  log.jsonl  checkpoint-*/  final/  final.json  metrics.json
    scores.json (of the models before training)  student_init.json (where rows decided what the student keeps)
    predictions/*.jsonl  figures/*.png  report.html  README.md (model card)

A run that is not finished may also have interrupted/checkpoint-*.
Files are written under a temporary name and then renamed, so a reader never sees half of one. None of all this is a link.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dts_hf import files
from dts_hf.console import say
from dts_hf.errors import UserError, nearest
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.yaml_files import parse_yaml
from dts_hf.runs.file_lists import flushed, why_differs
from dts_hf.runs.links import make_folder, matching, open_nofollow, refuse_links, remove, remove_files
from dts_hf.runs.lock import LOCK, is_in_use
from dts_hf.runs.names import BROKEN_STEP_FILES, LEFTOVERS, NOBODYS, OUR_NAMES

RECIPE_HEADER = (
    "# The effective recipe of this run, every default written out. Train again with it: dts-hf train FILE\n"
)
#: Models that are scored before training starts; their scores are in scores.json.
BEFORE = ("teacher", "student_before")
PREDICTION_ORDER = (*BEFORE, "student")
#: Before the name of one of several teachers, in scores and predictions.
ONE_TEACHER = "teacher_"


def is_before(name: str) -> bool:
    """Whether the model of this name in ``metrics.json`` is scored before training."""
    return name in BEFORE or name.startswith(ONE_TEACHER)


def scored_before(recipe: Recipe) -> list[str]:
    """The models that ``recipe`` wants scored before training, by their names in ``metrics.json``."""
    teachers = [key.replace("teachers.", ONE_TEACHER) for key in recipe.kept_teachers]
    names = {"teacher": teachers, "student_before": ["student_before"]}
    return [name for model in BEFORE if model in recipe.evaluation.models for name in names[model]]


class RunDirectory:
    """Typed reader and writer of one run. Readers give back an empty value for a file that the run does not have.

    Args:
        path: the folder; use ``create`` for a new run and ``open`` for one that exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.goes_on = False  # this attempt began from a checkpoint
        self.recipe_path = self.path / "recipe.yaml"
        self.environment_path = self.path / "environment.json"
        self.data_manifest_path = self.path / "data_manifest.json"
        self.student_init_path = self.path / "student_init.json"
        self.log_path = self.path / "log.jsonl"
        self.final_path = self.path / "final"
        self.final_list_path = self.path / "final.json"
        self.metrics_path = self.path / "metrics.json"
        self.scores_path = self.path / "scores.json"
        self.predictions_path = self.path / "predictions"
        self.figures_path = self.path / "figures"
        self.report_path = self.path / "report.html"
        self.card_path = self.path / "README.md"

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    # ------------------------------------------------------------------------------------------- opening and making

    @classmethod
    def check_can_create(cls, path: str | Path, overwrite: bool = False, resume: bool = False) -> None:
        """Refuse now what ``create`` would refuse later; leaves everything as it is. Call it before models are loaded.

        Raises:
            UserError: see ``check_content``; or a place where nothing can be written.
        """
        cls.check_content(path, overwrite, resume)
        files.check_can_write(Path(path), "output.dir")

    @classmethod
    def check_content(cls, path: str | Path, overwrite: bool = False, resume: bool = False) -> None:
        """Refuse by what is there alone, without trying whether anything can be written: another run may be at work there.

        Raises:
            UserError: the path is a file, a folder with something in it, or one where something of a run is a link.
        """
        path = Path(path)
        files.check_name(path, "output.dir")
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"output.dir: {path} is a file, expected a folder that does not exist yet")
        existing = next(folder for folder in [path, *path.absolute().parents] if os.path.lexists(folder))
        if not existing.is_dir():
            raise UserError(f"output.dir: cannot make {path}, because {existing} is a file")
        refuse_links(path, [name.partition("/")[0] for name in (*OUR_NAMES, *LEFTOVERS, LOCK)])
        run = cls(path)
        if not path.is_dir() or not {*path.iterdir()} - {path / LOCK, *run._leftovers(), *_nobodys(path)}:
            return
        if resume and _made_by_a_run(run.recipe_path):
            return
        if not overwrite and not resume:
            unfinished = _made_by_a_run(run.recipe_path) and not run.metrics_path.is_file()
            go_on = "go on with the unfinished run in it (--resume), " if unfinished else ""
            raise UserError(
                f"output.dir: {path} is not empty. Choose another folder, {go_on}or replace the run in it with"
                " output.overwrite=true (--overwrite)"
            )
        if not _made_by_a_run(path / "recipe.yaml"):
            raise UserError(
                f"output.dir: {path} is not empty and holds no run of dts_hf, so it is not"
                f" {'resumed' if resume else 'overwritten'}. Choose another folder"
            )

    @classmethod
    def create(cls, path: str | Path, overwrite: bool = False, resume: bool = False) -> RunDirectory:
        """Make the folder and return it. Where other processes may start the same run, the caller has locked it.

        Args:
            path: does not exist, or is an empty folder, unless one of the following is set.
            overwrite: remove the files of the run that is there first. Files that are not ours are left alone.
            resume: keep the files of the run that is there, its checkpoints and log included; without one, a new run.

        Raises:
            UserError: see ``check_can_create``.
        """
        cls.check_can_create(path, overwrite, resume)
        run = cls(path)
        for old in [*run._leftovers(), *(run._our_files() if overwrite and not resume else [])]:
            remove(old) if old.parent == run.path else remove_files(old.parent, old.name)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output.dir: cannot make {path}: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Return the run at ``path``.

        Raises:
            UserError: there is no such folder, or it holds no run.
        """
        path = Path(path)
        files.check_name(path, "RUN")
        if not path.is_dir():
            siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
            raise UserError(f"{path}: no such run directory.{nearest(path.name, siblings)}")
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path}: this is no run directory of dts_hf, it has no recipe.yaml")
        return cls(path)

    def _our_files(self) -> list[Path]:
        return [found for name in OUR_NAMES for found in matching(self.path, name)]

    def _leftovers(self) -> list[Path]:
        found = [path for name in LEFTOVERS for path in matching(self.path, name)]
        return [path for path in found if not (path.is_dir() and is_in_use(path))]  # else an upload is going on in it

    def clean_up(self) -> None:
        """Remove what only an unfinished run needs. ``scores.json`` stays, in case ``metrics.json`` is damaged one day."""
        for broken in self.path.glob(BROKEN_STEP_FILES):
            broken.unlink(missing_ok=True)
        shutil.rmtree(self.path / "interrupted", ignore_errors=True)  # which leaves a link as it is

    # ------------------------------------------------------------------------------------------ one pair for each file

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the effective recipe; ``read_recipe`` and ``load_recipe`` give back an equal one."""
        files.write_text_atomic(self.recipe_path, RECIPE_HEADER + recipe.to_yaml())

    def read_recipe(self) -> Recipe:
        """Return the recipe that made this run, without loading torch."""
        values = parse_yaml(self.recipe_path.read_text(encoding="utf-8"), str(self.recipe_path))
        return Recipe.from_dict(values, str(self.recipe_path), deep=False)

    def write_environment(self, values: Mapping[str, Any]) -> None:
        """Write ``environment.json``; see the function ``environment``."""
        files.write_json_atomic(self.environment_path, values)

    def read_environment(self) -> dict[str, Any]:
        """Return ``environment.json``; empty where it is damaged, for no number depends on it, and one line says so."""
        try:
            return files.read_json(self.environment_path)
        except UserError as error:
            say(f"{error}. What it said of versions and machine is lost")
            return {}

    def write_data_manifest(self, values: Mapping[str, Any]) -> None:
        """Write ``data_manifest.json``: what was read, its hash, what was dropped."""
        files.write_json_atomic(self.data_manifest_path, values)

    def read_data_manifest(self) -> dict[str, Any]:
        """Return ``data_manifest.json``.

        Raises:
            UserError: it is damaged.
        """
        try:
            return files.read_json(self.data_manifest_path)
        except UserError as error:
            raise UserError(
                f"{error}. It alone knows the rows and models of this run: put the file back from a copy, or train again "
                "with --overwrite"
            ) from None

    def write_student_init(self, values: Mapping[str, Any]) -> None:
        """Write ``student_init.json``: the layers and channels that the student keeps, and what else was measured."""
        files.write_sealed(self.student_init_path, values)

    def read_student_init(self) -> dict[str, Any]:
        """Return ``student_init.json``; empty where it is damaged."""
        return files.read_sealed(self.student_init_path)

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        """Write ``metrics.json``: the scores with n, spread, seeds and protocol fingerprint. It marks the run as finished.

        What it speaks of is on the disk before it, and listed in ``final.json``: a power cut cannot leave the mark alone.
        """
        text = files.json_text(values)
        answers = [self.predictions_of(name) for name in self.predictions_names()]
        ended = [path for path in [*sorted(self.final_path.rglob("*")), *answers, self.log_path] if path.is_file()]
        listed = flushed(self.path, ended)
        listed["metrics.json"] = {"size": len(text.encode()), "digest": files.text_digest(text)}
        files.write_sealed(self.final_list_path, {"format": 2, "files": listed})
        files.write_text_atomic(self.metrics_path, text)

    def read_metrics(self) -> dict[str, Any]:
        """Return ``metrics.json``."""
        return files.read_json(self.metrics_path)

    def why_damaged(self, part: str = "") -> str | None:
        """What of a finished run is not as it ended, as the end of a sentence; None: all is. ``final/`` is read once.

        Args:
            part: look at the files alone whose name begins so, such as ``final/``.
        """
        if not self.final_list_path.is_file():  # of version 0.1, whose files nobody has listed
            return self._why_broken()
        listed = files.read_sealed(self.final_list_path).get("files")
        if not isinstance(listed, dict):
            return f"{self.final_list_path.name}, the list of its files, is damaged"
        return why_differs(
            self.path, {name: of for name, of in listed.items() if name.startswith(part)}, contents=True
        )

    def _why_broken(self) -> str | None:
        if not (self.final_path / "config.json").is_file() and not (self.final_path / "adapter_config.json").is_file():
            return f"{self.final_path.name}/ is missing, or holds no model"
        try:
            self.read_metrics()
        except UserError as error:
            return str(error)
        return None

    def write_scores(self, models: Mapping[str, Any]) -> None:
        """Write ``scores.json``, so that a run that is killed does not spend an hour on the same scores again.

        Args:
            models: the entries of ``metrics.json`` that were made before training; their predictions and log lines are
                there already.
        """
        answers = [self.predictions_of(name) for name in models if self.has_predictions(name)]
        # The log of an attempt that goes on has steps of training already: one that begins again cannot keep them
        mark = {"log_bytes": None} if self.goes_on else self.log_mark()
        listed = flushed(self.path, answers)
        files.write_sealed(self.scores_path, {"format": 2, **mark, "models": models, "predictions": listed})

    def read_scores(self) -> dict[str, Any]:
        """Return ``scores.json``; empty where it is damaged, without the models whose predictions are lost.

        That recipe, rows and launch are the same is the caller's to check, for these scores as for the checkpoints.
        """
        scores = files.read_sealed(self.scores_path)
        models = {name: entry for name, entry in scores.get("models", {}).items() if self.has_predictions(name)}
        return {**scores, "models": models} if models else {}

    def why_predictions_differ(self, name: str) -> str | None:
        """Why ``predictions/{name}.jsonl`` is not what it was when ``scores.json`` was written, as the end of a sentence.

        Of a run of an older version only what can no longer be parsed is noticed.
        """
        path = self.predictions_of(name).relative_to(self.path).as_posix()
        listed = files.read_sealed(self.scores_path).get("predictions", {})
        if path in listed:
            return why_differs(self.path, {path: listed[path]}, contents=True)
        try:
            self.read_predictions(name)
        except UserError as error:
            return str(error)
        return None

    def log_size(self) -> int:
        """Bytes of ``log.jsonl``."""
        return self.log_path.stat().st_size if self.log_path.is_file() else 0

    def log_mark(self) -> dict[str, Any]:
        """Where ``log.jsonl`` stands and what is in it by now, for a checkpoint."""
        size = self.log_size()
        return {"log_bytes": size, "log_digest": files.digest(self.log_path, size) if size else None}

    def why_log_differs(self, mark: Mapping[str, Any]) -> str | None:
        """Why ``log.jsonl`` is not what it was at ``mark``, as the end of a sentence; None where its beginning is.

        Checkpoints of version 0.1 know its length alone.
        """
        was, size = mark.get("log_digest"), mark["log_bytes"]
        if self.log_size() < size:
            return f"{self.log_path.name} has {self.log_size():,} of the {size:,} bytes that it had then"
        if was is None or (found := files.digest(self.log_path, size)) == was:
            return None
        return (
            f"the first {size:,} bytes of {self.log_path.name} are damaged (their checksum is {found}, and was {was})"
        )

    def cut_log(self, size: int) -> None:
        """Shorten ``log.jsonl`` to ``size`` bytes: what comes after them is from an attempt of the run that did not last."""
        if self.log_size() > size:
            self._own_log()
            with files.naming(self.log_path), os.fdopen(open_nofollow(self.log_path, os.O_RDWR), "rb+") as file:
                file.truncate(size)

    def _own_log(self) -> None:
        """Put a copy in the place of a log that has a second name elsewhere (``cp -al``): only ours is written to."""
        with suppress(FileNotFoundError):
            if self.log_path.lstat().st_nlink > 1:
                files.write_bytes_atomic(self.log_path, self.log_path.read_bytes())

    def append_log(self, record: Mapping[str, Any]) -> None:
        """Add one line to ``log.jsonl``. A number that is not finite becomes null: JSON has no NaN.

        Args:
            record: ``{"kind": "train" | "eval" | "generation", "step": optimizer step, "epoch": float, ...}``.
        """
        self._own_log()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        with files.naming(self.log_path), os.fdopen(open_nofollow(self.log_path, flags), "ab+") as file:
            files.drop_half_line(file)
            file.write((json.dumps(files.jsonable(record), ensure_ascii=False) + "\n").encode())

    def read_log(self) -> list[dict[str, Any]]:
        """Return the records of ``log.jsonl``; a last line that a killed process left half-written is left out."""
        return list(files.read_jsonl(self.log_path, may_end_early=True, finite=False))

    def write_predictions(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``predictions/{name}.jsonl``.

        Args:
            name: ``teacher``, ``student_before`` or ``student``.
            rows: ``{id, set, seed, prompt, instruction, input, prediction, references, rougeL, tokens, finished}``.
        """
        make_folder(self.predictions_path)
        files.write_jsonl_atomic(self.predictions_of(name), rows)

    def read_predictions(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of ``predictions/{name}.jsonl``."""
        return list(files.read_jsonl(self.predictions_of(name)))

    def has_predictions(self, name: str) -> bool:
        """Whether ``predictions/{name}.jsonl`` is there."""
        return self.predictions_of(name).is_file()

    def predictions_of(self, name: str) -> Path:
        """Where the predictions of a model are."""
        return self.predictions_path / f"{name}.jsonl"

    def predictions_names(self) -> list[str]:
        """Models with predictions: teacher, student before, student, then any other."""
        names = {path.stem for path in self.predictions_path.glob("*.jsonl")}
        first = sorted(name for name in names if name.startswith(ONE_TEACHER))
        first += [name for name in PREDICTION_ORDER if name in names]
        return first + sorted(names - {*first})


def _nobodys(folder: Path) -> list[Path]:
    return [found for name in NOBODYS for found in matching(folder, name)]


def _made_by_a_run(recipe: Path) -> bool:
    return recipe.is_file() and recipe.read_text(encoding="utf-8", errors="replace").startswith(RECIPE_HEADER)
