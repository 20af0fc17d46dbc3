"""verify: is a checkpoint, artifact or shard directory what its config, manifest and hashes say it is?

The shallow checks read headers and hash files, without torch; the deep ones unpack values, one linear at a time
(``formats.md`` section 14). What can be opened and is wrong is a defect; what cannot be opened is an InputError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import fs
from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.artifact import INDEX, MANIFEST, MANIFEST_SCHEMA, SUMS, SUMS_LIMIT, parse_sums
from quantkit.checkpoint.reader import EXTRA_FILES, Checkpoint, open_checkpoint, read_manifest, resolve_path
from quantkit.errors import CheckFailed, InputError
from quantkit.geometry import FLOAT_LAYOUTS, FLOATS, Geometry
from quantkit.plan import EMBEDDING, HEAD, embedding_geometry, quantized_size, stored_linears
from quantkit.progress import Progress, silent
from quantkit.quant_config import is_kept, leaves_out, stored_assignment
from quantkit.scheme import Assignment, assignment_to_json
from quantkit.shard import open_rank, parent_sha256, rank_file, read_plan
from quantkit.slices import Stored, fused_name

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.layouts.base import Codebook, GroupedInt, Scaled, SuperBlock

LOADED = (*EXTRA_FILES, "*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.py")
"""A file of these names that no hash vouches for could change what a loader makes of the directory; any other is harmless."""
F16_MAX, F16_NORMAL = 65504.0, 2.0**-14
FUSED = (("q", "k", "v"), ("gate", "up"))
"""Roles that GPU runtimes multiply as one matrix: stored alike, or not at all loadable there."""


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong, found by the check called ``check``."""

    check: str
    where: str
    what: str
    expected: str | None = None

    @property
    def line(self) -> str:
        return f"{self.where}: {self.what}" + (f", expected {self.expected}" if self.expected else "")


@dataclass(slots=True)
class Verification:
    """What verify found. ``checks`` maps each check that ran to what it looked at."""

    kind: str
    tensors: int = 0
    tensor_bytes: int = 0
    unpacked: int = 0
    checks: dict[str, str] = field(default_factory=dict)
    defects: list[Defect] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor as the model needs it; ``shape`` None: its length depends on its content. ``optional``: it may be absent."""

    shape: tuple[int, ...] | None
    dtypes: frozenset[str]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored linear: its roles (several when it is fused), module path and whole geometry."""

    roles: tuple[str, ...]
    path: str
    geometry: Geometry


def _linears(spec: ModelSpec, assignment: Assignment) -> list[_Stored]:
    """Every stored linear, a head of its own and a quantized embedding included. Raises InputError as a layout does."""
    return [_Stored(*item) for item in stored_linears(spec, assignment, dtype="BF16")]


def expected_tensors(spec: ModelSpec, assignment: Assignment) -> dict[str, Expected]:
    """Every tensor of a whole model by name. Raises InputError when a layout cannot hold the shape of a linear."""
    arch, found = spec.architecture, dict[str, Expected]()
    hidden, vocab = spec.dims["hidden"].elements, spec.dims["vocab"].elements
    widths = {"hidden": hidden, "head": spec.head_dim}
    if embedding_geometry(spec, assignment, dtype="BF16") is None:
        found[f"{arch.embedding}.weight"] = Expected((vocab, hidden), FLOATS)
    if spec.position_table is not None:
        found[f"{spec.position_table}.weight"] = Expected((spec.max_positions, hidden), FLOATS)
    for linear in _linears(spec, assignment):
        for part in linear.geometry.parts:
            # What is kept in floats may be of any float dtype: BF16 above stands for all of them.
            shape = None if part.free else linear.geometry.stored_shape(part)
            found[f"{linear.path}.{part.suffix}"] = Expected(shape, FLOATS if part.kept else frozenset({part.dtype}))
    for suffix in spec.norm_parts:
        for layer in range(spec.layers):
            for norm in spec.norms.values():
                found[f"{spec.tensor(layer, norm.name)}.{suffix}"] = Expected((widths[norm.width],), FLOATS)
        found[f"{arch.final_norm}.{suffix}"] = Expected((hidden,), FLOATS)
    if spec.tied:
        found[f"{arch.head}.weight"] = Expected((vocab, hidden), FLOATS, optional=True)
    return found


