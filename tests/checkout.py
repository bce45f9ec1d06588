"""The checkout, for processes that the tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


def importable(*folders: Path | str) -> dict[str, str]:
    """The PYTHONPATH with which a process imports this checkout, before what the tests themselves were given."""
    paths = [str(ROOT), *map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
