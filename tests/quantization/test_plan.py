"""What is planned before a quantization starts."""

import pytest

from vqdm.errors import UserError
from vqdm.quantization.plan import blocks_before_finetuning


def test_fine_tunings_are_spread_evenly_between_the_blocks():
    assert [blocks_before_finetuning(count, 7) for count in (0, 1, 2, 6)] == [[], [4], [2, 5], [1, 2, 3, 4, 5, 6]]
    assert blocks_before_finetuning(0, 1) == []
    with pytest.raises(UserError, match="--num_intermediate_finetunes is 7; between 7 blocks allowed are 0 to 6"):
        blocks_before_finetuning(7, 7)