def tensor_defects(
    spec: ModelSpec, stored: Mapping[str, Stored], expected: Mapping[str, Expected], dtype: Callable[[str], str]
) -> Iterator[Defect]:
    """What is missing, not of this model, or of another shape or dtype; ``dtype`` gives that of a stored tensor."""
    for name, want in expected.items():
        if name not in stored:
            if not want.optional:
                shape = "" if want.shape is None else f" {list(want.shape)}"
                yield Defect("tensors", name, "is missing", f"{' or '.join(sorted(want.dtypes))}{shape}")
        elif want.shape is not None and tuple(stored[name].shape) != want.shape:
            yield Defect("tensors", name, f"has shape {list(stored[name].shape)}", f"{list(want.shape)} from config.json")
        elif dtype(name) not in want.dtypes:
            yield Defect("tensors", name, f"is {dtype(name)}", " or ".join(sorted(want.dtypes)))
    for name in sorted(set(stored) - set(expected)):
        if not spec.ignores(name):
            yield Defect("tensors", name, "is no tensor of this model as config.json describes it", "only tensors that the model uses")


def verify(path: str | Path, *, deep: bool, progress: Progress = silent) -> Verification:
    """Check a checkpoint directory, artifact, shard directory, GGUF file or ``pkg:NAME``; ``deep`` unpacks values as well.

    Raises InputError for what cannot be opened: no such model, headers or indexes that are not what they say, hostile names.
    """
    root = resolve_path(path)
    manifest = read_manifest(root)
    if manifest is not None and manifest.get("kind") == "shards":
        return _verify_shards(root, deep, progress)
    checkpoint = open_checkpoint(path)
    spec = spec_for(checkpoint.config)
    assignment = stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    stored_bytes = sum(ref.nbytes for ref in checkpoint.tensors.values())
    kind = "GGUF file" if checkpoint.kind == "gguf" else "checkpoint" if manifest is None else str(manifest.get("kind", "artifact"))
    found = Verification(kind, len(checkpoint.tensors), stored_bytes)
    found.checks["headers"] = f"{len({ref.file for ref in checkpoint.tensors.values()})} files"
    if checkpoint.kind == "hf":
        _check_hashes(root, manifest is not None, found, progress)
    fits = _check_tensors(checkpoint, spec, assignment, found)
    _check_config(checkpoint, spec, assignment, found)
    if manifest is not None:
        _check_manifest(manifest, checkpoint, spec, assignment, found)
    if deep and fits:
        packed = {item.path: item.geometry for item in _linears(spec, assignment) if item.geometry.layout not in FLOAT_LAYOUTS}
        _check_values(checkpoint, packed, _symmetric(manifest), "", found, progress)
    return found


def _check_hashes(root: Path, promised: bool, found: Verification, progress: Progress) -> None:
    """Every file of the directory against SHA256SUMS; ``promised``: an artifact has one."""
    path = fs.confined(root, SUMS, str(root))
    if not path.exists():
        if promised:
            found.checks["hashes"] = "none"
            found.defects.append(Defect("hashes", SUMS, "is missing", "the hashes of every file of the artifact"))
        else:
            found.warnings.append(f"no {SUMS}: nothing says what the bytes of this checkpoint should be")
        return
    sums = parse_sums(fs.read_bytes(path, SUMS_LIMIT), str(path))
    found.checks["hashes"] = f"{len(sums)} files"
    for done, (name, digest) in enumerate(sorted(sums.items())):
        progress("hash", done, len(sums))
        file = fs.confined(root, name, str(path))
        if not file.is_file():
            found.defects.append(Defect("hashes", name, "is missing", f"a file of sha256 {digest[:12]}..."))
        elif (actual := fs.sha256_file(file)) != digest:
            found.defects.append(Defect("hashes", name, f"was changed: its sha256 is {actual[:12]}...", f"{digest[:12]}..."))
    progress("hash", len(sums), len(sums))
    for name in sorted({entry.name for entry in root.iterdir()} - set(sums) - {SUMS}):
        if any(fnmatchcase(name, pattern) for pattern in LOADED):
            found.defects.append(Defect("hashes", name, f"is not in {SUMS}", "only files that were written with the artifact"))
        else:
            found.warnings.append(f"{name!r:.200} is not in {SUMS}; nothing that loads a model reads it")


