"""One logger tree, `lmcache_native`, readable inside any engine's log. `LMCACHE_LOG_LEVEL` sets its level."""

from __future__ import annotations

import logging
import os

ROOT = "lmcache_native"
FORMAT = "[%(asctime)s] lmcache_native %(levelname)s: %(message)s (%(filename)s:%(lineno)d)"


def get_logger(name: str) -> logging.Logger:
    """A logger below `lmcache_native`. The first call gives the tree a handler, unless the application did.

    Engines configure their own tree and leave the root without a handler, so without one of ours INFO would be lost.
    """
    root = logging.getLogger(ROOT)
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(handler)
        root.propagate = False
        level = os.environ.get("LMCACHE_LOG_LEVEL", "INFO").upper()
        known = isinstance(logging.getLevelName(level), int)
        root.setLevel(level if known else logging.INFO)
        if not known:
            root.warning("LMCACHE_LOG_LEVEL=%r: must be DEBUG, INFO, WARNING, ERROR or CRITICAL; using INFO", level)
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")
