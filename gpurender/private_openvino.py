"""OpenVINO, imported so that it tells nobody: by itself it reports each use to its maker's statistics, and a program
waits at its end where a firewall swallows that."""

import sys
import threading
from typing import Any

TELEMETRY = "openvino_telemetry"
_modules: dict[str, Any] = sys.modules
_before = _modules.get(TELEMETRY)
_modules[TELEMETRY] = None  # not to be imported: OpenVINO goes on without
try:
    import openvino
    import openvino.opset13 as opset
    from openvino import passes, preprocess
finally:
    del _modules[TELEMETRY]
    if _before is not None:
        _modules[TELEMETRY] = _before

PREPARING = threading.RLock()
"""Held by whoever reads, rewrites or compiles networks: where two threads do, each may wait for ever for what the other
holds, Python's lock and one of OpenVINO's own (seen)."""

__all__ = ["PREPARING", "openvino", "opset", "passes", "preprocess"]
