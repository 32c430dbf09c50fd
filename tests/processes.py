"""Programs in processes of their own."""

import os
import subprocess
import sys


def told_by_seeds(program):
    """What a program prints under each of two values of PYTHONHASHSEED, by lines."""
    told = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    return [each.splitlines() for each in told]
