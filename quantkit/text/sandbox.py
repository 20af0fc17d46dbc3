"""Jinja templates as attacker code: rendered from plain data to text, within limits on time, size and reach.

A chat template comes with the weights, so whoever made the model wrote it. Jinja's immutable sandbox keeps a template from
Python's internals; this module adds what it leaves open:

- reach: only filters, globals and methods of plain values that are listed here exist;
- size: whatever can make a value larger than what it was given asks a meter first (operators, ``~``, literals, slices,
  macros, filters, methods), and the meter also counts what was made, so what it holds stays within some hundred megabytes;
- time: a trace function, set for this thread and this call alone, stops the template at the next line or call once it
  has used SECONDS of processor time. What runs between two lines is a single operation on values that the meter bounds.

The limits are on processor time of the thread, not on the clock, so a busy machine does not refuse a good template. A debugger or
coverage tool that traces this thread does not see inside the template.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import types
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from quantkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 1.0
ALLOWANCE = 8_000_000
"""Characters, and elements of lists, that one rendering may make, besides 64 for each of its input."""
MAX_TEMPLATE = 256 << 10
MAX_FORMAT = 10_000
"""Characters of a format string; each of its fields may be 9,999 wide."""
MAX_BITS = 4096
FILE_NAME = "<template>"
CHECK_EVERY = 32

FILTERS = (
    "abs", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format", "groupby",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "slice", "sort", "string", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
STR_METHODS = frozenset((
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill",
))  # fmt: skip
METHODS: Mapping[type, frozenset[str]] = {
    str: STR_METHODS,
    list: frozenset({"count", "index", "copy"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    int: frozenset(),
    float: frozenset({"is_integer"}),
    bytes: frozenset(),
    type: frozenset(),
}
_WIDE = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{")
"""A format that is five digits wide, or takes its width from an argument."""


class _Refused(BaseException):
    """A template went over a limit. No Exception: Jinja swallows some of those."""


class _Meter:
    """What one rendering has used."""

    def __init__(self, allowance: int) -> None:
        self._left, self._end, self._events = allowance, time.thread_time() + SECONDS, 0

    def check(self) -> None:
        """Refuse a template whose time is up."""
        if time.thread_time() > self._end:
            raise _Refused("takes too long")

    def afford(self, amount: float) -> None:
        """Refuse a value of ``amount`` characters or elements before it is made."""
        if amount > self._left:
            raise _Refused("makes too much text or too long a list")

    def spend(self, value: Any) -> Any:
        """Count ``value``, which was just made, and pass it on."""
        size = len(value) if isinstance(value, (str, bytes)) else self.weigh(value) if isinstance(value, (list, tuple, dict)) else 1
        self.afford(size)
        self._left -= size
        return value

    def weigh(self, value: Any, *, text: bool = False) -> int:
        """Elements of ``value`` and all in it, as often as they are met: [x, x] is twice x. With ``text`` characters count as well.

        What is too heavy is refused, so what can be met later is not: equality, sorting, printing and copying walk all of it.
        """
        total, todo = 0, [value]
        while todo:
            item = todo.pop()
            total += 1
            if not total % 50_000:
                self.check()
            if isinstance(item, str):
                total += len(item) if text else 0
            elif isinstance(item, dict):
                todo += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, KeysView, ValuesView, ItemsView)):
                todo += item
            if total + len(todo) > self._left:
                self.afford(math.inf)
        return total

    def watch(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        """The trace function: lines of the template, and calls of everything."""
        self._events += 1
        if not self._events % CHECK_EVERY:
            self.check()
        return self.watch if frame.f_code.co_filename == FILE_NAME else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self.watch)
        try:
            yield
        finally:
            sys.settrace(before)


class _Generator(CodeGenerator):
    """Sends what Jinja compiles to bare Python expressions through the environment, so that the meter sees it."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.text((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _metered(self, node: nodes.Expr, frame: Frame, write: Callable[[Any, Frame], None]) -> None:
        self.write("environment.spend(")
        write(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._metered(node, frame, super().visit_List)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._metered(node, frame, super().visit_Dict)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._metered(node, frame, super().visit_Tuple)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        self._metered(node, frame, super().visit_Getitem)


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class _Sandbox(ImmutableSandboxedEnvironment):
    """One rendering's environment: cheap to make, since templates are compiled once and their code is kept."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, meter: _Meter) -> None:
        # Constant folding would run filters while compiling, where a cached result would hide what they cost.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], optimized=False, cache_size=0)
        self.meter = meter
        self.spend = meter.spend
        self.finalize = self._printable
        guarded = {name: self._guarded(name, self.filters[name]) for name in FILTERS}
        self.filters = {**guarded, "tojson": self._tojson}
        self.globals = {
            "range": safe_range,
            "dict": lambda *args, **kwargs: meter.spend(dict(*args, **kwargs)),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(self._checked_format(form)),
        }

    def concat(self, parts: Iterable[str]) -> str:
        """The output of a template, macro or ``{% set %}`` block."""
        pieces = list(parts)
        self.meter.afford(sum(map(len, pieces)))
        text: str = self.meter.spend("".join(pieces))
        return text

    def text(self, parts: tuple[Any, ...]) -> str:
        """``a ~ b``."""
        return self.concat([str(self._printable(part)) for part in parts])

    def _printable(self, value: Any) -> Any:
        if not isinstance(value, str):
            self.meter.afford(self.meter.weigh(value, text=True))
        return value

    def _checked_format(self, form: Any, *args: Any) -> Any:
        """A format string whose result is bounded."""
        if not isinstance(form, str) or len(form) > MAX_FORMAT or _WIDE.search(form):
            raise _Refused("uses a format that is very wide, or whose width is not written in it")
        fields = form.count("%") + form.count("{")
        self.meter.afford(len(form) + fields * (9999 + self.meter.weigh(list(args), text=True)))
        return form

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "%" and isinstance(left, str):
            self._checked_format(left, right)
        elif operator == "*" and not numbers:
            sized, count = (left, right) if hasattr(left, "__len__") else (right, left)
            if isinstance(count, int):
                self.meter.afford(self.meter.weigh(sized, text=isinstance(sized, str)) * max(count, 0))
        elif operator == "+" and not numbers:
            self.meter.afford(sum(len(side) for side in (left, right) if hasattr(side, "__len__")))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + (0 if operator == "**" else right.bit_length())
            if bits > MAX_BITS:
                raise _Refused("computes with very large numbers")
        return self.meter.spend(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja declares it
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = __self._method_arguments(owner, __obj.__name__, args, kwargs)
        elif getattr(__obj, "__wrapped__", None) is not None and isinstance(getattr(__obj.__wrapped__, "__self__", None), str):
            __self._checked_format(__obj.__wrapped__.__self__, *args, *kwargs.values())  # str.format, as the sandbox wraps it
        return __self.meter.spend(super().call(__context, __obj, *args, **kwargs))

    def _method_arguments(self, text: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a str method, once its result is known to be affordable."""
        if method in ("center", "ljust", "rjust", "zfill") and args:
            self.meter.afford(_count(args[0]))
        elif method == "replace" and len(args) >= 2:
            self._afford_replace(text, args[0], args[1])
        elif method == "join" and args:
            parts = list(args[0])
            self.meter.afford(len(text) * len(parts) + self.meter.weigh(parts, text=True))
            return (parts, *args[1:])
        return args

    def _afford_replace(self, text: str, old: Any, new: Any) -> None:
        old, new = str(old), str(new)
        self.meter.afford(len(text) + text.count(old) * len(new))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without the HTML escapes of Jinja's own filter, as chat templates expect."""
        steps = _count(indent or 0) + sum(len(str(s)) for s in separators or ())
        weight = self.meter.weigh(value, text=True)
        self.meter.afford(weight * 6 + weight * steps * 8)
        text: str = self.meter.spend(
            json.dumps(value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys))
        )
        return text

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that asks the meter before and tells it after."""
        takes_context = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            given = list(args[1:] if takes_context else args)
            if given:
                given[0] = self._before(name, given[0], tuple(given[1:]), kwargs)
            lead = args[:1] if takes_context else ()
            return self.meter.spend(function(*lead, *given, **kwargs))

        return guarded

    def _before(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value to give to filter ``name``, once its result is known to be affordable."""
        afford, every = self.meter.afford, (*args, *kwargs.values())
        numbers = [_count(item) for item in every if isinstance(item, int)]
        if name in ("center", "batch", "slice"):
            afford(max(numbers, default=0))
        elif name == "round":
            if any(abs(number) > 100 for number in numbers):
                raise _Refused("rounds to very many digits")
        elif name == "indent":
            text = str(value)
            width = max([len(item) for item in every if isinstance(item, str)] + numbers, default=4)
            afford(len(text) + (1 + text.count("\n")) * width)
        elif name == "replace":
            given = [*args, *(kwargs[key] for key in ("old", "new") if key in kwargs)]
            if len(given) >= 2:
                self._afford_replace(str(self._printable(value)), given[0], given[1])
        elif name == "join":
            value = list(value)
            afford(self.meter.weigh(value, text=True) + len(value) * self.meter.weigh(list(every), text=True))
        elif name == "format":
            self._checked_format(value, *every)
        elif name == "sum":
            if not all(isinstance(item, (int, float)) or item is None for item in every if not isinstance(item, str)):
                raise _Refused("sums something else than numbers")
        elif name in ("string", "escape", "e", "safe", "title", "capitalize", "upper", "lower", "trim", "wordcount", "truncate"):
            self._printable(value)
        return value


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may have a member called self
        for name in dict(*args[1:], **kwargs):
            _check_member(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_member(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"  # Jinja's shows the members, and theirs, without end


def _check_member(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r:.100}")


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateRuntimeError(str(message))


def _count(value: Any) -> int:
    """A number of characters or rounds that a template gave; what is none fails where it is used."""
    return int(value) if isinstance(value, int) else 0


@lru_cache(maxsize=16)
def _compiled(source: str) -> types.CodeType:
    """The code of a template: the same in every sandbox. Compiling is metered as rendering is."""
    meter = _Meter(ALLOWANCE)
    sandbox = _Sandbox(meter)
    with meter.watching():
        code: types.CodeType = sandbox.compile(source, name=None, filename=FILE_NAME)
    return code


def render(source: str, values: Mapping[str, Any], where: str) -> str:
    """The text that the template ``source`` makes of ``values`` (plain JSON-like data).

    Raises InputError, blaming ``where``, when the template is no template, raises an error, or goes over a limit.
    """
    if len(source) > MAX_TEMPLATE:
        raise InputError(where, f"is {len(source)} characters long", f"at most {MAX_TEMPLATE}")
    meter = _Meter(math.ceil(1e12))
    meter = _Meter(ALLOWANCE + 64 * meter.weigh(dict(values), text=True))
    sandbox = _Sandbox(meter)
    try:
        template = jinja2.Template.from_code(sandbox, _compiled(source), dict(sandbox.globals))
        context = template.new_context(dict(values))
        pieces, total = [], 0
        with meter.watching():
            for piece in template.root_render_func(context):
                total += len(piece)
                meter.afford(total)
                pieces.append(piece)
        return "".join(pieces)
    except _Refused as exc:
        raise InputError(
            where, f"the chat template {exc}", f"at most {SECONDS:g} s of processor time and {ALLOWANCE} characters of work"
        ) from exc
    except jinja2.TemplateSyntaxError as exc:
        raise InputError(where, f"line {exc.lineno}: {exc.message}", "a Jinja template") from exc
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as exc:
        raise InputError(where, f"the chat template refuses these messages ({exc!s:.300})", "messages that it accepts") from exc
    except (SyntaxError, MemoryError) as exc:
        raise InputError(where, f"is too deeply nested or too large ({type(exc).__name__})", "a chat template") from exc
