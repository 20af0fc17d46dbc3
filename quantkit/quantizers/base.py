"""What a quantization method is: the protocol, the statistics it may ask for, and the registry of methods.

A method sees one block at a time as float weights and input statistics, and returns neutral results. It never packs,
writes or loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.layouts.base import GroupedInt
from quantkit.scheme import LinearScheme

ENTRY_POINT_GROUP = "quantkit.quantizers"


@dataclass(frozen=True, slots=True)
class InputStats:
    """What calibration saw at the input of a linear, over ``tokens`` tokens of the unquantized model.

    ``gram [K, K]`` float32 is X^T X, ``abs_sum [K]`` float32 is the sum of \\|x\\|, ``peak`` the greatest \\|x\\|.
    """

    gram: Tensor
    abs_sum: Tensor
    tokens: int
    peak: float


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One block as float32: ``linears`` role -> [N, K], ``biases`` role -> [N], ``norms`` role -> stored weight."""

    layer: int
    linears: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    norm_dtypes: Mapping[str, Any]
    """Role -> torch dtype in which the norm is stored: a folded scale must survive that rounding."""


@dataclass(frozen=True, slots=True)
class BlockFit:
    """What a method made of a block. A role is in ``results`` or, when it is kept and had to change, in ``linears``."""

    results: Mapping[str, GroupedInt]
    linears: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON data for the manifest: what the method chose and the error it measured."""


class Quantizer(Protocol):
    """A quantization method, built with its validated options."""

    name: str
    needs: frozenset[str]
    """Empty, or {"gram"}: which input statistics calibration must gather."""

    def fit(self, block: BlockWeights, stats: Mapping[str, InputStats], schemes: Mapping[str, LinearScheme], spec: ModelSpec) -> BlockFit:
        """Quantize one block. ``stats`` is by linear role and empty when ``needs`` is.

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
    layouts: tuple[str, ...]
    origin: str
    factory: QuantizerFactory


def methods() -> dict[str, Method]:
    """Every method by name: the built-in ones, then those of the entry-point group ``quantkit.quantizers``.

    Raises InputError when an entry point takes a name that exists.
    """
    from quantkit.quantizers import awq, rtn

    found = {method.name: method for method in (rtn.METHOD, awq.METHOD)}
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
