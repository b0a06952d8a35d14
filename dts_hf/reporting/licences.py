"""Licence and languages that a student inherits from its first weights and from its teacher, where their cards say so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from dts_hf.reporting.facts import PACKAGE_PREFIX, hub_id, short_name

#: Licences that ask more of a student than to be named, and what. The first pattern that fits.
RESTRICTIONS = (
    ("gemma*", "Google's Gemma terms count a model that learnt from Gemma's outputs as a derivative: the same terms and its "
     "list of prohibited uses go with it"),
    ("llama*", "Meta's Llama licence wants 'Llama' at the beginning of the name of a model that learnt from Llama, and "
     "'Built with Llama' beside it"),
    ("*-nc*", "it allows no commercial use"),
    ("*openrail*", "its list of prohibited uses goes with every model made from it"),
    ("bigscience-bloom-rail*", "its list of prohibited uses goes with every model made from it"),
    ("*research*", "it allows research alone"),
    ("apple-amlr", "it allows research alone"),
    ("other", "it is a licence of its own: read it before you publish"),
)  # fmt: skip


class Origin(NamedTuple):
    """What the card of one model says; None and empty where it says nothing, or could not be read."""

    model: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()

    @property
    def called(self) -> str | None:
        """The licence by the name that says most."""
        return self.license_name if self.license == "other" and self.license_name else self.license

    @property
    def restriction(self) -> str | None:
        """What the licence asks of a student, in words; None where it asks for little more than its name."""
        for name in filter(None, (self.license_name, self.license)):
            for pattern, words in RESTRICTIONS:
                if fnmatchcase(name.lower(), pattern):
                    return words
        return None


class Inherited(NamedTuple):
    """``origins``: of the first weights, then of the teacher."""

    origins: tuple[Origin, ...] = ()

    @property
    def known(self) -> list[Origin]:
        return [origin for origin in self.origins if origin.license]

    def metadata(self) -> dict[str, Any]:
        """``license``, ``license_name``, ``license_link`` and ``language`` for the head of the card, as far as known.

        Two licences that differ: the one that restricts, and where both do, ``other`` with both names.
        """
        values: dict[str, Any] = {}
        languages = list(dict.fromkeys(word for origin in self.origins for word in origin.language))
        if languages:
            values["language"] = languages
        named = {origin.called: origin for origin in self.known}
        binding = [origin for origin in named.values() if origin.restriction] or list(named.values())
        if len(binding) == 1 or (binding and not binding[0].restriction):
            origin = binding[0]
            values["license"] = origin.license
            if origin.license == "other":
                values |= {"license_name": origin.license_name, "license_link": origin.license_link}
        elif binding:
            names = [re.sub(r"[^a-z0-9.-]+", "-", str(origin.called).lower()) for origin in binding]
            values |= {"license": "other", "license_name": "-and-".join(names)}
        return {key: value for key, value in values.items() if value}

    @property
    def warnings(self) -> list[str]:
        """A line for each licence that restricts."""
        return [
            f"licence: {short_name(origin.model)} is under {origin.called}; {origin.restriction}"
            for origin in self.known
            if origin.restriction
        ]

    def sentences(self) -> list[str]:
        """For people who read the card."""
        said = [f"`{short_name(origin.model)}` is under the licence `{origin.called}`" for origin in self.known]
        if not said:
            return []
        return [
            f"Licence: {', '.join(dict.fromkeys(said))}. That of the data comes on top.",
            *(f"{warning[0].upper()}{warning[1:]}." for warning in self.warnings),
        ]


def inherited(models: Iterable[tuple[str, str | None]], *, online: bool = False) -> Inherited:
    """What the cards of ``models`` say of licence and language.

    A folder is asked for its README.md and a name on the Hub for the one in this machine's cache.

    Args:
        models: name or folder, and revision, of the first weights and of the teacher; one that is named twice counts once.
        online: ask the Hub and GGUF files, too. Where none answers the card is silent: no upload fails for that.
    """
    unique = dict.fromkeys((name, revision) for name, revision in models)
    return Inherited(tuple(_origin(name, revision, online) for name, revision in unique))


def _origin(model: str, revision: str | None, online: bool) -> Origin:
    values = _metadata(model, revision, online)
    language = values.get("language")
    words = language if isinstance(language, list) else [language]
    link = values.get("license_link")
    return Origin(
        model,
        _plain(values.get("license")),
        _plain(values.get("license_name")),
        # Any other is a path of the folder, or of a machine
        link if isinstance(link, str) and re.fullmatch(r"https?://[\w.:/?=&%+#~-]{1,300}", link) else None,
        # YAML reads Norwegian, "no", as a denial
        tuple(
            filter(None, ("no" if word is False else _plain(word) for word in words if isinstance(word, (str, bool))))
        ),
    )


def _plain(value: Any) -> str | None:
    """What a stranger's card says, as a name: it goes into a heading and a list of our own card, so no markup is left."""
    value = value[0] if isinstance(value, list) and value else value
    if value is None or isinstance(value, (list, dict, bool)):
        return None
    lines = str(value).strip().splitlines() or [""]
    return re.sub(r"[^\w .+:/-]", "", lines[0])[:100].strip() or None


def _metadata(model: str, revision: str | None, online: bool) -> Mapping[str, Any]:
    from huggingface_hub import HfApi, try_to_load_from_cache

    if (folder := Path(model)).is_dir():
        return card_metadata(folder / "README.md")
    if model.startswith(PACKAGE_PREFIX) or model.endswith(".gguf"):
        return _of_gguf(model) if online else {}  # seconds: the file's index of tokens is read, too
    name = hub_id(model)
    if name is None:
        return {}
    cached = try_to_load_from_cache(name, "README.md", revision=revision)
    if isinstance(cached, str) and (values := card_metadata(Path(cached))):
        return values
    if not online:
        return {}
    try:
        card = HfApi(library_name="dts-hf").model_info(name, revision=revision, timeout=10).card_data
    except Exception:
        return {}
    return {} if card is None else card.to_dict()


def _of_gguf(model: str) -> Mapping[str, Any]:
    """What a GGUF file says of itself; nothing where it cannot be read."""
    from dts_hf.errors import UserError
    from dts_hf.models.loading import ModelSource

    try:
        source = ModelSource.resolve(model, "model")
        from gguf import GGUFReader

        fields = GGUFReader(Path(source.location) / str(source.gguf_file)).fields
        names = {"license": "license", "license.name": "license_name", "license.link": "license_link"}
        names["languages"] = "language"
        return {name: fields[f"general.{key}"].contents() for key, name in names.items() if f"general.{key}" in fields}
    except (UserError, ImportError, OSError, ValueError, KeyError):
        return {}


def card_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a card; nothing where there is none, or no metadata that can be read."""
    from dts_hf.errors import UserError
    from dts_hf.recipe.yaml_files import parse_yaml

    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
        values = parse_yaml(found[1], str(path)) if found else {}
    except (OSError, UserError):
        return {}
    return values if isinstance(values, Mapping) else {}
