"""Which settings of a program a run reads: one that it does not read has no effect, and must say what it needs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from unittest.mock import patch

from vqdm.config import all_settings, inner, unmet_needs

# Functions that look at every setting, whatever it does: checks, records, copies.
EVERYWHERE = ("__post_init__", "check_fields", "image_pairs", "_check_codes", "to_dict", "generate_command", "replace")


def counts(frame, kinds: tuple[type, ...]) -> bool:
    """Whether a read is the program's own: not of a function above, nor of a comparison (compiled from a string)."""
    while frame.f_code.co_filename.endswith(("dataclasses.py", "copy.py")) and frame.f_code.co_name != "replace":
        frame = frame.f_back
    its_own = isinstance(frame.f_locals.get("self"), kinds) or "self" not in frame.f_locals
    return not (frame.f_code.co_name in EVERYWHERE and its_own) and frame.f_code.co_filename != "<string>"


@contextmanager
def settings_read(kind: type, read: set[str]) -> Iterator[None]:
    """Adds to `read` the names of the flags whose values are read inside, but for checks and records of all of them."""
    switches = {one.name: one.metadata["switch"] for one in fields(kind) if "switch" in one.metadata}
    kinds = [kind, *inner(kind).values()]
    kinds += [part for held in kinds[1:] for part in inner(held).values()]

    def noted(self, name):
        if counts(sys._getframe(1), tuple(kinds)):
            read.add(switches.get(name, name))
        return object.__getattribute__(self, name)

    patches = [patch.object(one, "__getattribute__", noted, create=True) for one in kinds]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def undeclared(parser, words: list[str], read: set[str]) -> set[str]:
    """Flags that a run of these words neither read nor declares to be without effect."""
    values = vars(parser.parse_intermixed_args(words))
    return {one.name for _, one in all_settings(parser.kind)} - read - set(unmet_needs(parser.kind, values))
