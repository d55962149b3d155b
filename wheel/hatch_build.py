"""Sets the platform in the name of the wheel, because the wheel contains native programs."""

from __future__ import annotations

import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Platform(BuildHookInterface):
    """Marks the wheel as usable with any Python 3 and with this machine's C library. A wheel for other C libraries must
    be built in a manylinux image.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
