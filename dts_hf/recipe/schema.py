"""The recipe: one YAML file that describes one distillation, checked as a whole before anything heavy is loaded.

Every section is a model below, so a new option is one line there: its type, its range and its description are read by
the error messages (``problems``) and by the JSON schema. ``training:`` is handed to
``transformers.TrainingArguments``, which stays the authority on its keys. Files are read in ``yaml_files``.
Importing this module imports no torch; checking a recipe does.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dts_hf.console import SECRET_VARIABLE, SECRET_VARIABLE_EXPECTED, unusable_texts
from dts_hf.data.columns import FIELDS, unknown_fields
from dts_hf.data.routes import Routing, names_problem, weights_problem
from dts_hf.errors import UserError, nearest
from dts_hf.on_policy.settings import Backend, GapOn, Replay, Schedule, schedule_problem, server_problem
from dts_hf.recipe.deep_problems import deep_problems
from dts_hf.recipe.problems import protocol_values, schema_problems
from dts_hf.recipe.training_keys import LARGEST, whole_training_values
from dts_hf.recipe.yaml_files import NUMBER, dump_values, expand, shown, with_line


def whole(value: Any) -> Any:
    """2.0 and 1e3 as whole numbers, which they are to a JSON schema and to people; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The range stands first, or it would not be in the JSON schema
Count = Annotated[int, Field(ge=1, le=LARGEST), BeforeValidator(whole)]
CountFromZero = Annotated[int, Field(ge=0, le=LARGEST), BeforeValidator(whole)]
EMA_RATE = 0.05  # of TRL's SDFT and SDPO
MOST_TOKENS = 1_000_000  # of a batch; packing takes time and memory by the budget, and no device holds more
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "8bit", "4bit", "fp8", "int8"]
#: ``teacher.model`` of kind ``self``: it is no name, and nobody gives it.
ITSELF = "student"
#: The package that quantises a teacher's weights in each way.
QUANTIZED_BY = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "fp8": "torchao", "int8": "torchao"}


