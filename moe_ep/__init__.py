"""mxfp4 mixture-of-experts with expert parallelism.

The names below are imported when they are first used, so that a login node can read the torch-free
parts (`moe_ep.shape`, `moe_ep.placement`, `moe_ep.spec`) without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_ep.fused import fused_moe_mxfp4
    from moe_ep.layer import MoELayer
    from moe_ep.selector import explain_selection, select_backend
    from moe_ep.spec import MoELayerSpec, Mxfp4Config

__all__ = ["MoELayer", "MoELayerSpec", "Mxfp4Config", "explain_selection", "fused_moe_mxfp4", "select_backend"]

_HOME = {
    "MoELayer": "moe_ep.layer",
    "MoELayerSpec": "moe_ep.spec",
    "Mxfp4Config": "moe_ep.spec",
    "explain_selection": "moe_ep.selector",
    "fused_moe_mxfp4": "moe_ep.fused",
    "select_backend": "moe_ep.selector",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_ep' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
