"""The same bytes from one, two and three processes."""

import pytest
from programs import PROGRAMS


@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if program.ranks_agree])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_bytes_of_one_process(launcher, materials, uninterrupted, tmp_path, name, world):
    program = PROGRAMS[name]
    ranks = launcher.launch(program.words(materials, tmp_path / "out"), world)
    assert [rank.wait() for rank in ranks] == [0] * world, ranks[0].said()
    assert program.results(tmp_path / "out") == uninterrupted(name)
