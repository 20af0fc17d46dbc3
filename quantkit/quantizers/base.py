"""What a quantization method is: the protocol, the statistics it may ask for, and the registry of methods.

A method sees some linears of one block at a time as float weights and input statistics, and returns neutral results. It never
packs, writes or loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.layouts.base import Neutral
from quantkit.method_facts import METHODS, MethodFacts
from quantkit.scheme import LinearScheme

ENTRY_POINT_GROUP = "quantkit.quantizers"
FLOAT, QUANTIZED = "float", "quantized"


@dataclass(frozen=True, slots=True)
class InputStats:
    """What calibration saw at the input of a linear, over ``tokens`` tokens.

    ``gram [K, K]`` float32 is X^T X, ``abs_sum [K]`` float32 the sum and ``abs_max [K]`` the greatest of \\|x\\|.
    ``cross [K, K]`` is X^T Y where Y are the inputs that the float model has in place of X, for a method that asks for it.
    ``borrowed``: too few tokens reached this linear, and these are the statistics of all tokens of its layer.
    """

    gram: Tensor
    abs_sum: Tensor
    abs_max: Tensor
    tokens: int
    cross: Tensor | None = None
    borrowed: bool = False

    def on(self, device: str) -> InputStats:
        """These statistics on ``device``."""
        gram, cross = self.gram.to(device), None if self.cross is None else self.cross.to(device)
        return replace(self, gram=gram, abs_sum=self.abs_sum.to(device), abs_max=self.abs_max.to(device), cross=cross)

    @property
    def peak(self) -> float:
        """The greatest \\|x\\|."""
        return float(self.abs_max.max())


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Linears of one block as float32, all or some: ``linears`` role -> [N, K], ``biases`` role -> [N].

    ``norms`` role -> stored weight, ``norm_biases`` role -> bias of a LayerNorm; empty when only some linears are given.
    """

    layer: int
    linears: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    norm_dtypes: Mapping[str, Any]
    """Role -> torch dtype in which the norm is stored: a folded scale must survive that rounding."""
    linear_dtypes: Mapping[str, Any] = field(default_factory=dict)
    """Role -> torch dtype in which the weight is stored."""
    norm_biases: Mapping[str, Tensor] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu",)
    """Where a method may work (``devices.spread``). All tensors lie on the first, and so must its results."""


@dataclass(frozen=True, slots=True)
class BlockFit:
    """What a method made of linears. A role is in ``results`` or, when it is kept and had to change, in ``linears``."""

    results: Mapping[str, Neutral]
    linears: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    norm_biases: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Role -> JSON data for the manifest: what the method chose and the error it measured."""


class Quantizer(Protocol):
    """A quantization method, built with its validated options."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]:
        """Input statistics that calibration must gather: of "range", "gram", "cross"; empty for none."""

    @property
    def inputs(self) -> str:
        """Whose activations they are: FLOAT, the model's own, for a whole block at once; or QUANTIZED, those of the model as quantized
        so far, for one group of linears after the other, each result put in its place before the next."""

    def fit(self, block: BlockWeights, stats: Mapping[str, InputStats], schemes: Mapping[str, LinearScheme], spec: ModelSpec) -> BlockFit:
        """Quantize the linears of ``block`` whose scheme is not to keep them. ``stats`` is by role, empty when ``needs`` is.

        Raises InputError for weights that the method cannot represent.
        """


class QuantizerFactory(Protocol):
    """What the registry and the entry points hold."""

    def __call__(self, options: Mapping[str, Any]) -> Quantizer:
        """Validate ``options`` (the recipe's own section; unknown keys are an InputError) and build the method."""


@dataclass(frozen=True, slots=True)
class Method:
    """One registered method and where it comes from ("built-in" or the distribution of its entry point)."""

    name: str
    summary: str
    facts: MethodFacts
    origin: str
    factory: QuantizerFactory


def built_in(name: str, summary: str, factory: QuantizerFactory) -> Method:
    """A method of quantkit's own, whose facts are in ``method_facts.METHODS``."""
    return Method(name, summary, METHODS[name], "built-in", factory)


def methods() -> dict[str, Method]:
    """Every method by name: the built-in ones, then those of the entry-point group ``quantkit.quantizers``.

    Raises InputError when an entry point takes a name that exists.
    """
    from quantkit.quantizers import awq, gptq, rtn, w8a8

    found = {method.name: method for method in (rtn.METHODS[0], awq.METHOD, gptq.METHOD, *rtn.METHODS[1:], w8a8.METHOD)}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        try:
            method = point.load()
        except (ImportError, AttributeError) as exc:
            raise InputError(
                f"entry point {point.name}",
                f"cannot be loaded ({exc!s:.200})",
                "an installed method",
                f"pip uninstall what brings {point.value}",
            ) from exc
        if not isinstance(method, Method):
            raise InputError(f"entry point {point.name}", f"is a {type(method).__name__}", "a quantkit.quantizers.base.Method")
        if method.name in found:
            raise InputError(f"entry point {point.name}", f"method {method.name!r} is already registered", "another name")
        found[method.name] = replace(method, origin=point.dist.name if point.dist else point.value)
    return found


def method(name: str) -> Method:
    """The method called ``name``. Raises InputError when there is none."""
    found = methods()
    if name not in found:
        raise InputError("--method", f"{name!r} is unknown", f"one of {', '.join(found)}")
    return found[name]


def refuse_unknown_options(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise InputError when a recipe sets an option that the method does not have."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"options of {name}", f"unknown option {unknown[0]!r}", f"one of {', '.join(known)}" if known else "no options")


def choice(name: str, options: Mapping[str, Any], key: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    """Option ``key``, one of ``allowed``. Raises InputError for any other value."""
    value = options.get(key, default)
    if not any(value == known and type(value) is type(known) for known in allowed):
        shown = ", ".join(str(known).lower() if isinstance(known, bool) else str(known) for known in allowed)
        raise InputError(f"options of {name}: {key}", f"is {value!r:.100}", f"one of {shown}")
    return value


def number(name: str, options: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    """Option ``key``, a number from ``low`` to ``high``, whole when the default is. Raises InputError for anything else."""
    value, whole = options.get(key, default), isinstance(default, int)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise InputError(f"options of {name}: {key}", f"is {value!r:.100}", f"a {'whole ' if whole else ''}number from {low:g} to {high:g}")
    return value
