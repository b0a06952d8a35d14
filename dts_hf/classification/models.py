"""Classifiers: loaded with the task's labels in the task's order, whatever order they were trained in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from dts_hf.classification.glue_tasks import GlueTask
from dts_hf.distributed.processes import on_any_process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError
from dts_hf.models.adapters import add_lora
from dts_hf.models.loading import ModelSource, load_weights
from dts_hf.models.pruning import prune_layers
from dts_hf.models.student_init import random_student

if TYPE_CHECKING:
    from dts_hf.recipe.schema import Student, Teacher

logger = logging.getLogger(__name__)
#: Keys of a recipe's teacher or student that say how its files are read.
LOADED_WITH = {"dtype", "revision", "quantization", "trust_remote_code"}


def load_classifier(
    name: str, task: GlueTask, *, key: str, dtype: str = "float32", fresh_head: bool = True, **source_options: Any
) -> PreTrainedModel:
    """Load a sequence classifier for ``task``, its outputs in the task's order.

    A language model or encoder without a classification head gets a new one (drawn from the global generator, so seed
    it first). A head that knows the same classes in another order is permuted.

    Args:
        name: folder, file or name on the Hub.
        task: says how many outputs there are, and what each of them means.
        key: named in errors.
        dtype: torch's name of the type of the weights.
        fresh_head: whether a new head is allowed; a teacher must bring its own.
        source_options: ``revision``, ``quantization`` and ``trust_remote_code``, as ``load_weights`` takes them.

    Raises:
        UserError: it cannot be loaded, other weights than the head's are missing, or its classes are other ones.
    """
    source = ModelSource.resolve(name, key)
    order: list[int] | None = None
    if source.gguf_file is None:  # GGUF files hold language models
        order = _order_of_saved_head(source.location, task, key, fresh_head, source_options)
    options = {**source_options, **_label_config(task)}
    model, missing = load_weights(AutoModelForSequenceClassification, name, key=key, dtype=dtype, **options)
    # Encoders saved as masked language models also lack the pooler below the head.
    body = f"{model.base_model_prefix}."
    lost = [weight for weight in missing if weight.startswith(body) and "pooler" not in weight]
    if lost or (missing and not fresh_head):
        expected = "a fine-tuned sequence classifier" if not fresh_head else "a complete model"
        raise UserError(
            f"{key}: the files of {name!r} lack {len(missing)} weights of {type(model).__name__}, among them "
            f"{(lost or missing)[0]}; expected {expected}"
        )
    if missing:
        logger.warning("%s: new weights, to be trained: %s", key, ", ".join(missing))
    if order is not None and not missing:
        permute_outputs(model, order, key)
    return model


def _label_config(task: GlueTask) -> dict[str, Any]:
    names = dict(enumerate(task.labels or ("LABEL_0",)))
    problem = "regression" if task.regression else "single_label_classification"
    numbers = {label: number for number, label in names.items()}
    return {"num_labels": task.outputs, "id2label": names, "label2id": numbers, "problem_type": problem}


def _order_of_saved_head(
    location: str, task: GlueTask, key: str, is_trained: bool, source_options: Mapping[str, Any]
) -> list[int] | None:
    """Where the saved head, if there is one, has each class of the task; None where nothing has to be moved."""
    try:
        known = {name: source_options.get(name) for name in ("revision", "trust_remote_code")}
        config = AutoConfig.from_pretrained(location, **known)
    except Exception:
        return None  # loading the model says it better
    if not any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    names = {int(number): str(label) for number, label in config.id2label.items()}
    return label_order(names, task, key, is_trained=is_trained)


def label_order(id2label: dict[int, str], task: GlueTask, key: str, *, is_trained: bool = True) -> list[int] | None:
    """For each class of the task, the model's number for it; None where the two orders are the same.

    Args:
        id2label: of the model's configuration. Generic names (``LABEL_0``) are taken to be in the task's order, with
            a warning; but not those of an MNLI teacher, since published models have either the data's order or
            contradiction, entailment, neutral. With two classes nothing but the data's order is usual, and a swap
            shows at once: the teacher's accuracy is far below one half.
        task: whose order is wanted.
        key: named in errors.
        is_trained: the model is the student, so that an order which is not the task's costs it no more than a head
            start.

    Raises:
        UserError: another number of classes, other names, or an MNLI teacher without names.
    """
    names = [id2label[number] for number in sorted(id2label)]
    if len(names) != task.outputs:
        kind = "one score" if task.regression else f"{task.outputs} classes ({task.describe_labels})"
        raise UserError(
            f"{key}: the model has {len(names)} labels ({', '.join(names)}), the task {task.subset} {kind}"
        )
    if task.regression:
        return None
    if all(name.upper() == f"LABEL_{number}" for number, name in enumerate(names)):
        if task.outputs > 2 and not is_trained:
            raise UserError(
                f"{key}: its labels have no names ({', '.join(names)}), and the order of the classes differs between "
                f"models for {task.subset}: write {', '.join(task.labels)} into id2label of its config.json, in the order "
                "it was trained in (download the model first where it is on the Hub)"
            )
        logger.warning("%s: its labels have no names; taken to be %s", key, task.describe_labels)
        return None
    plain = [_plain(name) for name in names]
    if set(plain) != {_plain(label) for label in task.labels}:
        raise UserError(
            f"{key}: the model's labels are {', '.join(names)}, those of the task {task.subset} {', '.join(task.labels)}. "
            "Correct id2label in the model's config.json if they mean the same"
        )
    order = [plain.index(_plain(label)) for label in task.labels]
    return None if order == list(range(task.outputs)) else order


def _plain(label: str) -> str:
    return label.strip().lower().replace("-", "_").replace(" ", "_")


@torch.no_grad()
def permute_outputs(model: PreTrainedModel, order: list[int], key: str) -> None:
    """Reorder the rows of the last linear layer, so that output k is the model's old output ``order[k]``.

    Raises:
        UserError: the model's logits do not come straight out of a linear layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == len(order)]
    was_training = model.training
    model.eval()
    before = _probe(model)
    for parameter in (layers[-1].weight, layers[-1].bias) if layers else ():
        if parameter is not None:
            parameter.copy_(parameter[order])
    after = _probe(model)
    model.train(was_training)
    if not torch.allclose(after, before[:, order], rtol=0, atol=1e-2 * float(before.abs().max().clamp(min=1))):
        raise UserError(
            f"{key}: the outputs of {type(model).__name__} cannot be reordered; reorder its labels yourself"
        )
    logger.warning("%s: its classes were in another order and have been reordered", key)


