"""Write the prompt files of the small pipeline, from splits that share no scene with training or with each other.

    python assets/make/write_prompts.py --out prompts

Deterministic: the same files, byte for byte, on every machine.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from scenes import Scene, caption, sample_split

COUNTS = {"calibration": 512, "evaluation": 256, "test": 512}


def file_name(split: str) -> str:
    return f"shapes_{split}.csv"


def prompt_scenes(split: str) -> list[Scene]:
    """The scenes of a split's prompts, in the file's order."""
    return sample_split(split, COUNTS[split], seed=1)


def write(split: str, folder: Path) -> None:
    """One line a scene: its caption, how many things it has, and their place or relation."""
    rng = random.Random(f"prompts-{split}")
    with open(folder / file_name(split), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "things", "layout"))
        for scene in prompt_scenes(split):
            writer.writerow((caption(scene, rng), len(scene.things), scene.layout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("prompts"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        write(split, options.out)


if __name__ == "__main__":
    main()
