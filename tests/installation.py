"""Copies of the installed package, for tests of what a broken one does."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import xla_ops

_SITE = pathlib.Path(xla_ops.__file__).parent.parent


class Installation:
    """A copy of xla_ops as pip installs it, in `folder`, to take pieces out of."""

    def __init__(self, folder: pathlib.Path):
        self.site = folder
        for path in (_SITE / "xla_ops", *_SITE.glob("xla_ops-*.dist-info")):
            shutil.copytree(path, folder / path.name)
        for name in ("xla_ops_pjrt.py", "xla_ops_vllm.py"):
            shutil.copy(_SITE / name, folder)

    @property
    def package(self) -> pathlib.Path:
        return self.site / "xla_ops"

    @property
    def lib(self) -> pathlib.Path:
        return self.package / "lib"

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs Python with this copy in place of the installation."""
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        rest = [p for p in path if p and pathlib.Path(p).resolve() != _SITE.resolve()]
        return subprocess.run(
            [sys.executable, *arguments],
            check=False,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(self.site), *rest]),
                **environ,
            },
        )
