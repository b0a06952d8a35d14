"""A chat template is a program of a stranger. It is tried once, where every step is counted, before it is let loose.

The sandbox that transformers renders it in keeps it from files and from Python, and bounds neither time nor memory:
``'a' * 10**10`` takes 10 GB, and that already while it is compiled. Here the same template runs on a few small
conversations in a sandbox whose operators, calls, loops and filters cost something. What it does only for other
conversations is not seen.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, cast

from jinja2 import ext, nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from dts_hf.errors import UserError

#: Characters of a template, and what one conversation may cost: characters and items that are made, and 100 for a step. A
#: real template costs some ten thousand. LARGEST bounds what a single operation can make of its operands.
LONGEST, BUDGET, STEP, LARGEST = 500_000, 20_000_000, 100, 4_000_000
_WIDTH = re.compile(r"%[^A-Za-z%]*\d{6}|\{[^{}]*\d{6}")  # '%999999999d', '{:999999999}'
_TURNS: list[dict[str, Any]] = [{"role": role, "content": "word"} for role in ("system", "user", "assistant", "user")]
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_GIVEN = {"documents": None, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_PROBES: tuple[dict[str, Any], ...] = (
    {"messages": _TURNS[1:2], "add_generation_prompt": True, "tools": None},
    {"messages": _TURNS[:3], "add_generation_prompt": False, "tools": None},
    {"messages": _TURNS, "add_generation_prompt": True, "tools": [_TOOL]},
)


class _Excess(BaseException):
    """Too much of something; no ``Exception``, which jinja would take for a constant that it cannot fold."""


@functools.lru_cache(maxsize=32)
def check_limits(template: str) -> None:
    """Refuse a chat template that would run for ever or fill the memory.

    Whatever else it raises is left to the render, which knows the conversation.

    Args:
        template: the source.

    Raises:
        UserError: it is too long, or a small conversation takes too much.
    """
    if len(template) > LONGEST:
        raise UserError(
            f"the tokenizer's chat template has {len(template):,} characters, expected at most {LONGEST:,}"
        )
    for probe in _PROBES:
        try:
            sandbox = _Counting()
            for text in sandbox.from_string(template).generate(**_GIVEN, **probe):
                sandbox.charge(text)
        except _Excess as error:
            raise UserError(
                f"the tokenizer's chat template takes far too long or too much memory ({error}) for a conversation of "
                f"{len(probe['messages'])} short messages. Mend chat_template.jinja (or chat_template in "
                "tokenizer_config.json) in the tokenizer's folder, or use data.prompt_template: plain"
            ) from None
        except Exception:  # see above
            continue


class _Generation(ext.Extension):
    """``{% generation %}``: here its body alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return cast("list[nodes.Node]", parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Counting(ImmutableSandboxedEnvironment):
    """Names and options as transformers has them, and a budget."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols], finalize=self._printed
        )
        self.left = BUDGET
        self.filters["tojson"] = _to_json
        self.filters = {name: self._charged(filter_) for name, filter_ in self.filters.items()}
        self.filters[_LOOP] = self._counted
        self.globals |= {"raise_exception": _fail, "strftime_now": lambda text: datetime.now().strftime(text)}
        self.globals["lipsum"] = self._filler

    def charge(self, *values: Any) -> None:
        """Pay for a step on ``values``, and for what it can make of them.

        Raises:
            _Excess: nothing is left, or one step could make too much.
        """
        sizes = [self._size(value) for value in values]
        self.left -= STEP + sum(size for size, value in zip(sizes, values, strict=True) if not isinstance(value, int))
        # Nothing that Jinja has makes more of its operands than the product of two: replace, join, indent, *
        if math.prod(sorted(sizes)[-2:]) > LARGEST:
            raise _Excess("one step makes too much")
        if self.left < 0:
            raise _Excess("too many steps")

    def _size(self, value: Any) -> int:
        """What a value can be multiplied by, or what it holds: of a list in lists all that would be written out."""
        if isinstance(value, int):
            return abs(value)
        if not isinstance(value, str | range | list | tuple | set | dict):
            return 0
        total, waiting = 0, [value]
        while waiting and total <= LARGEST:
            item = waiting.pop()
            if isinstance(item, str | range):
                total += len(item)
            else:
                # No Mapping: the context of a template, which some filters are given, is one
                inside = [*item.keys(), *item.values()] if isinstance(item, dict) else item
                waiting += inside if isinstance(inside, list | tuple | set) else []
                total += 10
        return total

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As the sandbox does it, within the budget."""
        if operator in ("*", "**"):
            self.charge(left, right)
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                self.charge(left.bit_length() * right * 1000)  # its bits: nobody writes a number of thousands
        else:
            if operator == "%":
                _check_format(left)
            for side in (left, right):  # one after the other: a sum is no product
                self.charge(None if isinstance(side, int) else side)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """As the sandbox does it, within the budget."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        owner = owner if isinstance(owner, str | list | tuple | dict) else None
        if getattr(obj, "__name__", "") in ("format", "format_map"):
            _check_format(owner)
        self.charge(owner, *args, *kwargs.values())
        result = super().call(context, obj, *args, **kwargs)
        self.charge(None if isinstance(result, int) else result)
        return result

    def _charged(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter_)  # with the mark that it wants the context
        def counted(*args: Any, **kwargs: Any) -> Any:
            if filter_.__name__ == "do_format":
                _check_format(args[0])
            self.charge(*args, *kwargs.values())
            result = filter_(*args, **kwargs)
            self.charge(None if isinstance(result, int) else result)
            return result

        return counted

    def _counted(self, items: Iterable[Any]) -> list[Any]:
        """What a loop goes over; each turn costs a step."""
        listed = []
        for item in items:
            self.charge()
            listed.append(item)
        return listed

    def _printed(self, value: Any) -> Any:
        self.charge(None if isinstance(value, int) else value)
        return value

    def _filler(self, *_: Any, **__: Any) -> str:
        raise _Excess("lipsum, which is of no use in a conversation")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        tree = cast(nodes.Template, _Counted(self).visit(tree))
        tree.set_environment(self)
        return tree


_LOOP, _JOIN = "dts_hf_counted", "join"


class _Counted(NodeTransformer):
    """Loops and ``~`` pass the budget, and constants are folded within it: transformers' sandbox does so unasked."""

    def __init__(self, sandbox: _Counting) -> None:
        self.sandbox = sandbox

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _LOOP, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, _JOIN, [], [], None, None, lineno=node.lineno)

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        node = super().generic_visit(node, *args, **kwargs)
        if not isinstance(node, nodes.BinExpr) or node.operator not in self.sandbox.intercepted_binops:
            return node
        try:
            operands = [side.as_const(nodes.EvalContext(self.sandbox)) for side in (node.left, node.right)]
            value = self.sandbox.call_binop(None, node.operator, *operands)
        except Exception:
            return node
        return nodes.Const(value, lineno=node.lineno)


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDTH.search(text):
        raise _Excess("a number of that width")


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _fail(message: str) -> None:
    raise TemplateError(message)
