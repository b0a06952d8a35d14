"""Runs sorted into kinds: the same recipe but for the seed, and the same rows and models wherever they lie."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dts_hf.console import say
from dts_hf.errors import UserError, nearest
from dts_hf.experiments.identity import contents, is_replayed, is_under
from dts_hf.experiments.runs import OF_ROWS, Run, names_of_kinds, read_run
from dts_hf.files import json_digest
from dts_hf.runs.lock import LOCK

ONE_KIND = "compare: all runs have the same recipe but for seeds; expected at least two kinds of runs"


@dataclass(frozen=True)
class Kind:
    """Runs that differ in their seed alone.

    Attributes:
        name: what tells them from the others.
        runs: that have scores, by seed.
        failed: those that have none, with why.
        absent: those that have others than a table is of, by why: another protocol, not this measure of this set, or not
            all of its rows.
    """

    name: str
    runs: Mapping[int, Run]
    failed: Sequence[Run]
    absent: Sequence[tuple[Run, str]] = ()

    def those(self, why_not: Callable[[Run], str]) -> Kind:
        """The same with the runs of which ``why_not`` says nothing; the others are absent, with what it says."""
        said = {seed: why_not(run) for seed, run in self.runs.items()}
        kept = {seed: run for seed, run in self.runs.items() if not said[seed]}
        absent = [(run, said[seed]) for seed, run in self.runs.items() if said[seed]]
        return Kind(self.name, kept, self.failed, [*self.absent, *absent])

    @property
    def first(self) -> Run | None:
        """The scored run with the lowest seed."""
        return self.runs[min(self.runs)] if self.runs else None


def read_kinds(paths: Iterable[Path]) -> list[Kind]:
    """The kinds that the run directories ``paths`` are of, in their order.

    Folders of runs that are still loading, or were killed at it, are of no kind yet: a line says that they are left out.

    Raises:
        UserError: a folder is no run or its files are damaged, or twice the same seed of one kind.
    """
    runs = [read_run(path) for path in dict.fromkeys(paths) if not _is_loading(path)]
    known = {os.path.realpath(run.path): run for run in runs}
    replays = {run.path: _replays(run, known) for run in runs}
    meant = [
        {**one, **{key: digest for key, (_, digest) in replays[run.path].items()}}
        for run, one in zip(runs, _with_contents(runs), strict=True)
    ]
    groups: list[tuple[Mapping[str, Any], list[Run]]] = []
    for run, settings in zip(runs, meant, strict=True):
        members = next((members for known, members in groups if known == settings), None)
        if members is None:
            groups.append((settings, members := []))
        members.append(run)
    # Places that all runs mean alike tell no kinds apart; of others the place says more than a digest
    telling = {
        key for key in {key for one in meant for key in one} if any(one.get(key) != meant[0].get(key) for one in meant)
    }
    said = [
        {**members[0].settings, **{key: name for key, (name, _) in replays[members[0].path].items()}}
        for _, members in groups
    ]
    shown = [
        {key: value for key, value in one.items() if any(is_under(key, (told,)) for told in telling)} for one in said
    ]
    names = names_of_kinds([*shown])
    return [_kind(name, members) for name, (_, members) in zip(names, groups, strict=True)]


def _is_loading(path: Path) -> bool:
    """Whether a folder has nothing but a lock: its run has no recipe before rows and models are loaded and checked."""
    found = path.is_dir() and [place.name for place in path.iterdir()] == [LOCK]
    if found:
        say(f"compare: {path} is left out: its run is still loading, or was killed before it began")
    return found


def _kind(name: str, members: Sequence[Run]) -> Kind:
    by_seed: dict[int, Run] = {}
    for run in members:
        if run.failed:
            continue
        if run.seed in by_seed:
            raise UserError(
                f"{run.path}: has the recipe and the seed ({run.seed}) of {by_seed[run.seed].path}; expected each seed "
                "once, or the same run would count twice"
            )
        by_seed[run.seed] = run
    return Kind(name, by_seed, [run for run in members if run.failed])


def _replays(run: Run, known: Mapping[str, Run], above: tuple[str, ...] = ()) -> dict[str, tuple[str, str]]:
    """Of each run that the temperature of ``run`` replays, by key: what to call it, and a digest of what it is.

    Whether it has the same seed counts, and which one does not: its folder, or the bits of its log, would make every seed a
    kind of its own. One that is gone has none.
    """
    found = {}
    for key, place in run.settings.items():
        where = os.path.realpath(place) if isinstance(place, str) and is_replayed(key) else ""
        if not where or where in above:
            continue
        with suppress(UserError):
            other = known.get(where) or read_run(Path(where))
            whose = "the same seed" if other.seed == run.seed else "another seed"
            settings = {key: value for key, value in other.settings.items() if not is_under(key, tuple(other.rows))}
            inside = {key: digest for key, (_, digest) in _replays(other, known, (*above, where)).items()}
            name = f"{other.settings['temperature.name']} of {whose}"
            found[key] = name, json_digest([whose, {**settings, **other.rows, **inside}])
    return found


def _with_contents(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings of each run, with what its files hold in the place of where they lie.

    Only of places that differ: the weights of a model are not read to learn that a path is the same path. What a run has
    recorded of its rows counts more than the files of today.
    """

    def differs(key: str) -> bool:
        under = [{name: value for name, value in run.settings.items() if is_under(name, (key,))} for run in runs]
        return any(one != under[0] for one in under)

    recorded = [key for key in (runs[0].rows if runs else ()) if all(key in run.rows for run in runs)]
    meant = []
    for run in runs:
        found = {key: run.rows[key] for key in recorded}
        for of_rows in (True, False):
            # Rows that have gone since are no fault of the run: it stays what its recipe says
            with suppress(UserError):
                found |= contents(
                    run.recipe,
                    lambda key: key not in recorded and (key in OF_ROWS) is of_rows and differs(key),  # noqa: B023
                )
        meant.append({**{k: v for k, v in run.settings.items() if not is_under(k, tuple(found))}, **found})
    return meant


def baseline_of(kinds: Sequence[Kind], wanted: str | None) -> Kind:
    """The kind that ``wanted`` names: by a run directory, or words of its name; None: the first one.

    A whole name counts more than settings in one, and these more than parts of words: ``value=1`` is not ``value=16``.

    Raises:
        UserError: it names none, or several.
    """
    if wanted is None:
        return kinds[0]
    place = os.path.realpath(wanted.replace("\0", ""))
    for kind in kinds:
        paths = [os.path.realpath(run.path) for run in (*kind.runs.values(), *kind.failed)]
        if kind.name == wanted or place in paths:
            return kind
    part = re.escape(wanted)
    number = rf"{part}(\.0+)?"  # what a recipe has as 1 stands as 1.0 in the name
    for way in (number, rf"(.*(?<!\w))?{number}(?![\w.]).*", rf".*{part}.*"):
        if found := [kind for kind in kinds if re.fullmatch(way, kind.name, re.DOTALL)]:
            break
    if len(found) != 1:
        names = [kind.name for kind in found or kinds]
        which = "fits several kinds" if found else "is no kind of these runs"
        near = "" if found else nearest(wanted, names)
        raise UserError(f"baseline: {wanted!r} {which}, expected one of {'; '.join(names)}, or a run directory.{near}")
    return found[0]
