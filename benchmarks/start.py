"""How long whole processes take: the command's help, a look at a model, a small merge; beside Python and torch.

    python benchmarks/start.py --repeats 15

Contenders take turns. The quickest of each is what a quiet machine takes; ratios are of times of one repeat.
"""

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from decouple_merge.storage.shipped import find_model
from interleaved import interleaved, ratios

DEME = [sys.executable, "-m", "decouple_merge.cli"]
NOTHING, TORCH = "python -c pass", "python -c 'import torch'"
# What is wanted of a whole process, in seconds.
WANTED = {"deme --help": 0.3, "deme info": 0.5, "deme merge": 2.0}


def main() -> None:
    """Time the processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--base", default="fashion-ddpm")
    arguments = parser.parse_args()
    base = str(find_model(arguments.base))
    with tempfile.TemporaryDirectory() as folder:
        merged = [base, base, "--weights", "0.5", "--out"]
        commands = {
            NOTHING: [sys.executable, "-c", "pass"],
            TORCH: [sys.executable, "-c", "import torch"],
            "deme --help": [*DEME, "--help"],
            "deme info": [*DEME, "info", base],
            "deme merge": [*DEME, "merge", *merged, str(Path(folder) / "merged")],
        }
        run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        seconds = interleaved({name: partial(run, words) for name, words in commands.items()}, arguments.repeats)
    print("process | quickest, s | median, s | wanted, s | / python -c pass | / import torch")
    for name, found in seconds.items():
        print(
            f"{name} | {min(found):.2f} | {median(found):.2f} | {WANTED.get(name, '')} | "
            f"{ratios(found, seconds[NOTHING])} | {ratios(found, seconds[TORCH])}"
        )


if __name__ == "__main__":
    main()