class Section(BaseModel):
    """Strict, frozen: an unknown key is an error, and a string is never turned into a number."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",  # training.max_grad_norm: .inf would become null in the run directory
    )


class NamedOptions(Section):
    """A choice by name and its own options: ``jsd``, or ``{name: jsd, beta: 0.5}``."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(description="Name of the choice; its options stand beside it.")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """Everything beside the name."""
        return dict(self.model_extra or {})


MOST_WEIGHTS = 10**15  # of a model
WEIGHTS = r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([kKMBG])"


def _number_of_weights(value: Any) -> Any:
    """``60M`` as a number; anything else as it is."""
    found = re.fullmatch(WEIGHTS, value) if isinstance(value, str) else None
    if found is None:
        return whole(value)
    return round(float(found[1]) * {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}[found[2]])


class Init(Section):
    """A student that is cut out of the teacher or another model, or made new in the shape of one that is."""

    from_: str = Field(
        alias="from",
        min_length=1,
        description="Where the weights come from: 'teacher'; Hub name or folder of another model; 'config': random weights, "
        "in the shape of the teacher.",
    )
    layers: Count | Annotated[list[CountFromZero], Field(min_length=1)] | None = Field(
        default=None,
        description="How many of the layers to keep, or their indices (the first is 0). Null: all, or what 'parameters' "
        "leaves.",
    )
    choose: Literal["even", "block_influence", "middle_block", "search"] = Field(
        default="even",
        description="Which layers, where 'layers' is a number: evenly spaced; those that change their states most; all but "
        "one contiguous block; or the best of all that a search finds. All but 'even' are measured on training rows.",
    )
    mlp: Count | None = Field(
        default=None, description="Channels that each MLP keeps: those that say most. Null: all."
    )
    hidden: Count | None = Field(
        default=None,
        description="Channels of the states that are kept: those that say most (LLaMA, Mistral, Qwen2, Qwen3). Null: all.",
    )
    parameters: Annotated[int, Field(ge=1, le=MOST_WEIGHTS), BeforeValidator(_number_of_weights)] | None = Field(
        default=None,
        description="At most so many weights, such as 60M: decides what of 'layers' and 'mlp' is not given. With choose: "
        "search both are searched for, else the number of layers alone.",
        json_schema_extra={
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MOST_WEIGHTS},
                {"type": "string", "pattern": f"^{WEIGHTS}$"},
                {"type": "null"},
            ]
        },
    )
    calibration_rows: Count = Field(
        default=24, description="Training rows on which layers and channels are weighed up; fewer where they are long."
    )

    @property
    def source(self) -> str | None:
        """Hub name or folder of the model that the student is cut out of; None: it is the teacher's."""
        return None if self.from_ in ("teacher", "config") else self.from_

    @property
    def measures(self) -> bool:
        """Whether rows decide what is kept."""
        wide = self.mlp or self.hidden or (self.parameters and isinstance(self.layers, (int, list)))
        return self.from_ != "config" and bool(self.choose != "even" or wide)

    @model_validator(mode="after")
    def _one_size(self) -> Init:
        named = self.source is not None and ("/" in self.from_ or Path(self.from_).is_dir())
        if self.source is not None and not named and (meant := nearest(self.from_, ("teacher", "config"))):
            raise ValueError(
                f"from: got '{self.from_}', expected teacher, config, a folder (./NAME) or a Hub name.{meant}"
            )
        sizes = (self.layers, self.mlp, self.hidden, self.parameters)
        if self.from_ != "config" and all(size is None for size in sizes):
            raise ValueError(
                "give at least one of layers, mlp, hidden and parameters, or the student is the model itself"
            )
        if self.parameters is not None and self.layers is not None and self.mlp is not None:
            raise ValueError("got layers, mlp and parameters, which leaves nothing to decide: leave one of them out")
        if self.choose != "even":
            if isinstance(self.layers, list):
                raise ValueError(f"choose is '{self.choose}', but layers is a list: expected how many to choose")
            if self.layers is None and self.parameters is None:
                raise ValueError(f"choose is '{self.choose}', but neither layers nor parameters says how many")
            if self.from_ == "config":
                raise ValueError(
                    f"choose is '{self.choose}', but random weights tell no layer from another: leave it out"
                )
        return self


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685)."""

    r: Count = Field(default=16, description="Rank of the adapters.")
    alpha: Count = Field(default=32, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input, a probability.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="Names of the layers that get an adapter."
    )
    save: Literal["merged", "adapter"] = Field(
        default="merged", description="Save the full model, or the adapter alone."
    )


class Quantize(Section):
    """A student that is trained for its quantised form (torchao's quantisation-aware training)."""

    scheme: Literal["int4_weight_only", "int8_weight_only", "int8_dynamic_activation_int4_weight"] = Field(
        description="What is rounded, in torchao's words: the weights alone, to 4 or 8 bits, or the weights to 4 bits and "
        "the inputs of each layer to 8, by token. Symmetric; output layer and embeddings stay as they are."
    )
    group_size: Annotated[int, Field(ge=2, le=LARGEST), BeforeValidator(whole)] | None = Field(
        default=32, description="Weights of a row that share a scale; null: one scale for each row."
    )


class Student(Section):
    """The model that learns."""

    model: str | None = Field(default=None, description="Hub name or folder. Give either model or init.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    init: Init | None = Field(
        default=None, description="Cut the student out of the teacher, or make it new. Give either model or init."
    )
    dtype: Dtype = Field(default="float32", description="Type of the student's weights.")
    lora: Lora | None = Field(default=None, description="Train low-rank adapters instead of all weights.")
    quantize: Quantize | None = Field(
        default=None, description="Train for a quantised form, which dts-hf export makes. See docs/quantized.md."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")

    @property
    def is_cut(self) -> bool:
        """Whether it is made of layers of another model, with their weights."""
        return self.init is not None and self.init.from_ != "config"

    @model_validator(mode="after")
    def _one_origin(self) -> Student:
        if (self.model is None) == (self.init is None):
            found = "neither" if self.model is None else "both"
            raise ValueError(f"give exactly one of 'model' and 'init', got {found} (null removes a key)")
        if self.init is not None and self.lora is not None and self.lora.save == "adapter":
            raise ValueError("lora.save is 'adapter', but a student made by 'init' has no base to load: use 'merged'")
        if self.quantize is not None and self.lora is not None:
            raise ValueError(
                "got quantize and lora, but the adapters' update would be added beside the rounded weights, and the merged "
                "and quantised student would be another one: train with lora first, then the merged student with quantize"
            )
        return self


def _or_null(schema: dict[str, Any]) -> None:
    """Let an editor take null for a key that a validator fills in."""
    schema["anyOf"] = [{key: schema.pop(key) for key in ("type", "enum") if key in schema}, {"type": "null"}]


class Teacher(Section):
    """The model that is imitated."""

    model: str = Field(
        description="Hub name, folder, a .gguf file, or package:NAME/FILE.gguf (a file of an installed package). Not with "
        "kind: self.",
        json_schema_extra=_or_null,  # with kind: self, in the place of a model that a base names
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    tokenizer: str | None = Field(
        default=None, description="Hub name or folder of the tokenizer; null: the model's own."
    )
    dtype: Dtype = Field(
        default="bfloat16",
        description="Type of the teacher's weights; with kind: self null is the student's.",
        json_schema_extra=_or_null,
    )
    quantization: Quantization = Field(
        default="none",
        description="8bit and 4bit: through bitsandbytes. fp8 (GPUs from Ada and Hopper on) and int8: through torchao.",
    )
    placement: Literal["replicated", "sharded"] = Field(
        default="replicated",
        description="The whole teacher on every process, or sharded over all of them (several processes only).",
    )
    vocab_alignment: Literal["strict", "truncate_to_tokenizer", "intersect"] = Field(
        default="strict", description="What to do when teacher and student have logits of different widths."
    )
    alignment: Literal["overlap", "dual_space"] | None = Field(
        default=None,
        description="For a teacher with another tokenizer, which reads rows in its own template. overlap: compared on the "
        "bytes and tokens that both share. dual_space: on the bytes that both share, over whole vocabularies, through "
        "learned maps between their states. null: teacher and student have one tokenizer.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    kind: Literal["live", "cached", "remote", "self"] = Field(
        default="live",
        description="live: it runs on every batch. cached: its states come out of the folder cache, which dts-hf "
        "cache-teacher has written, and its backbone is not in memory. remote: dts-hf serve-teacher answers for it at url. "
        "self: the student itself, with the weights that 'weights' names; then there is no model.",
    )
    weights: Literal["base", "ema"] = Field(
        default="base",
        description="Of kind self. base: those that the student began with. ema: a running mean of those that it has had.",
    )
    ema_rate: float = Field(
        default=EMA_RATE,
        gt=0,
        le=1,
        description="Weight of the NEW weights in the running mean, not of what is kept: mean + ema_rate * (new - mean).",
    )
    ema_every: Count = Field(default=1, description="The running mean moves after every so many optimizer steps.")
    url: str | None = Field(
        default=None, min_length=1, description="Address of dts-hf serve-teacher; only with kind: remote."
    )
    token_env: str | None = Field(
        default=None,
        description="Name of the environment variable with the server's token, such as TEACHER_TOKEN; never the token.",
    )
    cache: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of its cached states, with kind: cached. With kind: remote answers are kept there as training "
        "goes, and no row is asked twice.",
    )
    missing: Literal["error", "live"] = Field(
        default="error",
        description="Rows that the cache has not: an error, or the teacher is loaded as well and answers them.",
    )

    @property
    def is_kept(self) -> bool:
        """Whether its model stays in memory for training."""
        return self.kind == "live" or self.missing == "live"

    @property
    def source(self) -> str:
        """Where its states come from, where they are not computed here."""
        if self.kind == "self":
            return f"from {self.itself}"
        if self.kind == "remote":
            return f"from {self.url}" + (f" and are kept in {self.cache}" if self.cache else "")
        return f"out of {self.cache}"

    @property
    def itself(self) -> str:
        """Of kind ``self`` whose weights they are, in words."""
        if self.weights == "base":
            return "the student itself, with its first weights"
        steps = "step" if self.ema_every == 1 else f"{self.ema_every:,} steps"
        return f"the student itself, with a running mean of its weights (rate {self.ema_rate:g} every {steps})"

    @model_validator(mode="before")
    @classmethod
    def _no_model_of_its_own(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("kind") != "self":
            return value
        if (given := value.get("model")) not in (None, ITSELF):
            raise ValueError(
                f"model: got {shown(given)} beside kind 'self', whose teacher is the student itself: leave it out, or use "
                "kind: live, also for an earlier checkpoint"
            )
        return {**value, "model": ITSELF}

    @model_validator(mode="after")
    def _only_of_itself(self) -> Teacher:
        fields = Teacher.model_fields
        of_self = ("weights", "ema_rate", "ema_every")
        of_others = ("revision", "tokenizer", "quantization", "placement", "trust_remote_code")
        for name in of_others if self.kind == "self" else of_self:
            if getattr(self, name) != fields[name].default:
                kind = f"got {getattr(self, name)!r} with kind '{self.kind}'"
                why = "the teacher is the student's own model" if self.kind == "self" else "it belongs to kind 'self'"
                raise ValueError(f"{name}: {kind}, but {why}: leave it out")
        if self.kind == "self" and self.weights == "base" and (self.ema_rate, self.ema_every) != (EMA_RATE, 1):
            raise ValueError("ema_rate, ema_every: belong to weights 'ema', got weights 'base'")
        return self

    @model_validator(mode="after")
    def _cache_of_states(self) -> Teacher:
        if self.kind == "cached" and self.cache is None:
            raise ValueError("kind is 'cached', expected the folder of the cache as well: cache: DIR")
        if self.kind in ("live", "self") and self.cache is not None:
            raise ValueError(f"cache: belongs to kind 'cached' or 'remote', got kind '{self.kind}'")
        if self.kind != "cached" and self.missing != "error":
            raise ValueError(f"missing: belongs to kind 'cached', got kind '{self.kind}'")
        if self.kind != "live" and self.placement == "sharded":
            raise ValueError(
                f"placement is 'sharded', but the states of kind '{self.kind}' need no backbone: use 'replicated'"
            )
        return self

    @model_validator(mode="after")
    def _alignment_of_models(self) -> Teacher:
        if self.alignment is None:
            return self
        if self.kind == "self":
            raise ValueError(
                f"alignment is '{self.alignment}' and kind 'self', but a student that teaches itself has its own tokenizer: "
                "leave it out"
            )
        if self.vocab_alignment != "strict":
            raise ValueError(
                f"alignment is '{self.alignment}', which finds the common tokens itself, and vocab_alignment "
                f"'{self.vocab_alignment}': leave the latter out"
            )
        return self

    @model_validator(mode="after")
    def _address_of_a_server(self) -> Teacher:
        if self.kind == "remote" and self.url is None:
            raise ValueError("kind is 'remote', expected the address of the server as well: url: http://HOST:8765")
        if self.kind != "remote" and (self.url is not None or self.token_env is not None):
            given = "url" if self.url is not None else "token_env"
            raise ValueError(f"{given}: belongs to kind 'remote', got kind '{self.kind}'")
        # Nothing of the value is shown: it may be the token itself
        if self.token_env is not None and not re.fullmatch(SECRET_VARIABLE, self.token_env):
            raise ValueError(
                f"token_env: {SECRET_VARIABLE_EXPECTED}, such as TEACHER_TOKEN; the token itself never stands in a recipe"
            )
        return self

    @model_validator(mode="after")
    def _placement_of_packed_weights(self) -> Teacher:
        if self.placement == "sharded" and self.quantization != "none":
            raise ValueError(
                f"placement is 'sharded' and quantization '{self.quantization}', but the packed weights of "
                f"{QUANTIZED_BY[self.quantization]} cannot be split: use placement 'replicated', or quantization 'none'"
            )
        if self.quantization == "fp8" and self.dtype != "bfloat16":
            raise ValueError(
                f"quantization is 'fp8' and dtype '{self.dtype}', expected dtype 'bfloat16': fp8 matmuls give it"
            )
        return self


class OneOfSeveral(Teacher):
    """One of several models that are imitated."""

    weight: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Of its loss, where every teacher has every row (no data.teacher_column); all weights add up to 1.",
    )

    @property
    def alone(self) -> Teacher:
        """The same without its weight: two names with equal sections are one model in memory."""
        return Teacher.model_validate(self.model_dump(exclude={"weight"}))


class Packing(Section):
    """Training batches that are filled to a number of tokens, so that steps cost the same."""

    tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), BeforeValidator(whole)] = Field(
        description="Fill each device's training batch to so many tokens, by best fit, whatever "
        "training.per_device_train_batch_size; no row may be longer.",
    )


