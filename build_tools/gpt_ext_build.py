"""PEP 517 backend: setuptools, compiling against the torch that is already installed.

Front ends build in isolation, where the user's torch is out of sight. This backend looks for it in
the environments that the build may be for, and asks for torch as a build requirement only where
none is new enough. `-C torch-python=PYTHON` or GPT_EXT_TORCH_PYTHON names the environment outright.
"""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # what needs no torch is setuptools' own
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None

NEEDED = (2, 11)
PROBE = """
import importlib.metadata, importlib.util, json, sysconfig
folder = importlib.util.find_spec("torch").submodule_search_locations[0]
version = importlib.metadata.version("torch")
print(json.dumps([folder, version, sysconfig.get_config_var("SOABI")]))
"""


class SiteFinder:
    """Last-resort importer of one site-packages folder.

    On sys.path itself the folder would also switch on its setuptools plug-ins.
    """

    def __init__(self, site: str) -> None:
        self.site = site

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        return importlib.machinery.PathFinder.find_spec(name, path or [self.site], target)


def candidate_pythons() -> Iterator[str]:
    """The interpreters that the build may be for; uv hides its own, so .venv here comes last."""
    yield sys.executable
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            yield os.path.join(prefix, "bin", "python")
    yield os.path.abspath(os.path.join(".venv", "bin", "python"))


def find_torch(python: str) -> tuple[str, str] | None:
    """(site-packages, version) of that interpreter's torch, if this build can use it."""
    try:
        # -E: without the front end's PYTHONPATH, and so not isolated.
        answer = subprocess.run(
            [python, "-E", "-c", PROBE],
            cwd=os.path.expanduser("~"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        folder, version, soabi = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None
    new_enough = tuple(map(int, version.split(".")[:2])) >= NEEDED
    if not new_enough or soabi != sysconfig.get_config_var("SOABI"):
        return None
    return os.path.dirname(folder), version


def provide_torch(settings: Settings) -> bool:
    """Makes a torch importable and says which. False if there is none to be had."""
    if importlib.util.find_spec("torch"):  # no isolation, or installed because we asked
        return True
    chosen = (settings or {}).get("torch-python") or os.environ.get("GPT_EXT_TORCH_PYTHON")
    for python in [chosen] if chosen else candidate_pythons():
        if found := find_torch(python):
            site, version = found
            sys.meta_path.append(SiteFinder(site))
            print(f"gpt_ext: building against torch {version} in {site}", file=sys.stderr)
            return True
    if chosen:
        raise SystemExit(f"gpt_ext: no torch >= 2.11 for this Python in {chosen}")
    return False


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [] if provide_torch(config_settings) else ["torch>=2.11"]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    provide_torch(config_settings)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    provide_torch(config_settings)
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
