"""Plans that do not depend on the machine or the day."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.config import load
from launcher.plan import Plan, make_plan
from tests.checkout import CONFIGS

ENVIRON = {"SCRATCH": "/scratch/user"}


def fixed_plan(name: str, overrides: Sequence[str] = ()) -> Plan:
    """The plan of configs/NAME.yaml, as if made in /scratch/user from a checkout in /home/user/moe-ep."""
    config = load(CONFIGS / f"{name}.yaml", ["run.folder=/scratch/user/runs", *overrides], ENVIRON)
    plan = make_plan(config, "20260101-000000-abcd", ["launcher", "submit", f"configs/{name}.yaml"])
    return replace(plan, code_root=Path("/home/user/moe-ep"), git_revision="0" * 40)