class Adaptive(Section):
    """A share of the student's steps that follows the held-out loss, and steps that replay its text (DistiLLM)."""

    eps: float = Field(
        default=0.1,
        ge=0,
        description="The share grows when the held-out loss is so many nats above that of its last growth.",
    )
    step: float = Field(default=0.1, gt=0, le=1, description="By how much it grows, to 1 at most.")
    capacity: Count = Field(default=1000, description="Rows that all processes together keep for replay.")
    replay: Replay = Field(
        default="states",
        description="Keep rows with the teacher's states of their labels; rows alone, of which the teacher is asked again; "
        "or none, and every step of the share generates.",
    )


class OnPolicy(Section):
    """Steps in which the student answers the prompts itself, and learns what the teacher says of its text (GKD)."""

    fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the optimizer steps whose rows the student answers; null: 0.5, with adaptive 0 at first.",
    )
    schedule: Schedule = Field(
        default="constant", description="How the share moves over the run: not at all, or to end_fraction."
    )
    end_fraction: float | None = Field(
        default=None, ge=0, le=1, description="The share at the end of the run; with schedule linear or cosine."
    )
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Of sampling; not that of the loss."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw from the likeliest tokens that have this probability together."
    )
    max_new_tokens: Count = Field(default=128, description="Longest answer, in tokens; no other limit cuts it.")
    batch_size: Count = Field(
        default=32, description="Prompts that one device answers at once; in float32 it does not change the answers."
    )
    seed: CountFromZero | None = Field(default=None, description="Of coin and text; null: training.seed.")
    gap_on: GapOn = Field(
        default="data",
        description="The gap that a temperature follows: of rows of the data alone, or also of the student's own text, with "
        "the teacher's first choices as labels. See docs/gap.md.",
    )
    adaptive: Adaptive | None = Field(
        default=None,
        description="The share follows the held-out loss, and text is replayed (DistiLLM); in the place of a schedule.",
    )
    backend: Backend = Field(
        default="own",
        description="What generates: our engine; or vLLM, beside the student or at vllm_url, whose noise is its own, so "
        "that a resumed run does not repeat it (not run by our tests).",
    )
    vllm_memory: float = Field(
        default=0.3, gt=0, lt=1, description="Share of the device's memory that vLLM takes beside the student."
    )
    vllm_url: str | None = Field(
        default=None, min_length=1, description="Address of vllm serve; null: vLLM answers beside the student."
    )
    vllm_folder: str | None = Field(
        default=None,
        min_length=1,
        description="Folder that the server at vllm_url sees under the same name: the student's weights go through it.",
    )
    vllm_token_env: str | None = Field(
        default=None,
        description="Name of the environment variable with the server's token, such as VLLM_API_KEY; never the token.",
    )

    @model_validator(mode="after")
    def _schedule_has_an_end(self) -> OnPolicy:
        if problem := schedule_problem(self.schedule, self.end_fraction, self.adaptive is not None):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _server_has_a_folder(self) -> OnPolicy:
        if problem := server_problem(self.backend, self.vllm_url, self.vllm_folder, self.vllm_token_env):
            raise ValueError(problem)
        return self


