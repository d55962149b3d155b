"""Sets the platform in the name of the wheel, because the wheel contains native programs, and adds files."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Folders with files that the programs have written (scripts/wheel.sh), and the folders of an environment for them.
SHARED = {
    "man": "share/man/man1",
    "bash": "share/bash-completion/completions",
    "zsh": "share/zsh/site-functions",
    "fish": "share/fish/vendor_completions.d",
}


class Platform(BuildHookInterface):
    """Marks the wheel as usable with any Python 3 and with this machine's C library. A wheel for other C libraries must
    be built in a manylinux image.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        # Hatch leaves folders out that git ignores, so each file is named.
        made = (Path(self.root) / "../target/wheel").resolve()
        for folder, place in SHARED.items():
            for file in sorted((made / folder).iterdir()):
                build_data["shared_data"][str(file)] = f"{place}/{file.name}"
        # The licence files lie outside of this folder, where `license-files` of the project cannot name them.
        metadata = f"{self.metadata.name.replace('-', '_')}-{self.metadata.version}.dist-info"
        for file in ("../LICENSE", "../target/wheel/THIRD-PARTY-LICENSES.txt"):
            source = (Path(self.root) / file).resolve()
            build_data["force_include"][str(source)] = f"{metadata}/licenses/{source.name}"
