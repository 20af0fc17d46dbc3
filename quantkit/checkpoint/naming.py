"""Tensors of a checkpoint under the names of the architecture table: what others stack, leave out or call otherwise.

A view: nothing is read, and every tensor is still a range of bytes of its file. Knows names, shapes and offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import architecture_of, spec_for
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.checkpoint.reader import TensorRef


def named(config: Mapping[str, Any], refs: dict[str, TensorRef], where: str) -> dict[str, TensorRef]:
    """``refs`` under the names of the table; as they are for an architecture that it does not have.

    Raises InputError for stacked experts of a shape other than ``config`` says, and for a tensor that is there twice.
    """
    arch = architecture_of(config)
    if arch is None:
        return refs
    bare = f"{arch.embedding.removeprefix(arch.prefix)}.weight"
    if bare in refs and not any(name.startswith(arch.prefix) for name in refs):
        whole = {name: name if name.startswith(f"{arch.head}.") else arch.prefix + name for name in refs}
        refs = {whole[name]: replace(ref, name=whole[name]) for name, ref in refs.items()}
    stacked = () if arch.experts is None else tuple(module for module, _ in arch.experts.stacked)
    ends = (*stacked, *(f"{module}.weight" for module in arch.renamed))
    if not any(name.endswith(ends) for name in refs):
        return refs
    return _in_blocks(spec_for(config), refs, where)


def _in_blocks(spec: ModelSpec, refs: Mapping[str, TensorRef], where: str) -> dict[str, TensorRef]:
    """``refs`` with the modules of each block renamed and its stacked experts apart."""
    arch = spec.architecture
    stacked: dict[str, tuple[int, tuple[str, ...]]] = {}
    renamed: dict[str, str] = {}
    for layer in range(spec.layers):
        renamed |= {f"{spec.tensor(layer, other)}.weight": f"{spec.tensor(layer, own)}.weight" for other, own in arch.renamed.items()}
        if arch.experts is not None and spec.moe is not None and spec.moe.sparse[layer]:
            stacked |= {spec.tensor(layer, module): (layer, roles) for module, roles in arch.experts.stacked}
    found: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        views: Iterable[TensorRef] = (replace(ref, name=renamed.get(name, name)),)
        if name in stacked:
            views = _experts(spec, *stacked[name], ref, where)
        for view in views:
            if view.name in found or (view.name != name and view.name in refs):
                raise InputError(where, f"holds {view.name!r:.200} and, in {name!r:.200}, the same once more", "every tensor once")
            found[view.name] = view
    return found


def _experts(spec: ModelSpec, layer: int, roles: tuple[str, ...], ref: TensorRef, where: str) -> Iterable[TensorRef]:
    """The tensors of each expert in ``ref [E, rows of all roles, K]``, which holds the rows of ``roles`` one after the other."""
    assert spec.moe is not None
    shapes = [spec.linear_shape(role.format(expert=0)) for role in roles]
    want = spec.moe.experts, sum(n for n, _ in shapes), shapes[0][1]
    if ref.shape != want:
        raise InputError(f"{where}: {ref.name}", f"has shape {list(ref.shape)}", f"{list(want)} from config.json, the experts stacked")
    item, offset = ref.nbytes // (want[0] * want[1] * want[2]), ref.offset
    for expert in range(spec.moe.experts):
        for role, (n, k) in zip(roles, shapes, strict=True):
            name = spec.tensor(layer, spec.linears[role.format(expert=expert)].name) + ".weight"
            yield replace(ref, name=name, shape=(n, k), offset=offset, nbytes=n * k * item)
            offset += n * k * item