def _known_fields(value: dict[str, str | None]) -> dict[str, str | None]:
    if problem := unknown_fields(value):
        raise ValueError(problem)
    return value


#: ``{our name: their column}``; the editor offers our names.
ColumnMap = Annotated[
    dict[str, str | None],
    Field(json_schema_extra={"propertyNames": {"enum": list(FIELDS)}}),
    AfterValidator(_known_fields),
]


class Source(Section):
    """Rows of one place, and how much they count."""

    source: str = Field(
        min_length=1,
        description="JSON lines, JSON, Parquet, CSV, TSV or Arrow (file, folder or pattern), or the name of a Hub data set: "
        "owner/name or owner/name:configuration.",
    )
    split: str | None = Field(
        default=None,
        description="Split of a Hub data set or a folder; null: data.train_split or data.validation_split.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="How often each row counts in an epoch: 2 is twice, 0.5 is one half of the rows, always the same half.",
    )
    columns: ColumnMap | None = Field(
        default=None, description="As data.columns, for this source alone; null: data.columns."
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


HeldOutShare = Annotated[float, Field(gt=0, lt=1)]


class Data(Section):
    """The rows, and how they become tokens."""

    train: str | Annotated[list[str | Source], Field(min_length=1)] | Source = Field(
        description="JSON lines, JSON, Parquet, CSV, TSV or Arrow (file, folder or pattern), or the name of a Hub data set "
        "(owner/name:configuration); or several, each alone or as a mapping with its split, weight and columns."
    )
    validation: str | Annotated[list[str | Source], Field(min_length=1)] | Source | HeldOutShare | None = Field(
        default=None,
        description="Held-out rows, in the same forms, without weights; or the share of the training rows that is held out "
        "(0.05: always the same rows, none with the prompt of another); null: no evaluation.",
    )
    train_split: str = Field(default="train", description="Split of a Hub data set that is trained on.")
    validation_split: str = Field(default="validation", description="Split of a Hub data set that is held out.")
    columns: ColumnMap = Field(
        default={},
        description="Our names of columns, and yours: {prompt: question_text, completion: gold}. A dot leads inside "
        "(answers.text.0); null leaves a column of ours out. See docs/data.md.",
    )
    teacher_column: str | None = Field(
        default=None,
        min_length=1,
        description="Column that names the teacher of each row, where there are several (teachers).",
    )
    default_teacher: str | None = Field(
        default=None, description="Teacher of rows that name none in teacher_column; null: such a row is an error."
    )
    teacher_prefix_column: str | None = Field(
        default=None,
        min_length=1,
        description="Column of a text that the teacher alone reads, before the row's last question: a demonstration, or the "
        "verified solution. Both answer with the same tokens. Kinds live and self. See docs/self_distillation.md.",
    )
    prompt_template: Literal["auto", "alpaca", "chat", "plain"] = Field(
        default="auto",
        description="How a row becomes a prompt; auto: the tokenizer's chat template where it has one, else alpaca.",
    )
    train_on: Literal["last_turn", "all_turns", "completion"] | None = Field(
        default=None,
        description="What the assistant says that is learned: last_turn, its last message; all_turns, every message; "
        "completion, those of the completion of a prompt/completion row, the last of other rows. null: completion for "
        "prompt/completion rows, else all_turns; with responses: teacher last_turn.",
    )
    max_length: Count = Field(default=512, description="Prompt and response together, in tokens.")
    max_prompt_length: Count = Field(
        default=256, description="Prompt alone, in tokens; its input field is shortened to fit."
    )
    long_rows: Literal["drop", "cut"] = Field(default="drop", description="Rows above max_length: leave out, or cut.")
    packing: bool | Packing = Field(
        default=False,
        description="Lay rows end to end without padding; they do not see each other. A mapping with tokens also fills each "
        "training batch to so many.",
    )
    responses: Literal["data", "teacher"] = Field(
        default="data",
        description="Train on the answers in the data, or on the teacher's own (generated once and cached).",
    )
    teacher_max_new_tokens: Count = Field(default=128, description="Longest teacher answer, in tokens.")
    cut_answers: Literal["keep", "drop"] = Field(
        default="keep",
        description="Teacher answers that ran into teacher_max_new_tokens: learned as far as they go, without an end of "
        "turn, or left out.",
    )
    max_repetition: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Teacher answers of which a larger share of 4-grams was said before are left out; 1: none.",
    )
    on_policy: OnPolicy | None = Field(
        default=None,
        description="Mixed data: in a share of the steps the student answers the prompts itself; null: the data alone. See "
        "docs/on_policy.md.",
    )
    max_train_rows: Count | None = Field(default=None, description="Use the first so many rows; null: all.")
    train_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Train on this share of them, drawn by training.seed: a seed is then more than an order of rows.",
    )
    max_validation_rows: Count | None = Field(default=None, description="Use the first so many rows; null: all.")
    cache_dir: str | None = Field(
        default=None, description="Folder for rows, their tokens and the teacher's answers; null: the default cache."
    )

    @property
    def all_columns(self) -> dict[str, str | None]:
        """``columns``, with that of the teacher where there are several, and that of what a teacher alone reads."""
        more = {"teacher": self.teacher_column, "teacher_prefix": self.teacher_prefix_column}
        return {**self.columns, **{field: column for field, column in more.items() if column is not None}}

    @property
    def sources(self) -> list[Source]:
        """Those of the training and validation rows that are given as mappings."""
        listed = [*_listed(self.train), *_listed(self.validation)]
        return [source for source in listed if isinstance(source, Source)]

    @property
    def pack_tokens(self) -> int | None:
        """To how many tokens each training batch is filled; None: it is a number of rows."""
        return None if isinstance(self.packing, bool) else self.packing.tokens

    @field_validator("validation")
    @classmethod
    def _share_is_a_number(cls, value: Any) -> Any:
        # "10%" would be looked for as a file, and then on the Hub
        if isinstance(value, str) and (found := re.fullmatch(rf"({NUMBER})(\s*%)?", value.strip())):
            number = float(found[1]) / (100 if found[0].endswith("%") else 1)
            raise ValueError(f"got {shown(value)}, expected a share as a number without quotes: {number:g}")
        return value

    @model_validator(mode="after")
    def _no_weight_held_out(self) -> Data:
        for source in _listed(self.validation):
            if isinstance(source, Source) and source.weight != 1:
                raise ValueError(
                    f"validation: the weight of {source.source} is {source.weight:g}, but held-out rows count once each"
                )
        return self

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Data:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length}, expected less than max_length ({self.max_length}):"
                " no room is left for a response"
            )
        return self


