"""The protocol of an evaluation: everything a score depends on besides the model and the rows.

``minillm`` is the protocol of MiniLLM (Gu et al. 2023, arXiv 2306.08543) and of the papers that follow it, as their
released code runs it. It has a default that no paper names: ``no_repeat_ngram_size`` 6, which counts the prompt too.
About 30 % of Dolly's reference answers repeat or copy six tokens, so leaving the rule out changes the scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dts_hf.errors import UserError, nearest

ROUGE = "rougeL F-measure of rouge_score 0.1.2, Porter stemmer, best reference"
# In metrics.json beside the fingerprint, and not part of it
NOT_COMPARED = ("fingerprint", "name", "dtype", "batch_size")


@dataclass(frozen=True)
class Protocol:
    """How prompts are made, answered and scored. The defaults are those of ``minillm``.

    Args:
        name: of a variant in ``PROTOCOLS``; ``changed`` adds what differs from it.
        about: one line for ``dts-hf list protocols``.
        template: ``alpaca``, ``chat`` or ``plain``; ``auto`` until the tokenizer is known (``resolved``).
        max_prompt_length: in tokens; with ``max_new_tokens`` it makes the 512 of the literature.
        max_new_tokens: longest answer in tokens, for every prompt.
        do_sample: sample from the whole softmax (top_p 1, top_k 0); otherwise the most likely token each time.
        temperature: of sampling.
        no_repeat_ngram_size: no n-gram of prompt and answer twice; 0: no rule.
        seeds: one pass of sampling each. Greedy text is made once.
        backend: ``dts_hf`` (``generation/engine.py``) or ``vllm``. Their samples differ, so it is a part of the protocol.

    Padding is the end-of-sequence token where a tokenizer has no other; it is never attended to. What a tokenizer puts
    before a text by itself (LLaMA's ``<s>``) stands before the prompt, as in training; MiniLLM's code leaves it out. Of
    an answer, special tokens and what follows a spelt-out ``<|endoftext|>`` are dropped, ``<n>`` is a line break, and
    spaces around it do not count, as in MiniLLM's code (``shares.decode_answer``).
    """

    name: str = "minillm"
    about: str = dataclasses.field(
        default="the published protocol: 5 seeds, 256 tokens, no 6-gram twice", compare=False
    )
    template: str = "alpaca"
    max_prompt_length: int = 256
    max_new_tokens: int = 256
    do_sample: bool = True
    temperature: float = 1.0
    no_repeat_ngram_size: int = 6
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    backend: str = "dts_hf"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds: got {list(self.seeds)}, expected at least one whole number from 0, each once")
        if self.backend not in ("dts_hf", "vllm"):
            raise UserError(f"backend: got {self.backend!r}, expected 'dts_hf' or 'vllm'")

    @property
    def runs(self) -> tuple[int, ...]:
        """The seeds of the passes: all when sampling, the first one for greedy text."""
        return self.seeds if self.do_sample else self.seeds[:1]

    def changed(self, **values: Any) -> Protocol:
        """Return the protocol with those ``values`` that are not None; the name says what is different.

        ``PROTOCOLS["minillm"].changed(max_new_tokens=64).name == "minillm, max_new_tokens=64"``. Values that give back
        a known variant get that variant's name.
        """
        values = {key: value for key, value in values.items() if value is not None}
        if "seeds" in values:
            values["seeds"] = tuple(values["seeds"])
        new = dataclasses.replace(self, **values)
        before = self.values()
        differences = [f"{key}={_text(value)}" for key, value in new.values().items() if value != before[key]]
        return _named(new, ", ".join([self.name, *differences]))

    def resolved(self, template: str) -> Protocol:
        """The same protocol with the template that ``auto`` stands for: no change, so the name stays."""
        return _named(
            dataclasses.replace(self, template=template), self.name.replace("template=auto", f"template={template}")
        )

    # What is written here is hashed into the fingerprint: a value that is not used must not make two protocols of one
    def values(self) -> dict[str, Any]:
        """What the scores depend on. Temperature and seeds of greedy text are None and empty: nothing is drawn."""
        return {
            "template": self.template,
            "max_prompt_length": self.max_prompt_length,
            "max_new_tokens": self.max_new_tokens,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "do_sample": self.do_sample,
            "temperature": self.temperature if self.do_sample else None,
            "top_p": 1.0 if self.do_sample else None,
            "top_k": 0 if self.do_sample else None,
            "seeds": list(self.seeds) if self.do_sample else [],
            "backend": self.backend,
            "rouge": ROUGE,
        }


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(),
        Protocol("no_ngram", "minillm without the n-gram rule, as in its dev-time evaluation", no_repeat_ngram_size=0),
        Protocol("chat", "minillm in the tokenizer's chat template, for instruction-tuned models", template="chat"),
        Protocol("greedy", "minillm with the most likely token each time, one pass", do_sample=False),
        Protocol(
            "quick",
            "greedy, 64 tokens, no n-gram rule: a look during development, not a benchmark",
            max_new_tokens=64,
            do_sample=False,
            no_repeat_ngram_size=0,
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """Return the variant called ``name``.

    Raises:
        UserError: no variant has this name; the message lists them and names the nearest.
    """
    if name not in PROTOCOLS:
        raise UserError(
            f"protocol: got {name!r}, expected one of {', '.join(PROTOCOLS)}.{nearest(str(name), PROTOCOLS)}"
        )
    return PROTOCOLS[name]


def custom_protocol(**values: Any) -> Protocol:
    """A protocol by its values, called ``custom`` unless they are those of a known variant."""
    values["seeds"] = tuple(values.get("seeds", Protocol.seeds))
    return _named(Protocol(**values), "custom")


def check_comparable(protocols: Mapping[str, Mapping[str, Any]], *, ignore: tuple[str, ...] = ()) -> None:
    """Refuse to put scores of different protocols into one table.

    Args:
        protocols: the entry ``protocol`` of ``metrics.json`` of each run, by the run's name.
        ignore: fields that may differ, such as ``tokenizer`` for models of different families. Say so in the table.

    Raises:
        UserError: names the fields that differ with the values of both runs, or a run without a protocol.
    """
    absent = [name for name, protocol in protocols.items() if not protocol]
    if absent:
        raise UserError(f"{absent[0]}: its scores carry no protocol, so they cannot be compared with others")
    (first, reference), *others = protocols.items() or [("", {})]
    for name, protocol in others:
        if protocol.get("fingerprint") == reference.get("fingerprint"):
            continue
        fields = [key for key in {**reference, **protocol} if key not in (*NOT_COMPARED, *ignore)]
        different = [
            f"{key} ({_text(reference.get(key))} and {_text(protocol.get(key))})"
            for key in fields
            if reference.get(key) != protocol.get(key)
        ]
        if different:
            raise UserError(
                f"{first} and {name} were evaluated under different protocols, so their scores cannot stand in one "
                f"table: {', '.join(different)}. Evaluate one of them again: dts-hf evaluate ... --protocol NAME"
            )


def check_same_rows(sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to compare scores on different rows.

    Args:
        sets: the entry of one evaluation set in ``metrics.json`` of each run, by the run's name.

    Raises:
        UserError: the rows differ, or some runs left rows out.
    """
    (first, reference), *others = sets.items() or [("", {})]
    for name, entry in others:
        for key, what in (("rows_sha256", "other rows"), ("n", "another number of answered rows")):
            if entry.get(key) != reference.get(key):
                raise UserError(
                    f"{first} and {name} were scored on {what} ({_text(reference.get(key))} and "
                    f"{_text(entry.get(key))}), so their scores cannot stand in one table"
                )


def _named(protocol: Protocol, otherwise: str) -> Protocol:
    known = next((known for known in PROTOCOLS.values() if known.values() == protocol.values()), None)
    name, about = (known.name, known.about) if known is not None else (otherwise, "")
    return dataclasses.replace(protocol, name=name, about=about)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
