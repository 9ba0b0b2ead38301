"""main_text2image.py with few candidate formats for --target_bits, so that their codebooks take seconds to train."""

from unittest import mock

import main_text2image


def main(words: list[str]) -> None:
    small = {"MEASURED": {4: (3, 6), 2: (4, 6)}, "USUAL": (4, 6), "LARGEST": 7}
    with mock.patch.multiple("vqdm.jobs.menu", **small):
        main_text2image.main(words)