class Loss(Section):
    """The loss that the student minimises."""

    divergence: NamedOptions = Field(
        default=NamedOptions(name="forward_kl"),
        description="Distance from the teacher: a name, or name and options.",
    )
    kd_ratio: float = Field(
        default=0.5, ge=0, le=1, description="loss = (1 - kd_ratio) * ce_loss + kd_ratio * kd_loss."
    )
    temperature_scaling: Literal["squared", "none"] = Field(
        default="squared", description="Multiply kd_loss by T^2, or not."
    )
    temperature_per_teacher: bool = Field(
        default=False,
        description="Each of several teachers has a state of the temperature policy of its own, which sees its rows alone; "
        "false: one state sees all rows.",
    )
    logits_budget_mb: Count | None = Field(
        default=None,
        description="Memory for one chunk of logits, in MiB; null: 256, with kernels 1024 or a quarter of what is free.",
    )
    kernels: Literal["auto", "triton", "torch"] = Field(
        default="auto",
        description="Triton kernels: where a GPU can run them and they agree with PyTorch; those or an error; none.",
    )
    logits_dtype: Literal["auto", "float32"] = Field(
        default="auto", description="Of the logits that kernels read: that of the matmul, or its sums unrounded."
    )
    router_aux_loss: Literal["model", "none"] = Field(
        default="model",
        description="The auxiliary loss of a mixture of experts: as the model's configuration has it, or left out.",
    )


class Task(Section):
    """Classification or regression in the place of answers to instructions."""

    name: Literal["glue"] = Field(description="Family of tasks; the rows are those of `dts-hf prepare glue`.")
    subset: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] = Field(
        description="Which task: it fixes the fields of a row, the labels and the metrics."
    )
    max_length: Count = Field(default=128, description="Longest text (or pair of texts), in tokens; the rest is cut.")
    mismatched: str | None = Field(
        default=None, description="MNLI's second validation set, scored at the end; null: it is not scored."
    )

    @model_validator(mode="after")
    def _second_set_is_of_mnli(self) -> Task:
        if self.mismatched is not None and self.subset != "mnli":
            raise ValueError(f"mismatched is a validation set of mnli, but subset is {self.subset}")
        return self


class OwnText(Section):
    """Answers that the student draws to held-out prompts, on which teacher and student are compared."""

    rows: Count = Field(default=64, description="How many held-out prompts are answered: the first so many.")
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Of sampling; both are compared at temperature 1."
    )
    max_new_tokens: Count = Field(default=128, description="Longest answer, in tokens, its end included.")
    seed: CountFromZero = Field(default=10, description="Of the text; the same in all runs that are compared.")


class Harness(Section):
    """Tasks of the package ``lm_eval`` (EleutherAI's harness), which is installed apart."""

    tasks: Annotated[list[str], Field(min_length=1)] = Field(description="Names of tasks, such as hellaswag.")
    models: Annotated[list[Literal["teacher", "student"]], Field(min_length=1)] = Field(
        default=["student"], description="Which models are scored: the student after training, the teacher before it."
    )
    num_fewshot: CountFromZero | None = Field(
        default=None, description="Examples in a prompt; null: as the task has it."
    )
    limit: Count | None = Field(
        default=None, description="The first so many examples of each task, for a look; null: all."
    )
    batch_size: Count | None = Field(default=None, description="Examples at once; null: evaluation.batch_size.")
    chat_template: bool = Field(default=False, description="Put prompts into the tokenizer's chat template.")


class Evaluation(Section):
    """How answers are generated and scored."""

    # Without "chat": the template is data.prompt_template, and minillm with the chat template is that protocol
    protocol: Literal["minillm", "no_ngram", "greedy", "quick"] | None = Field(
        default=None,
        description="Take tokens, sampling, seeds and n-gram rule from this protocol where they are not given here; "
        "the template is always data.prompt_template.",
    )
    sets: list[str] = Field(
        default=[], description="Prepared sets or row files, answered at the end besides the validation rows."
    )
    set_rows: Count | None = Field(default=None, description="Answer the first so many rows of each set; null: all.")
    rows: Count | None = Field(default=64, description="How many validation prompts are answered; null: all.")
    max_new_tokens: Count = Field(default=128, description="Longest answer, in tokens.")
    batch_size: Count = Field(
        default=32, description="Prompts answered at once; in float32 it does not change the answers."
    )
    no_repeat_ngram_size: CountFromZero = Field(
        default=0, description="Forbid repeated n-grams of this size; 0: allow them."
    )
    do_sample: bool = Field(default=False, description="Sample the answers; false: the most likely token each time.")
    seeds: Annotated[list[CountFromZero], Field(min_length=1)] = Field(
        default=[10], description="One pass per seed; only used when sampling."
    )
    every_steps: Count | None = Field(default=None, description="Also score ROUGE-L every so many optimizer steps.")
    models: list[Literal["teacher", "student_before", "student"]] = Field(
        default=["teacher", "student_before", "student"], description="Which models are scored."
    )
    dtype: Literal["bfloat16", "float32"] | None = Field(
        default=None, description="Weights while answering; null: as loaded."
    )
    own_text: OwnText | None = Field(
        default=None,
        description="Also measure KL between teacher and student, both ways, on answers that the student samples before and "
        "after training; costs these answers and one pass of both models over them. Null: not.",
    )
    harness: Annotated[list[str], Field(min_length=1)] | Harness | None = Field(
        default=None,
        description="Also score by tasks of lm_eval (pip install lm_eval), by name, or with options; one process alone.",
    )

    @property
    def whole_harness(self) -> Harness | None:
        """``harness`` with its options, where names alone were given too."""
        return Harness(tasks=self.harness) if isinstance(self.harness, list) else self.harness

    @model_validator(mode="before")
    @classmethod
    def _values_of_the_protocol(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("protocol"), str):
            return {**protocol_values(value["protocol"]), **value}
        return value


