"""Every row format that is understood, turned into a ``Row``; everything wrong names the file and the line.

A row is understood by its columns. The first format of these that is whole counts, and columns of no format are ignored:

1. ``messages``, 2. ``conversations``: a conversation;
3. a question and a response, each under one of several names (``PROMPTS``, ``RESPONSES``);
4. ``text``: learned whole.

Columns that change what is learned (tools, a system prompt, thoughts, images) are used or refused, never left out in
silence: the user says so with ``data.columns: {images: null}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dts_hf.data.cells import is_encodable, items, kind, mapping, plain, text
from dts_hf.data.columns import ALIASES, FIELDS, Columns, Record, listed
from dts_hf.data.conversations import check_whole, read_messages, read_tools
from dts_hf.data.rows import Message, Row
from dts_hf.errors import UserError, nearest

ROW_FORMAT = (
    "{instruction, input, output}, {prompt, completion}, {question, answer}, {messages}, {conversations} or {text}"
)
#: What is asked, and what responds to it. One of each is a row whatever their names; of several, ``PAIRS`` belong together.
PROMPTS = ("instruction", "question", "query", "problem", "prompt")
RESPONSES = ("output", "answer", "response", "solution", "completion")
PAIRS = (
    ("instruction", "output"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("prompt", "completion"),
)
#: What ``finish_reason`` says of a response that was cut at a limit, as servers (OpenAI, vLLM) write it.
CUT = "length"
#: The formats in order, with the fields that make them.
FORMATS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "pair": PROMPTS + RESPONSES,
    "text": ("text",),
}
#: Fields that a finished text has no place for: the pair that has.
_OF_CHATS = ("system", "history", "tools", "reasoning_content")


def parse_row(obj: Mapping[str, Any], where: str, default_id: str, columns: Columns | None = None) -> Row:
    """Check one row and bring it into the one form.

    Args:
        obj: the row as read; columns of no format are ignored.
        where: the place named in errors, such as ``train.jsonl: line 3``.
        default_id: the id where the row has none.
        columns: ``data.columns``: our names of columns, and theirs.

    Raises:
        UserError: no format is whole, two are, a value of the wrong type, or an empty prompt or response.
    """
    if not isinstance(obj, Mapping):
        raise UserError(f"{where}: expected an object {ROW_FORMAT}, got {kind(obj)}")
    record = Record(obj, columns, where)
    row = _row_of(record, _row_id(record, default_id))
    # By these names another data set may say which model wrote the response, or something else
    if "teacher" in record.mapped:
        row = replace(row, teacher=record.get("teacher"))
    if "teacher_prefix" in (columns or {}):
        value = record.get("teacher_prefix")
        prefix = "" if value is None else text(value, record.place("teacher_prefix"), empty=True)
        row = replace(row, teacher_prefix=prefix)
    return row


def _row_of(record: Record, row_id: str) -> Row:
    _refuse_media(record)
    for name in _by_precedence(record):
        if name == "pair":
            if pair := _pair(record):
                return _completed(record, _answered(record, row_id, *pair))
        elif record.has(name):
            if name != "text":
                return _completed(record, _conversation(record, row_id, name))
            learned = text(record.get("text"), record.place("text"))
            _refuse_beside(record, _OF_CHATS, "a text is learned as it stands", "Write it into the text")
            return Row(row_id, "", "", (learned,), kind="text")
    raise _no_format(record)


def response_field(obj: Mapping[str, Any]) -> str | None:
    """The column of a row's response, None of a conversation; of a row that ``parse_row`` takes.

    Args:
        obj: the row as read.
    """
    record = Record(obj, None, "")
    if record.has("messages") or record.has("conversations"):
        return None
    pair = _pair(record)
    return None if pair is None else pair[1]


def _by_precedence(record: Record) -> Iterable[str]:
    """The formats in order; what ``data.columns`` names was chosen by somebody, so it comes first."""
    return sorted(FORMATS, key=lambda name: record.mapped.isdisjoint(FORMATS[name])) if record.mapped else FORMATS


def _row_id(record: Record, default_id: str) -> str:
    row_id = record.get("id")
    if row_id is None:
        return default_id
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        raise UserError(f"{record.place('id')}: got {row_id!r}, expected a string that is not empty")
    if not is_encodable(str(row_id)):
        raise UserError(f"{record.place('id')} holds half of a surrogate pair (a broken \\ud8xx escape)")
    return str(row_id)


def _refuse_media(record: Record) -> None:
    for field in ("images", "videos", "audio"):
        value = record.get(field)
        if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
            raise UserError(
                f"{record.place(field)}: this row has {field}, but only text is learned. Leave such rows out, or, where "
                f"the text says it all, the column: data.columns: {{{field}: null}}"
            )


# ---------------------------------------------------------------------------------------------------- conversations


def _conversation(record: Record, row_id: str, field: str) -> Row:
    place = record.place(field)
    messages = read_messages(record.get(field), place, sharegpt=field == "conversations")
    if record.has("chosen") and messages and messages[-1]["role"] != "assistant":
        raise _preferences(record)
    return _row_of_messages(record, row_id, messages, place)


def _row_of_messages(
    record: Record,
    row_id: str,
    messages: Sequence[Message],
    place: str,
    *,
    given: int | None = None,
    references: tuple[str, ...] = (),
) -> Row:
    """A row whose last message is its response.

    Args:
        record: for its system prompt, tools and arguments of the template.
        row_id: the id.
        messages: all of them.
        place: what errors call them.
        given: how many are the prompt, of prompt and completion.
        references: further good responses after the last message's.
    """
    system = _system(record)
    if system is not None:
        if messages and messages[0]["role"] in ("system", "developer"):
            if messages[0]["content"] != system:
                raise UserError(
                    f"{record.place('system')}: the conversation begins with another system prompt. Leave one of them "
                    "out: data.columns: {system: null}"
                )
        else:
            messages = ({"role": "system", "content": system}, *messages)
            given = None if given is None else given + 1
    check_whole(messages, place)
    *prompt, answer = messages
    question = next(message["content"] for message in reversed(prompt) if message["role"] == "user")
    return Row(
        row_id,
        question,
        "",
        (answer["content"], *references),
        tuple(prompt),
        "messages",
        answer if answer.keys() - {"role", "content"} else None,
        given,
        read_tools(record.get("tools"), record.place("tools")),
        _template_arguments(record),
    )


def _system(record: Record) -> str | None:
    value = record.get("system")
    return text(value, record.place("system")) if value is not None and value != "" else None


def _template_arguments(record: Record) -> Mapping[str, Any] | None:
    value = record.get("chat_template_kwargs")
    if value is None or value == "":
        return None
    place = record.place("chat_template_kwargs")
    given = mapping(value, place, "a mapping, such as {enable_thinking: false}")
    return plain(given, place, nulls=isinstance(value, str)) or None


def _completed(record: Record, row: Row) -> Row:
    """``row`` with what columns of their own say of its response."""
    row = _with_reasoning(record, row)
    return replace(row, cut=True) if record.get("finish_reason") == CUT else row


def _with_reasoning(record: Record, row: Row) -> Row:
    """``row`` with the thoughts of its own column, as a conversation: other kinds have no place for them."""
    value = record.get("reasoning_content")
    if value is None or value == "":
        return row
    place = record.place("reasoning_content")
    thoughts = text(value, place)
    if row.kind == "instruction":
        question = row.prompt_messages[-1]["content"]
        row = replace(row, kind="messages", instruction=question, input="", messages=row.prompt_messages)
    answer = row.conversation[-1]
    if answer.get("reasoning_content", thoughts) != thoughts:
        raise UserError(
            f"{place}: the last message has other thoughts. Leave one out: data.columns: {{reasoning_content: null}}"
        )
    return replace(row, answer={**answer, "reasoning_content": thoughts})


# ------------------------------------------------------------------------------------------- a question, a response


def _pair(record: Record) -> tuple[str, str] | None:
    """The names of the question and the response that count; None where there is no whole pair."""
    asked = [field for field in PROMPTS if record.has(field)]
    responded = [field for field in RESPONSES if record.has(field)]
    if not asked or not responded:
        return None
    # What data.columns names was chosen by somebody.
    asked = [field for field in asked if field in record.mapped] or asked
    responded = [field for field in responded if field in record.mapped] or responded
    if len(asked) == len(responded) == 1:
        return asked[0], responded[0]
    whole = [pair for pair in PAIRS if pair[0] in asked and pair[1] in responded]
    if len(whole) == 1:
        return whole[0]
    raise UserError(
        f"{record.where}: found the columns {listed(asked)} for the prompt and {listed(responded)} for the response, "
        f"expected one of each. Say which: data.columns: {{{asked[0]}: {asked[0]}, {responded[0]}: {responded[0]}}}"
    )


def _answered(record: Record, row_id: str, asked: str, responded: str) -> Row:
    """A question or a finished prompt, and its response; or two lists of messages."""
    label = record.get("label")
    # KTO's: true or false, which a table writes as text or as a number
    if label is not None and str(label).strip().lower() in ("true", "false", "0", "1", "0.0", "1.0"):
        shown = str(label).lower() if isinstance(label, bool) else repr(label)
        raise UserError(
            f"{record.place('label')}: got {shown}: this is a preference set, whose responses are partly bad "
            "ones. Keep the rows with true, without this column; where it says something else: data.columns: "
            "{label: null}"
        )
    if _is_messages(record.get(asked)) or _is_messages(record.get(responded)):
        return _continued_conversation(record, row_id, asked, responded)
    question = text(record.get(asked), record.place(asked))
    references = _references(record, responded)
    if (asked, responded) == ("prompt", "completion"):
        _refuse_beside(
            record,
            (*_OF_CHATS, "input"),
            "a finished prompt is continued as it stands",
            "Where the prompt is a question: data.columns: {instruction: prompt, output: completion}; otherwise write it "
            "into the prompt",
        )
        kwargs = _template_arguments(record)
        return Row(row_id, question, "", references, kind="prompt", chat_template_kwargs=kwargs)
    given = record.get("input")
    about = "" if given is None else text(given, _or_without(record, "input"), empty=True)
    row = Row(row_id, question, about, references, chat_template_kwargs=_template_arguments(record))
    history = _history(record)
    tools = read_tools(record.get("tools"), record.place("tools"))
    if not history and not tools and _system(record) is None:
        return row
    # Alpaca's text has no place for them, so the row is a conversation.
    messages = (*history, *row.conversation)
    return _row_of_messages(record, row_id, messages, record.where, references=references[1:])


def _or_without(record: Record, field: str) -> str:
    """The place of a value that another data set may have under this name, meaning something else."""
    place = record.place(field)
    is_alias = any(f"column '{name}'" in place for name in ALIASES.get(field, ()))
    return f"{place} (data.columns: {{{field}: null}} leaves it out)" if is_alias else place


def _is_messages(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _continued_conversation(record: Record, row_id: str, asked: str, responded: str) -> Row:
    if not _is_messages(record.get(asked)):
        raise UserError(f"{record.place(asked)}: got {kind(record.get(asked))}, expected messages as in '{responded}'")
    prompt = read_messages(record.get(asked), record.place(asked))
    references: tuple[str, ...] = ()
    if _is_messages(record.get(responded)):
        completion = read_messages(record.get(responded), record.place(responded))
    else:
        first, *references = _references(record, responded)  # type: ignore[assignment]
        completion = ({"role": "assistant", "content": first},)
    place = record.place(responded)
    return _row_of_messages(
        record, row_id, (*prompt, *completion), place, given=len(prompt), references=tuple(references)
    )


def _references(record: Record, field: str) -> tuple[str, ...]:
    output, place = record.get(field), record.place(field)
    if not isinstance(output, (list, tuple)):
        return (text(output, place),)
    if not output:
        raise UserError(f"{place} is an empty list, expected at least one response")
    return tuple(text(one, f"{place}, reference {number}") for number, one in enumerate(output, 1))


def _refuse_beside(record: Record, fields: Sequence[str], why: str, advice: str) -> None:
    for field in fields:
        if record.get(field) not in (None, "", [], ()):
            raise UserError(
                f"{record.place(field)}: {why}, so there is no place for it. {advice}, or leave it out: data.columns: "
                f"{{{field}: null}}"
            )


def _history(record: Record) -> tuple[Message, ...]:
    value, place = record.get("history"), record.place("history")
    if value is None or value == "":
        return ()
    expected = "a list of [question, answer]"
    turns = items(value, place, expected)
    if _is_messages(turns):
        return read_messages(turns, place)
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        pair = items(turn, f"{place}, turn {number}", "[question, answer]")
        if len(pair) != 2:
            raise UserError(f"{place}, turn {number}: got {len(pair)} texts, expected [question, answer]")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text(said, f"{place}, turn {number}")})
    return tuple(messages)


# ------------------------------------------------------------------------------------------------------- no format


def _no_format(record: Record) -> UserError:
    """What is missing of the format that the row comes nearest to."""
    if record.has("chosen") or record.has("rejected"):
        return _preferences(record)
    asked = [field for field in PROMPTS if field in record.names]
    responded = [field for field in RESPONSES if field in record.names]
    for field in (*asked, *responded, "messages", "conversations", "text"):
        if record.is_null(field):
            return UserError(f"{record.place(field)} is null or an empty cell, expected text")
    missing, wanted = "no row format is whole", [*PROMPTS, *RESPONSES, "messages", "conversations", "text"]
    if asked and not responded:
        partner = dict(PAIRS)[asked[0]]
        missing, wanted = f"field '{partner}' is missing, the response", [partner, *RESPONSES]
    elif responded and not asked:
        partner = next(prompt for prompt, response in PAIRS if response == responded[0])
        missing, wanted = f"field '{partner}' is missing, the prompt", [partner, *PROMPTS]
    # "input" is no misspelt "instruction"; a field of ours is never offered for another.
    others = [name for name in record.names if name not in FIELDS]
    hint = next(filter(None, (nearest(name, wanted) for name in others)), "")
    example = f"{{{wanted[0]}: {others[0][:80] if others else 'NAME'}}}"
    if (taken := record.column("teacher_prefix")) in FIELDS:  # it is for the teacher, unless the user says otherwise
        example = f"{{{taken}: {taken}}}, where what the teacher alone reads is more besides"
    return UserError(
        f"{record.where}: {missing}; found the columns {record.found()}, expected {ROW_FORMAT}.{hint} Columns of other "
        f"names are given by data.columns, such as {example}"
    )


def _preferences(record: Record) -> UserError:
    ours = "completion"
    if record.has("conversations") or not any(record.has(field) for field in PROMPTS):
        ours = "messages"
    elif not record.has("prompt"):
        ours = dict(PAIRS)[next(field for field in PROMPTS if record.has(field))]
    advice = f"Train on the chosen responses: data.columns: {{{ours}: chosen}}"
    if record.has("conversations"):
        advice = "Append the chosen response to the conversation"
    return UserError(
        f"{record.where}: this is a preference set (found the columns {record.found()}), expected one response a row. "
        f"{advice}"
    )
