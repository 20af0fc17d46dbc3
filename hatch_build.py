"""Wheels that carry the library of CUDA kernels in kernels/build are for one platform. QUANTKIT_BUILD_KERNELS=1 builds it there first."""

import os
import sys
from pathlib import Path
from sysconfig import get_platform
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if version == "editable":
            return
        sys.path.insert(0, str(root))
        from quantkit.ops.cuda_library import build_library, library_name

        library = root / "kernels" / "build" / library_name()
        if os.environ.get("QUANTKIT_BUILD_KERNELS") == "1" and not library.is_file():
            build_library(library.parent)
        if library.is_file():
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{get_platform().replace('-', '_').replace('.', '_')}"