#: See ``experiments.presets``.
PresetName = Literal["temperature", "fkl-rkl-temperature", "policies", "revisit-classification", "revisit-lm"]


class Sweep(Section):
    """What ``dts-hf sweep`` varies; ``dts-hf train`` does not look at it."""

    preset: PresetName | None = Field(
        default=None,
        description="A sweep by name, see dts-hf sweep --list-presets; 'set' and 'zip' are crossed with it.",
    )
    set: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default={}, description="Values by dotted key, each with each: {temperature.value: [1, 2, 4]}."
    )
    zip: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default={},
        description="Values by dotted key that go together: the first ones of all keys, the second ones, ...",
    )
    seeds: list[CountFromZero] = Field(
        default=[], description="Seeds of training; empty: that of training.seed alone, with a preset 1, 2 and 3."
    )


class Output(Section):
    """The run directory."""

    dir: str = Field(description="The run directory: it must not exist yet, or be empty.", min_length=1)
    overwrite: bool = Field(default=False, description="Replace the files of an earlier run in that folder.")
    report: bool = Field(default=True, description="Write figures, report.html and the model card at the end.")


class Recipe(Section):
    """One distillation. Build it with ``load_recipe`` or ``Recipe.from_dict``; change it by building another one."""

    student: Student = Field(description="The small model that learns.")
    teacher: Teacher | None = Field(
        default=None,
        description="The large model that is imitated; it is never changed. Null with loss.kd_ratio: 0: labels alone.",
    )
    teachers: dict[str, OneOfSeveral] | None = Field(
        default=None,
        description="Several teachers by name, in the place of teacher: each row has one (data.teacher_column), or all have "
        "every row (weight). See docs/several_teachers.md.",
    )
    data: Data = Field(description="The rows: where they are and how they become tokens.")
    task: Task | None = Field(
        default=None,
        description="Classification (or STS-B's regression); null: a language model answers instructions.",
    )
    temperature: NamedOptions = Field(
        default=NamedOptions.model_validate({"name": "dts", "rule": "gap"}),
        description="The temperature policy and its options; a number alone: the policy constant.",
    )
    loss: Loss = Field(default=Loss(), description="What is minimised.")
    training: dict[str, Any] = Field(default={}, description="Passed to transformers.TrainingArguments as it is.")
    evaluation: Evaluation = Field(default=Evaluation(), description="Scores by generation on the validation rows.")
    output: Output = Field(description="Where the results go.")
    sweep: Sweep | None = Field(default=None, description="What dts-hf sweep varies; train does not look at it.")

    @model_validator(mode="before")
    @classmethod
    def _type_of_itself(cls, value: Any) -> Any:
        """A teacher of kind self has the student's type; the running mean of all weights has float32."""
        teacher, student = (value.get(key) if isinstance(value, Mapping) else None for key in ("teacher", "student"))
        if not isinstance(teacher, Mapping) or teacher.get("kind") != "self" or teacher.get("dtype") is not None:
            return value
        student = student if isinstance(student, Mapping) else {}
        ema = teacher.get("weights") == "ema" and student.get("lora") is None
        dtype = "float32" if ema else student.get("dtype") or Student.model_fields["dtype"].default
        return {**value, "teacher": {**teacher, "dtype": dtype}}

    @model_validator(mode="after")
    def _taught_by_itself(self) -> Recipe:
        if problem := self_problem(self) or prefix_problem(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _rows_to_evaluate(self) -> Recipe:
        if self.evaluation.every_steps is not None and self.data.validation is None:
            raise ValueError("evaluation.every_steps needs validation rows, but data.validation is null")
        return self

    @model_validator(mode="after")
    def _task_fits(self) -> Recipe:
        if problem := several_problem(self) or alignment_problem(self):
            raise ValueError(problem)
        if not self.all_teachers and self.loss.kd_ratio > 0:
            without = "loss.kd_ratio: 0, which learns from labels alone, needs none"
            raise ValueError(f"teacher: is missing, expected a mapping with model; only {without}")
        if problem := on_policy_problem(self) or held_out_problem(self) or own_text_problem(self):
            raise ValueError(problem)
        if not self.all_teachers and self.data.responses == "teacher":
            raise ValueError("data.responses: teacher, but there is no teacher to answer")
        init = self.student.init
        if self.teacher is None and init is not None and init.source is None:
            raise ValueError(f"student.init: from {init.from_}, but there is no teacher; give student.model")
        if (
            self.teacher is not None
            and init is not None
            and init.from_ == "teacher"
            and self.teacher.quantization != "none"
        ):
            raise ValueError(
                f"student.init: from teacher, but teacher.quantization is '{self.teacher.quantization}', and packed weights "
                "cannot be trained: use quantization 'none', or give student.model"
            )
        if self.task is not None:
            if self.student.quantize is not None:
                raise ValueError("student.quantize: is for language models, and a task has a classifier: leave it out")
            if init is not None and (init.source or init.mlp or init.hidden or init.measures or init.parameters):
                raise ValueError("student.init: a task takes from: teacher or config, and layers, alone")
            if self.teacher is not None and self.teacher.kind != "live":
                raise ValueError(
                    f"teacher.kind: {self.teacher.kind}, but a task has no states of tokens; use kind: live"
                )
            unfit = {
                "evaluation.protocol": self.evaluation.protocol is not None,
                "evaluation.sets": bool(self.evaluation.sets),
                "evaluation.every_steps": self.evaluation.every_steps is not None,
                "evaluation.own_text": self.evaluation.own_text is not None,
                "evaluation.harness": self.evaluation.harness is not None,
                "data.packing": bool(self.data.packing),
                "data.responses": self.data.responses != "data",
                "data.on_policy": self.data.on_policy is not None,
                "data.validation as a share": isinstance(self.data.validation, float),
                "data.columns": bool(self.data.columns),
            }
            found = [key for key, given in unfit.items() if given]
            if found:
                raise ValueError(f"{', '.join(found)}: belongs to generated answers, and a task has labels instead")
            for key, value in (("train", self.data.train), ("validation", self.data.validation)):
                if any(isinstance(one, Source) for one in _listed(value)):
                    raise ValueError(f"data.{key}: got a mapping, but the sources of a task are names alone")
        return self

    @property
    def seed(self) -> int:
        """That of training, 0 included; 42 where none is given, as ``TrainingArguments`` has it."""
        seed = self.training.get("seed")
        return 42 if seed is None else int(seed)

    @property
    def all_teachers(self) -> dict[str, Teacher]:
        """The teachers by the key of their section: ``teacher``, or ``teachers.NAME`` of each of several; none at all."""
        if self.teachers:
            return {f"teachers.{name}": section.alone for name, section in self.teachers.items()}
        return {} if self.teacher is None else {"teacher": self.teacher}

    @property
    def routing(self) -> Routing | None:
        """How each row names one of several teachers; None where it does not."""
        column = self.data.teacher_column
        return Routing(column, tuple(self.teachers), self.data.default_teacher) if column and self.teachers else None

    @property
    def distinct_teachers(self) -> list[str]:
        """The first name of each of several teachers, those with equal sections being one; ``""`` without the section."""
        return [name for name in self.teachers if self.names_of(name)[0] == name] if self.teachers else [""]

    def names_of(self, name: str) -> list[str]:
        """All names of that one of several teachers: those of equal sections.

        Raises:
            UserError: there is no such teacher.
        """
        teachers = self.teachers or {}
        if not teachers:
            raise UserError(f"--teacher: got '{name}', but the recipe has no section teachers; leave it out")
        if name not in teachers:
            raise UserError(
                f"--teacher: got '{name}', expected one of {', '.join(teachers)}.{nearest(name, teachers)}"
            )
        return [other for other, section in teachers.items() if section.alone == teachers[name].alone]

    def with_teacher(self, name: str) -> Recipe:
        """The same with one of several teachers alone, for every row; rows still say which one they name."""
        section = (self.teachers or {})[name].alone
        loss = self.loss.model_copy(update={"temperature_per_teacher": False})
        return self.model_copy(update={"teacher": section, "teachers": None, "loss": loss})

    @property
    def required_teacher(self) -> Teacher:
        """The teacher's section where there always is one: everywhere but with ``kd_ratio: 0``.

        Raises:
            UserError: there is none.
        """
        if self.teacher is None:
            raise UserError("teacher: is missing, expected a mapping with model")
        return self.teacher

    @property
    def kept_teachers(self) -> dict[str, Teacher]:
        """Those of ``all_teachers`` whose models stay in memory for training."""
        return {key: section for key, section in self.all_teachers.items() if section.is_kept}

    @property
    def loaded_teachers(self) -> dict[str, Teacher]:
        """Those whose models are loaded at all: one whose states are cached may have to give weights or answers."""
        init = self.student.init
        needed = (init is not None and init.source is None) or self.data.responses == "teacher"
        return self.all_teachers if needed else self.kept_teachers

    @property
    def keeps_teacher(self) -> bool:
        """Whether the teacher's model, or one of several, stays in memory for training."""
        return bool(self.kept_teachers)

    @property
    def loads_teacher(self) -> bool:
        """Whether the teacher's model, or one of several, is loaded at all."""
        return bool(self.loaded_teachers)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "recipe", *, deep: bool = True) -> Recipe:
        """Check ``values`` and build the recipe.

        Args:
            values: nested mappings, as in the YAML file. A path that starts with ``./`` or ``../`` is taken from the
                current folder.
            source: what the error message calls them.
            deep: also check what other modules define (policy and divergence options, training keys); imports torch.

        Raises:
            UserError: one message with a line per problem.
        """
        return validated(expand(values, ""), lambda dotted: source, deep)

    def to_yaml(self) -> str:
        """Every key, defaults included, as YAML that loads again to an equal recipe."""
        return dump_values(self.model_dump(mode="json"))


