"""Where the published sets come from: one table of addresses, revisions and licences."""

from __future__ import annotations

from typing import NamedTuple


class Upstream(NamedTuple):
    """What ``dts-hf prepare`` reads when ``--source`` says nothing else.

    Attributes:
        address: Hub name of the data set, or URL of the file.
        revision: the commit that is read; None: the newest, for no commit could be checked (the manifest records it).
        licence: of the rows, with what is known about parts.
        original: the file that the release was made from; ``--source`` reads it, too.
        blob: git's id of the content; None: not known.
    """

    address: str
    revision: str | None
    licence: str
    original: str
    blob: str | None = None

    @property
    def source(self) -> str:
        """As ``--source`` takes it."""
        on_hub = "://" not in self.address
        return f"{self.address}@{self.revision}" if on_hub and self.revision else self.address


_SELF_INSTRUCT = "0b26ccaa415992100fa32df62d41b994cf928e23"

UPSTREAM: dict[str, Upstream] = {
    "dolly": Upstream(
        "MiniLLM/dolly",
        "d131636138be0ff3fd0901c12c1739844d337279",
        "CC BY-SA 3.0 (Databricks, Inc.; contexts from Wikipedia)",
        "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",
    ),
    "self_instruct": Upstream(
        f"https://raw.githubusercontent.com/yizhongw/self-instruct/{_SELF_INSTRUCT}/human_eval/user_oriented_instructions.jsonl",
        _SELF_INSTRUCT,
        "Apache-2.0",
        f"https://github.com/yizhongw/self-instruct/tree/{_SELF_INSTRUCT}/human_eval",
        "ed6d5d986e3f4c65ff64d70328a2e1dab146f914",
    ),
    "s_ni": Upstream(
        "MiniLLM/sinst",
        None,
        "Apache-2.0 (the instances of a task keep the licence of its source)",
        "https://raw.githubusercontent.com/allenai/natural-instructions/b00871c954282e35d14de77c546918ee8b9d90da/",
        "91ce2bd1332fadea8efcf20300d4a1e3ada3ae21",  # 11_/valid.jsonl, as mirrors of the release carry it
    ),
    "unni": Upstream(
        "MiniLLM/uinst",
        "b3c77603ffaf9b9c15dc1f1a20dc2f2145580db0",
        "MIT (rows written by a language model)",
        "https://raw.githubusercontent.com/orhonovich/unnatural-instructions/22a41c945a8b0f88d8254def75d574c53f1221be/data/core_data.zip",
    ),
    "vicuna": Upstream(
        "MiniLLM/Vicuna",
        None,
        "Apache-2.0 (questions); references: answers of a language model, evaluation only",
        "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data/vicuna_bench/question.jsonl",
        "2fcc9c233a9a0987bc5200c4020092f5fa578e56",  # valid.jsonl, as mirrors of the release carry it
    ),
    "glue": Upstream(
        "nyu-mll/glue",
        "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
        "each task's own; see dts_hf.data_prep.glue",
        "https://dl.fbaipublicfiles.com/glue/data/",
    ),
}
