"""Run a script as on a machine with two GPUs: python tests/emulated/run_emulated.py SCRIPT ARGS..."""

import runpy
import sys
from pathlib import Path

import emulated_cuda

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0:1] = [str(Path(sys.argv[0]).resolve().parent)]
    emulated_cuda.install()
    runpy.run_path(sys.argv[0], run_name="__main__")