def several_problem(recipe: Recipe) -> str:
    """What is wrong with the teachers of ``recipe`` taken together; empty where nothing is."""
    data, teachers = recipe.data, recipe.teachers
    if teachers is None:
        of_several = {"data.teacher_column": data.teacher_column, "data.default_teacher": data.default_teacher,
                      "loss.temperature_per_teacher": recipe.loss.temperature_per_teacher or None}  # fmt: skip
        given = [key for key, value in of_several.items() if value is not None]
        return f"{given[0]}: is for several teachers, and there is no section teachers" if given else ""
    if recipe.teacher is not None:
        return "teacher and teachers: got both, expected exactly one of them (null removes a key)"
    weights = {name: section.weight for name, section in teachers.items() if section.weight is not None}
    if problem := names_problem(teachers) or weights_problem(
        teachers, data.teacher_column, weights or None, "teachers.NAME.weight", "data.teacher_column"
    ):
        return problem
    default = data.default_teacher
    if default is not None and (data.teacher_column is None or default not in teachers):
        expected = f"expected one of {', '.join(teachers)}, beside teacher_column.{nearest(default, teachers)}"
        return f"data.default_teacher: got {default!r}, {expected}"
    if data.responses == "teacher" and data.teacher_column is None:
        return "data.responses: teacher, but every teacher has every row: give teacher_column, so that one answers each row"
    if "teacher" in data.columns:
        return "data.columns: got 'teacher', but data.teacher_column is the key for that"
    if itself := next((name for name, section in teachers.items() if section.kind == "self"), None):
        return (
            f"teachers.{itself}.kind: self, but a student teaches itself alone: give teacher in the place of teachers"
        )
    for name, section in teachers.items():
        if section.alignment is not None:
            found = f"teachers.{name}.alignment: {section.alignment}"
            return f"{found}, but only a teacher that is alone may have another tokenizer"
    if recipe.student.init is not None and recipe.student.init.source is None:
        return f"student.init: from {recipe.student.init.from_}, but there are several teachers: give student.model"
    if recipe.task is not None:
        return "task: classifiers have one teacher; give teacher in the place of teachers"
    if len({section.vocab_alignment for section in teachers.values()}) > 1:
        return "teachers: their vocab_alignment differs, expected the same for all: the student has one vocabulary"
    return ""


def self_problem(recipe: Recipe) -> str:
    """What is wrong with a teacher of kind self beside the rest of ``recipe``; empty where nothing is."""
    teacher, student = recipe.teacher, recipe.student
    if teacher is None or teacher.kind != "self":
        return ""
    if recipe.task is not None:
        return "teacher.kind: self, but a task has classifiers, whose teacher is another model: use kind: live"
    if recipe.data.responses == "teacher":
        return "data.responses: teacher, but with teacher.kind: self there is no other model that could answer"
    if student.init is not None and student.init.source is None:
        return (
            f"student.init: from {student.init.from_}, but with teacher.kind: self there is no other model: name one"
        )
    if student.lora is not None and teacher.dtype != student.dtype:
        return (
            f"teacher.dtype: {teacher.dtype}, but with student.lora the teacher's weights are the student's own, "
            f"{student.dtype}: leave it out"
        )
    if teacher.weights == "ema" and student.lora is None and teacher.dtype != "float32":
        return (
            f"teacher.dtype: {teacher.dtype} with weights 'ema', expected float32: a step of {teacher.ema_rate:g} of a "
            "small change is lost in a shorter type"
        )
    return ""