def _check_tensors(checkpoint: Checkpoint, spec: ModelSpec, assignment: Assignment, found: Verification) -> bool:
    """Names, dtypes and shapes against config.json; False when no layout fits it, so that nothing more can be said."""
    try:
        expected = expected_tensors(spec, assignment)
    except InputError as exc:
        found.defects.append(Defect("tensors", exc.where, exc.what, exc.expected))
        found.checks["tensors"] = "no layout fits config.json"
        return False
    found.defects += tensor_defects(spec, checkpoint.tensors, expected, checkpoint.dtype)
    found.checks["tensors"] = f"{len(checkpoint.tensors)} names, dtypes and shapes"
    if checkpoint.kind != "hf":
        return True
    used = {ref.file.name for ref in checkpoint.tensors.values()}
    strays = sorted(path.name for path in checkpoint.root.glob("*.safetensors") if path.name not in used)
    found.warnings += [f"{name!r:.200} is beside the checkpoint and not part of it" for name in strays]
    if (checkpoint.root / INDEX).is_file() and used == {"model.safetensors"}:
        found.warnings.append(f"{INDEX} is not used: model.safetensors is there")
    return True


def _check_config(checkpoint: Checkpoint, spec: ModelSpec, assignment: Assignment, found: Verification) -> None:
    """config.json against the files: what it says is not converted, and linears that runtimes multiply as one."""
    quant = checkpoint.config.get("quantization_config")
    if not quant:
        return
    found.checks["config"] = f"quant_method {quant.get('quant_method')}"
    if quant.get("quant_method") == "awq" and quant.get("zero_point", True) is not True:
        found.defects.append(
            Defect("config", "config.json: quantization_config.zero_point", "is not true", "true: the layout stores zeros")
        )
    if not any(not is_kept(scheme) for scheme in assignment.values()):
        found.defects.append(Defect("config", "config.json: quantization_config", "is there, and no linear is quantized", "packed linears"))
    for layer in range(spec.layers):
        for path, roles in spec.block_modules(layer).items():
            try:
                listed = leaves_out(quant, path)
            except InputError as exc:
                found.defects.append(Defect("config", exc.where, exc.what, exc.expected))
                return
            if listed != is_kept(assignment[path]) and spec.linears[roles[0]].quantize:
                what = "is packed, and the config leaves it out" if listed else "is not packed, and the config does not leave it out"
                found.defects.append(Defect("config", path, what, "config.json and files that agree"))
    found.warnings += mixed_siblings(spec, assignment)


def mixed_siblings(spec: ModelSpec, assignment: Assignment) -> list[str]:
    """A warning for each kind of fused linears of which some are quantized and some are not."""
    warnings = []
    for roles in FUSED:
        layouts = [
            {path: assignment[path].layout for role, path in spec.block_linears(n).items() if role in roles} for n in range(spec.layers)
        ]
        mixed = [layer for layer, found in enumerate(layouts) if len(set(found.values())) > 1]
        if mixed:
            names = "/".join(path.rpartition(".")[2] for path in layouts[mixed[0]])
            warnings.append(f"block {mixed[0]}: some of {names} are quantized and some are not; vLLM and SGLang fuse them and refuse that")
    return warnings


