"""Write the calibration prompts for real models: a grammar of scenes and finishes, expanded at random.

    python assets/make/write_calibration_prompts.py --out prompts

Deterministic: the same file, byte for byte, on every machine. The phrases are in prompt_grammar.yaml.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

GRAMMAR = Path(__file__).with_name("prompt_grammar.yaml")
FILE, COUNT = "calibration.csv", 5040
# Scenes of one category whose words overlap more than this (Jaccard index) count as the same.
ALIKE = 0.7
TRIES = 20

_SLOT = re.compile(r"\{(\^?)(a |s )?(\w+)\}")
_SAID_WITH_AN = re.compile(r"(?i)(?!eu|uni|one|use|ut)[aeiou]|hour|honest")
_IRREGULAR = {"die": "dice", "mouse": "mice", "goose": "geese", "calf": "calves", "loaf": "loaves", "leaf": "leaves"}
_IRREGULAR |= {"wolf": "wolves", "foot": "feet", "child": "children", "ox": "oxen", "person": "people"}
_UNCHANGED = ("fish", "deer", "sheep", "moose", "bison", "salmon", "koi", "squid", "swordfish", "elk", "alga")
_UNCHANGED += ("anglerfish", "clownfish", "pufferfish", "sunfish", "starfish", "cuttlefish", "jellyfish", "goldfish")


@dataclass
class Writer:
    """Expands a grammar; `used` holds the phrases of the prompt at hand, so that none appears twice in it."""

    words: dict[str, list[str]]
    rng: random.Random
    used: set[str] = field(default_factory=set)

    def pick(self, phrases: list[str]) -> str:
        """One that is new to this prompt, where there is one; `random()` is the draw that Python promises to keep."""
        fresh = [phrase for phrase in phrases if phrase not in self.used] or phrases
        phrase = fresh[int(self.rng.random() * len(fresh))]
        self.used.add(phrase)
        return phrase

    def fill(self, phrase: str, **given: str) -> str:
        """The phrase with every slot filled, from `given` or the words."""

        def replace(slot: re.Match) -> str:
            capital, form, name = slot.groups()
            text = given[name] if name in given else self.fill(self.pick(self.words[name]))
            text = {"a ": with_article, "s ": plural, None: str}[form](text)
            return text[0].upper() + text[1:] if capital else text

        return _SLOT.sub(replace, phrase)


def with_article(phrase: str) -> str:
    return f"{'an' if _SAID_WITH_AN.match(phrase) else 'a'} {phrase}"


def plural(phrase: str) -> str:
    """The plural of a noun with its adjectives; of "cat with blue eyes", that of "cat"."""
    head, link, rest = re.match(r"(.+?)( with .*| of .*|$)()", phrase).groups()
    before, space, noun = head.rpartition(" ")
    return f"{before}{space}{_plural_noun(noun)}{link}{rest}"


def _plural_noun(noun: str) -> str:
    if noun in _UNCHANGED:
        return noun
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if re.search(r"(s|x|z|ch|sh)$", noun) else f"{noun}s"


def content(scene: str) -> frozenset[str]:
    """Words that tell scenes apart."""
    return frozenset(re.findall(r"[a-z']{3,}", scene.lower())) - {"the", "and", "with", "from", "its"}


def alike(first: frozenset[str], second: frozenset[str]) -> bool:
    return len(first & second) > ALIKE * len(first | second)


def prompts(grammar: dict, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, category), the categories in turn; no scene of a category is like another."""
    writer = Writer(grammar["words"], random.Random(seed))
    seen: dict[str, list[frozenset[str]]] = {name: [] for name in grammar["categories"]}
    written = []
    for number in range(count):
        category = list(seen)[number % len(seen)]
        scene = new_scene(writer, grammar["scenes"][category], seen[category])
        finish = writer.pick(grammar["finishes"][grammar["categories"][category]])
        written.append((writer.fill(finish, scene=scene), category))
    return written


def new_scene(writer: Writer, templates: list[str], seen: list[frozenset[str]]) -> str:
    """A scene unlike those seen, which it joins; each template has its turn, and the next one where it is used up."""
    for tries in itertools.count():
        writer.used.clear()
        scene = writer.fill(templates[(len(seen) + tries // TRIES) % len(templates)])
        words = content(scene)
        if not any(alike(words, other) for other in seen):
            seen.append(words)
            return scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("prompts"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    grammar = yaml.safe_load(GRAMMAR.read_text(encoding="utf-8"))
    with open(options.out / FILE, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "category"))
        writer.writerows(prompts(grammar, COUNT))


if __name__ == "__main__":
    main()