def _probe(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 8, device=model.device).unsqueeze(0)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float()


def load_task_teacher(teacher: Teacher, task: GlueTask) -> PreTrainedModel:
    """The fine-tuned teacher, frozen and in evaluation mode.

    Raises:
        UserError: see ``load_classifier``.
    """
    options = teacher.model_dump(include=LOADED_WITH)
    model = load_classifier(teacher.model, task, key="teacher.model", fresh_head=False, **options)
    model.requires_grad_(False).eval()
    return model


def load_task_student(student: Student, teacher: PreTrainedModel | None, task: GlueTask, seed: int = 0) -> nn.Module:
    """The student: loaded, or made of the teacher, its head included; with LoRA where the recipe asks for it.

    Args:
        student: the section of the recipe.
        teacher: that it is pruned from, or has the shape of.
        task: what it learns.
        seed: of random weights.

    Raises:
        UserError: see ``load_classifier``, ``prune_layers`` and ``random_student``.
    """
    if (init := student.init) is not None and teacher is not None:
        if init.from_ == "config":
            made = random_student(init, teacher, seed)
        else:
            assert init.layers is not None  # of a task the recipe was refused otherwise
            made = prune_layers(teacher, init.layers)
        model = made.to(getattr(torch, student.dtype))
    else:
        options = student.model_dump(include=LOADED_WITH)
        model = load_classifier(str(student.model), task, key="student.model", **options)
    return model if student.lora is None else add_lora(model, student.lora, task_type="SEQ_CLS")


def fit_to_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Tell ``model`` the padding token (a decoder is read at its last token that is none) and switch its cache off.

    Raises:
        UserError: the tokenizer has more tokens than the model has embeddings.
    """
    config: Any = model.config
    text_config = config.get_text_config()
    for holder in (config, text_config):
        holder.pad_token_id = tokenizer.pad_token_id
        if getattr(holder, "use_cache", None):
            holder.use_cache = False
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise UserError(f"{name}: {rows:,} embeddings, but the tokenizer has {len(tokenizer):,} tokens")


def takes_type_ids(model: nn.Module | None) -> bool:
    """Whether the model tells the two texts of a pair apart by ``token_type_ids``."""
    return model is not None and getattr(model.config, "type_vocab_size", 0) > 1


class ClassifierTeacher:
    """Runs a frozen classifier in its own dtype, without gradient, and answers a row that it has seen from memory.

    The texts of a task never change, so one pass over the data is enough for any number of epochs. What is remembered
    is float32 logits by token ids. (In bf16 an answer may differ in the last bits with the batch it was computed in.)

    Args:
        model: the classifier, or None: there is no teacher.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model if model is None else model.requires_grad_(False).eval()
        self._known: dict[bytes, Tensor] = {}

    def to(self, device: torch.device) -> ClassifierTeacher:
        """Move the model, unless it is sharded and so in its place. Returns the teacher itself."""
        if self.model is not None and not is_sharded(self.model):
            self.model.to(device)
        return self

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor | None:
        """``[B, C]`` in fp32; None without a model."""
        if self.model is None:
            return None
        keys = _row_keys(batch)
        unknown = not all(key in self._known for key in keys)
        if is_sharded(self.model):  # all of them or none
            unknown = on_any_process(unknown, batch["input_ids"].device)
        if unknown:
            self.model.eval()
            # The teacher keeps its own precision whatever autocast the student trains under.
            with torch.autocast(batch["input_ids"].device.type, enabled=False):
                logits = self.model(**for_model(self.model, batch)).logits.float().cpu()
            for key, row in zip(keys, logits, strict=True):
                self._known.setdefault(key, row)
        return torch.stack([self._known[key] for key in keys]).to(batch["input_ids"].device)


def for_model(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """``batch`` without ``token_type_ids`` for a model that would misread them (GPT-2 embeds them as words)."""
    return batch if takes_type_ids(model) else {name: batch[name] for name in batch if name != "token_type_ids"}


def _row_keys(batch: dict[str, Tensor]) -> list[bytes]:
    ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool()
    types = batch.get("token_type_ids")
    parts = ids if types is None else ids * 4 + types.cpu()
    return [row[real].numpy().tobytes() for row, real in zip(parts, mask, strict=True)]