def _check_manifest(
    manifest: Mapping[str, Any], checkpoint: Checkpoint, spec: ModelSpec, assignment: Assignment, found: Verification
) -> None:
    """quantkit.json against config.json and the files."""
    found.checks["manifest"] = f"schema {manifest.get('schema')!r:.20}"

    def defect(key: str, what: str, expected: str) -> None:
        found.defects.append(Defect("manifest", f"{MANIFEST}: {key}", what, expected))

    if manifest.get("schema") != MANIFEST_SCHEMA:
        defect("schema", f"is {manifest.get('schema')!r:.50}", str(MANIFEST_SCHEMA))
        return
    stated = manifest.get("assignment")
    if stated is None and manifest.get("kind") != "artifact":
        return
    if not isinstance(stated, dict) or not all(isinstance(scheme, dict) for scheme in stated.values()):
        defect("assignment", "is missing or malformed", "how each linear is stored")
        return
    actual = assignment_to_json(assignment)
    for name in sorted({*stated, *actual}):
        if name not in stated or name not in actual:
            defect("assignment", f"{'lacks' if name in actual else 'has'} {name!r:.200}", "the linears of config.json")
            continue
        # A checkpoint does not say which method made it, nor whether it is symmetric: values do.
        # Manifests of earlier versions do not state the dtype of scales.
        for key in ("layout", "bits", "group_size", *(("scale_dtype",) if "scale_dtype" in stated[name] else ())):
            if stated[name].get(key) != actual[name][key]:
                defect("assignment", f"{name}: {key} is {stated[name].get(key)!r:.50}", f"{actual[name][key]!r} as in the files")
    totals = manifest.get("totals")
    if isinstance(totals, dict):
        try:
            _, weights, packed = quantized_size(spec, assignment)
        except InputError:
            return  # reported with the tensors
        for key, value in (("bytes_after", found.tensor_bytes), ("quantized_weights", weights), ("quantized_bytes", packed)):
            if key in totals and totals[key] != value:
                defect(f"totals.{key}", f"is {totals[key]!r:.50}", f"{value} as in the files")


def _symmetric(manifest: Mapping[str, Any] | None) -> frozenset[str]:
    """The linears that the manifest calls symmetric."""
    stated = (manifest or {}).get("assignment")
    if not isinstance(stated, dict):
        return frozenset()
    return frozenset(name for name, scheme in stated.items() if isinstance(scheme, dict) and scheme.get("sym") is True)


def _verify_shards(root: Path, deep: bool, progress: Progress) -> Verification:
    """A shard directory: hashes, and every rank's file against the stored plan."""
    plan, manifest = read_plan(root), read_manifest(root)
    found = Verification("shards")
    _check_hashes(root, True, found, progress)
    try:
        found.checks["parent"] = f"sha256 {parent_sha256(root) or 'not recorded'}"
    except (CheckFailed, InputError) as exc:
        found.checks["parent"] = "not what was recorded"
        found.defects.append(Defect("parent", exc.where, exc.what, exc.expected))
    found.checks["ranks"] = f"{plan.tp} files against the stored plan"
    for rank in range(plan.tp):
        try:
            checkpoint, _, assignment = open_rank(root, rank)
        except InputError as exc:
            found.defects.append(Defect("ranks", exc.where, exc.what, exc.expected))
            continue
        found.tensors += len(checkpoint.tensors)
        found.tensor_bytes += sum(ref.nbytes for ref in checkpoint.tensors.values())
        if deep:
            spec = spec_for(checkpoint.config)
            packed = {}
            for item in _linears(spec, assignment):
                for role in item.roles if item.geometry.layout not in FLOAT_LAYOUTS else ():
                    n, k = plan.cut(role, rank)
                    n = plan.rows(rank) if role in (EMBEDDING, HEAD) else n
                    first = 0 if role in (HEAD, EMBEDDING) else spec.rows(role).start
                    cut = item.geometry.cut(range(n.start + first, n.stop + first), k)
                    packed[item.path if len(item.roles) == 1 else f"{item.path}@{role}"] = cut
            _check_values(checkpoint, packed, _symmetric(manifest), f"{rank_file(rank, plan.tp)}: ", found, progress)
    return found


def _part_name(path: str, suffix: str) -> str:
    """The tensor of one part; ``path`` may end in "@role", as parts of fused linears are named in a rank's file."""
    module, _, role = path.partition("@")
    return fused_name(module, suffix, role, not role)