def prefix_problem(recipe: Recipe) -> str:
    """What is wrong with a text for the teacher alone beside the rest of ``recipe``; empty where nothing is."""
    column = recipe.data.teacher_prefix_column
    if column is None:
        given = "teacher_prefix" in {field for source in recipe.data.sources for field in source.columns or {}}
        return "columns: got 'teacher_prefix' of a source, without data.teacher_prefix_column for all" if given else ""
    said = f"data.teacher_prefix_column: {column}"
    if "teacher_prefix" in recipe.data.columns:
        return "data.columns: got 'teacher_prefix', but data.teacher_prefix_column is the key for that"
    if recipe.task is not None:
        return f"{said}, but a task has classifiers, which answer nothing"
    if recipe.teacher is None:
        return f"{said}, but there {'are several teachers' if recipe.teachers else 'is no teacher'}: it is for one"
    if recipe.teacher.kind in ("cached", "remote"):
        kind = recipe.teacher.kind
        return f"{said}, but the states of teacher.kind: {kind} are of the student's rows: use kind live or self"
    if recipe.data.responses == "teacher":
        return f"{said}, but with data.responses: teacher the teacher writes the answers, without that text"
    return ""


def on_policy_problem(recipe: Recipe) -> str:
    """What of ``recipe`` does not go with ``data.on_policy``; empty where nothing is wrong."""
    if recipe.data.on_policy is None:
        return ""
    if recipe.data.on_policy.adaptive is not None:
        found = "data.validation is null" if recipe.data.validation is None else ""
        if recipe.training.get("eval_strategy") in ("no", False):
            found = "training.eval_strategy is 'no'"
        if found:
            return f"data.on_policy.adaptive: the share follows the held-out loss, but {found}"
    if not recipe.all_teachers:
        return "data.on_policy: there is no teacher, and the student's own text has no labels; give teacher"
    for key, section in recipe.all_teachers.items():
        if section.kind == "cached" and section.missing == "error":
            return (
                f"data.on_policy: the cache of {key} knows the rows of the data, and the student's answers are others; "
                f"expected {key}.missing: live, which has the teacher answer them, or {key}.kind: live"
            )
    return ""


def own_text_problem(recipe: Recipe) -> str:
    """Why ``evaluation.own_text`` cannot be measured; empty where it can, or is not asked for."""
    if recipe.evaluation.own_text is None or recipe.task is not None:  # of a task it is refused with others like it
        return ""
    found = "evaluation.own_text: the teacher is asked about the student's answers to held-out prompts, but"
    if recipe.data.validation is None:
        return f"{found} data.validation is null; expected rows, or a share of the training rows such as 0.05"
    if not recipe.all_teachers:
        return f"{found} there is no teacher; leave it out"
    for key, section in recipe.all_teachers.items():
        if section.alignment is not None:
            return f"{found} {key} has another tokenizer ({section.alignment}), and reads none of its tokens; leave it out"
        if section.kind == "cached" and section.missing == "error":
            return (
                f"{found} the cache of {key} knows the data's rows alone; expected {key}.missing: live, or kind: live"
            )
    return ""


def held_out_problem(recipe: Recipe) -> str:
    """Why the gap cannot be measured on held-out rows where ``recipe`` asks for that; empty where it can, or need not."""
    source = recipe.temperature.options.get("gap_source")
    asked = source == "held_out" or (isinstance(source, Mapping) and source.get("held_out") is not None)
    if asked and recipe.task is None and recipe.data.validation is None:
        return (
            "temperature.gap_source: got held_out, but there are no held-out rows; expected data.validation, a file of them "
            "or a share of the training rows such as 0.05"
        )
    return ""


def alignment_problem(recipe: Recipe) -> str:
    """What does not go together with a teacher that has another tokenizer; empty where nothing is."""
    if recipe.teacher is None or recipe.teacher.alignment is None:
        return ""
    found = f"teacher.alignment: {recipe.teacher.alignment}"
    init = recipe.student.init
    if recipe.data.responses == "teacher":
        return f"{found} and data.responses: teacher, whose prompts are the student's tokens: use data.responses: data"
    if recipe.task is not None:
        return f"{found}, but a task has labels and no tokens to align: leave it out"
    if recipe.data.on_policy is not None:
        return f"{found} and data.on_policy, whose rows are tokens of the student alone: leave one of them out"
    if recipe.data.teacher_prefix_column is not None:
        return f"{found} and data.teacher_prefix_column, which is for a teacher with the student's tokenizer"
    if init is not None and init.source is None:
        return f"{found}, but a student of init: from {init.from_} has the teacher's tokenizer: leave it out"
    return ""


def validated(values: Mapping[str, Any], source: Callable[[str], str], deep: bool) -> Recipe:
    """Build the recipe, or tell every problem at once.

    Args:
        values: as ``read_values`` or ``expand`` leaves them.
        source: says which file a dotted key came from.
        deep: also check what other modules define; imports torch.

    Raises:
        UserError: one message with a line per problem.
    """
    problems: dict[str, str] = {}
    recipe = None
    if deep and isinstance(training := values.get("training"), Mapping):
        values = {**values, "training": whole_training_values(training)}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = schema_problems(error, values, _schema())
    if deep:
        problems |= deep_problems(values, _schema())
    unusable = dict(unusable_texts(values))
    problems |= unusable
    if recipe is None or problems:
        places = {key: source(key) for key in problems}
        places |= {key: with_line(places[key], key) for key in unusable}
        lines = [": ".join(filter(None, (places[key], key, text))) for key, text in problems.items()]
        raise UserError("\n".join(lines))
    return recipe


def recipe_json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, without the keys of ``training:`` (see ``editor_schema``)."""
    return copy.deepcopy(_schema())


@functools.cache
def _schema() -> dict[str, Any]:
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)  # the base of an ``extends`` may bring what the file itself leaves out
    mapping = schema["$defs"]["NamedOptions"]
    schema["$defs"]["NamedOptions"] = {"anyOf": [{"type": "string"}, mapping], "description": mapping["description"]}
    schema["properties"]["extends"] = {"type": "string", "description": "Another recipe file that this one changes."}
    return schema
