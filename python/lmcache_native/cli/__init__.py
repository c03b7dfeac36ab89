"""The command `lmcache-native`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lmcache_native import __version__
from lmcache_native.cli import clear, config, doctor, inspect, verify, vllm_check

_DESCRIPTION = "KV-cache offload for LLM serving engines: GPU, pinned host memory and NVMe behind one native store."


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 when a command found problems, or 2 when what was given is wrong."""
    parser = argparse.ArgumentParser(prog="lmcache-native", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"lmcache-native {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    config.add_to(commands)
    doctor.add_to(commands)
    inspect.add_to(commands)
    verify.add_to(commands)
    clear.add_to(commands)
    vllm_check.add_to(commands)
    chosen = parser.parse_args(arguments)
    if not hasattr(chosen, "run"):
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(chosen.run(chosen))
    except BrokenPipeError:
        # The reader has seen enough. Python must not try again at exit.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("lmcache-native: interrupted\n")
        return 130