def _fits(checkpoint: Checkpoint, path: str, geometry: Geometry) -> bool:
    """Whether every part of the linear at ``path`` is stored as its layout says."""
    for part in geometry.parts:
        ref = checkpoint.tensors.get(_part_name(path, part.suffix))
        if ref is None or (not part.kept and ref.dtype != part.dtype):
            return False
        if not part.free and ref.shape != geometry.stored_shape(part):
            return False
    return True


def _check_values(
    checkpoint: Checkpoint, packed: Mapping[str, Geometry], symmetric: frozenset[str], prefix: str, found: Verification, progress: Progress
) -> None:
    """Unpack every linear of ``packed`` (module path -> geometry, or a rank's part of it), and look at every float."""
    from quantkit.layouts.base import GroupedInt, SuperBlock
    from quantkit.layouts.registry import codec
    from quantkit.ops.dtypes import as_bytes, as_tensor

    held: set[str] = set()
    for done, (path, geometry) in enumerate(packed.items()):
        progress("values", done, len(packed))
        names = {part.suffix: _part_name(path, part.suffix) for part in geometry.parts}
        held |= {name for suffix, name in names.items() if suffix != "bias"}
        if not geometry.n or not geometry.k or not _fits(checkpoint, path, geometry):
            continue  # a rank that owns nothing; or reported with the tensors
        parts = {}
        for part in geometry.parts:
            value = as_tensor(checkpoint.read(names[part.suffix]), checkpoint.dtype(names[part.suffix]))
            parts[part.suffix] = value if part.free else value.reshape(geometry.shape(part))
        try:
            result = codec(geometry.layout).unpack(parts, geometry)
        except InputError as exc:
            found.defects.append(Defect("values", f"{prefix}{path}.{exc.where}", exc.what, exc.expected))
            continue
        found.unpacked += 1
        if isinstance(result, SuperBlock):
            _check_blocks(prefix + path, result, found)
            continue
        if not isinstance(result, GroupedInt):
            _check_scales(prefix + path, result, geometry, found)
            continue
        defects = len(found.defects)
        _check_linear(prefix + path, result, path.partition("@")[0] in symmetric, geometry, found)
        if geometry.layout == "gptq":
            _check_v1(prefix + path, result, geometry, found)
        if len(found.defects) > defects:
            continue
        again = codec(geometry.layout).pack(result, geometry)
        for suffix, stored in parts.items():
            if as_bytes(again[suffix]) != as_bytes(stored):
                where = f"{prefix}{path}.{suffix}"
                found.defects.append(Defect("values", where, "does not pack again to the same bytes", "bytes of the layout"))
    progress("values", len(packed), len(packed))
    for name, ref in checkpoint.tensors.items():
        if name not in held and checkpoint.dtype(name) in FLOATS and ref.nbytes:
            _check_floats(prefix + name, as_tensor(checkpoint.read(name), checkpoint.dtype(name)), found)
    found.checks["values"] = f"{found.unpacked} packed linears unpacked, floats finite"


def _check_blocks(where: str, result: SuperBlock, found: Verification) -> None:
    """The scales and offsets of blocks: finite."""
    from quantkit.ops.ggml.decode import infinite_blocks

    bad = infinite_blocks(result.blocks, result.kind)
    if bad:
        found.defects.append(Defect("values", where, f"{bad} blocks have a scale that is not finite", "finite scales"))


def _check_scales(where: str, result: Codebook | Scaled, geometry: Geometry, found: Verification) -> None:
    """The scales of a linear of 8 bits, or of a codebook: finite, and not negative unless they were quantized themselves."""
    from quantkit.layouts.base import Codebook

    scales = (result.absmax if isinstance(result, Codebook) else result.scales).float()
    # Double quantization moves a scale by up to a step of its own, which takes one near 0 below it.
    negative = (scales < 0) & (not geometry.scheme.double_quant)
    bad = int((~scales.isfinite() | negative).sum())
    if bad:
        found.defects.append(Defect("values", where, f"{bad} scales are negative or not finite", "finite scales"))
    values = result.codes if isinstance(result, Codebook) else result.values
    if bool((values.float() == values.reshape(-1)[0].float()).all()):
        found.defects.append(Defect("values", where, "every code is the same", "codes that differ"))


