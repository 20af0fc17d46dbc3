"""``quantkit verify``: hashes, headers, layout and, when asked, values of a checkpoint, an artifact or its shards."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.progress import Progress, silent
from quantkit.report import Report, Table
from quantkit.verify import verify

SHOWN_DEFECTS = 50


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """Options of ``quantkit verify``."""

    path: str
    deep: bool = False


def run(options: VerifyOptions, progress: Progress = silent) -> Report:
    """Verify ``options.path``. A defect makes the report a failure; what cannot be opened raises InputError."""
    found = verify(options.path, deep=options.deep, progress=progress)
    by_check = {name: [defect for defect in found.defects if defect.check == name] for name in found.checks}
    rows = tuple((name, f"{len(by_check[name])} defects" if by_check[name] else "ok", detail) for name, detail in found.checks.items())
    tables = [Table("Checks", ("check", "result", "looked at"), rows)]
    if found.defects:
        shown = tuple((defect.check, defect.where, defect.what, defect.expected or "") for defect in found.defects[:SHOWN_DEFECTS])
        tables.append(Table("Defects", ("check", "where", "what", "expected"), shown))
    warnings = list(found.warnings)
    if len(found.defects) > SHOWN_DEFECTS:
        warnings.append(f"{len(found.defects) - SHOWN_DEFECTS} more defects are not shown; --json has them all")
    failed = None
    if found.defects:
        more = f" (and {len(found.defects) - 1} more)" if len(found.defects) > 1 else ""
        failed = f"{found.defects[0].line}{more}"
    return Report(
        command="verify",
        data={
            "path": options.path,
            "kind": found.kind,
            "deep": options.deep,
            "ok": not found.defects,
            "tensors": found.tensors,
            "tensor_bytes": found.tensor_bytes,
            "checks": [{"check": name, "defects": len(by_check[name]), "looked_at": detail} for name, detail in found.checks.items()],
            "defects": [{"check": d.check, "where": d.where, "what": d.what, "expected": d.expected} for d in found.defects],
            "warnings": list(found.warnings),
        },
        facts=(
            ("path", options.path),
            ("kind", found.kind),
            ("tensors", f"{found.tensors}, {found.tensor_bytes / 1e6:.1f} MB"),
            ("values", "unpacked and checked" if options.deep else "not looked at (--deep unpacks them)"),
        ),
        tables=tuple(tables),
        warnings=tuple(warnings),
        failed=failed,
    )