def _check_v1(where: str, result: GroupedInt, geometry: Geometry, found: Verification) -> None:
    """The label of the zero points (``formats.md`` 2.2): v1 stores one less, and no writer of v1 can store a zero point of 0."""
    top, middle = 2**result.bits - 1, 2 ** (result.bits - 1)
    over = int((result.zeros > top).sum())
    if over:
        found.warnings.append(f"{where}.qzeros: {over} stored fields are {top}, which v1 writers make of a zero point of 0 in two ways")
    if geometry.scheme.sym and bool((result.zeros == middle + 1).all()):
        what = f"every stored field is {middle}, as gptq_v2 stores symmetric zero points"
        found.defects.append(Defect("values", f"{where}.qzeros", what, f"{middle - 1}, or checkpoint_format gptq_v2"))


def _check_linear(where: str, result: GroupedInt, sym: bool, geometry: Geometry, found: Verification) -> None:
    """The values of one packed linear: ``codes [N, K]``, ``scales [N, G]``, ``zeros [N, G]``."""
    codes, scales, zeros = result.codes, result.scales.float(), result.zeros
    import torch

    top, middle = 2**result.bits - 1, 2 ** (result.bits - 1)

    def defect(part: str, bad: Tensor, what: str, expected: str) -> None:
        count = int(bad.sum())
        if count:
            found.defects.append(Defect("values", f"{where}{part}", f"{count} {what}", expected))

    defect(".scales", ~scales.isfinite(), "scales are not finite", "finite scales")
    defect(".scales", scales <= 0, "scales are not positive", "positive scales")
    defect(
        ".scales",
        (scales == F16_MAX) & (result.scales.dtype == torch.float16),
        f"scales are {F16_MAX:.0f}, the last float16",
        "scales that did not saturate",
    )
    if geometry.layout != "gptq":
        defect(".qzeros", zeros > top, "zero points are out of range", f"0 to {top}")
    if result.g_idx is not None and geometry.whole == (geometry.n, geometry.k):
        uneven = torch.bincount(result.g_idx.long(), minlength=scales.shape[1]) != geometry.k // scales.shape[1]
        defect(".g_idx", uneven, "groups are not used as often as they are long", f"{geometry.k // scales.shape[1]} inputs in each")
    if sym:
        defect(".qzeros", zeros != middle, f"zero points are not {middle}", f"{middle} everywhere: the manifest says symmetric")
    if result.bias is not None:
        defect(".bias", ~result.bias.isfinite(), "values are not finite", "a finite bias")
    if result.g_idx is not None:
        codes = codes[:, result.g_idx.argsort(stable=True)]
    if codes.shape[1] % scales.shape[1]:
        return  # a rank's share of scattered groups
    groups = codes.reshape(codes.shape[0], scales.shape[1], -1)  # [N, G, g]
    if bool((groups == zeros.unsqueeze(-1)).all()):
        found.defects.append(Defect("values", where, "every weight is zero", "a linear that does something"))
        return
    if bool((codes == codes[0, 0]).all()):
        found.defects.append(Defect("values", where, f"every code is {int(codes[0, 0])}", "codes that differ"))
        return
    flat = groups.amin(-1) == groups.amax(-1)  # [N, G]
    if groups.shape[-1] > 1 and bool(flat.any()):
        found.warnings.append(f"{where}: {int(flat.sum())} of {flat.numel()} groups hold one code only")
    tiny = (scales > 0) & (scales < F16_NORMAL) & ~flat
    if bool(tiny.any()):
        found.warnings.append(f"{where}: {int(tiny.sum())} scales are subnormal float16, which loses precision")


def _check_floats(where: str, value: Tensor, found: Verification) -> None:
    bad = value.numel() - int(value.isfinite().sum())
    if bad:
        found.defects.append(Defect("values", where, f"{bad} values are not finite", "finite values"))
    elif value.dim() > 1 and not bool(value.any()):
        found.warnings.append(f"{where}: every value is zero")
