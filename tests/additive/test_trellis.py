"""The trellis format: what is stored is what is read back, bit for bit, and the table is what its docstring claims."""

import pytest
import torch

from vqdm.additive import trellis


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_rings(widths, T, seed=0):
    """Bits of the ring of every column of one segment."""
    g = generator(seed)
    return [torch.randint(2, (q * T // 4,), generator=g).tolist() for q in widths]


def plain_state(bits, q, row, L):
    """The window of L bits that ends where the row's bits end, the earliest bit lowest."""
    stop = (row + 1) * q // 4
    return sum(bits[(stop - L + place) % len(bits)] << place for place in range(L)) if bits else 0


def plain_states(segments, widths, T, L):
    """States [O, I] of the rings of all columns, segment by segment."""
    rows = [
        [[plain_state(b, q, t, L) for b, q in zip(rings, widths, strict=True)] for t in range(T)] for rings in segments
    ]
    return torch.tensor(rows).view(-1, len(widths))


def plain_bytes(segments):
    bits = [bit for rings in segments for ring in rings for bit in ring]
    return sum(bit << place for place, bit in enumerate(bits)).to_bytes(-(-len(bits) // 8), "little")


FORMATS = [  # rows of a segment, bits of a state, segments, widths
    (8, 6, 3, [4, 5, 0, 6, 7, 24, 0]),
    (16, 12, 2, [48, 4, 9, 13]),
    (4, 4, 1, [*range(4, 17)]),
    (1, 8, 5, [32, 0]),
    (6, 16, 2, [12, 14, 64, 22]),
    (12, 5, 3, [7]),
    (2, 4, 1, [0, 0]),
    (16, 8, 2, [8, 0]),  # whole bytes, and a column of no bits at the end
]


@pytest.mark.parametrize(("T", "L", "segments", "widths"), FORMATS)
def test_packed_rings_are_their_bits_and_states_are_windows_of_them(T, L, segments, widths):
    rings = [random_rings(widths, T, seed) for seed in range(segments)]
    states, q = plain_states(rings, widths, T, L), torch.tensor(widths)
    packed = trellis.pack(states, q, T, L)
    assert bytes(packed.tolist()) == plain_bytes(rings)
    assert torch.equal(trellis.unpack(packed, q.to(torch.uint8), T * segments, T, L), states)


def test_a_window_is_read_for_any_rows_of_any_columns():
    T, L, widths = 8, 6, torch.tensor([4, 7, 0, 13])
    rings = random_rings(widths.tolist(), T)
    states = plain_states([rings], widths.tolist(), T, L)
    packed, ring = trellis.pack(states, widths, T, L), widths * T // 4
    rows, columns = torch.tensor([7, 0, 3])[:, None], torch.tensor([3, 1, 2])
    first, stop = (ring.cumsum(0) - ring)[columns], (rows + 1) * widths[columns] // 4
    assert torch.equal(trellis.window(packed, first, stop, ring[columns], L), states[rows, columns])


def test_the_size_of_packed_rings_is_what_the_widths_add_up_to():
    widths = torch.tensor([4, 9, 0, 16])
    states = torch.zeros(48, 4, dtype=torch.int64)
    assert trellis.pack(states, widths, 16, 8).numel() == -(-48 * (4 + 9 + 16) // 4 // 8)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("bit", range(6))
def test_states_that_are_no_path_are_refused(row, bit):
    """Any one bit flipped is seen: a bit of a state is also in the state before, or the one after."""
    T, L, widths = 4, 6, [8, 6]
    states = plain_states([random_rings(widths, T)], widths, T, L)
    for column in range(2):
        wrong = states.clone()
        wrong[row, column] ^= 1 << bit
        with pytest.raises(ValueError, match="no path of the trellis"):
            trellis.pack(wrong, torch.tensor(widths), T, L)


@pytest.mark.parametrize("value", [-1, 64])
def test_states_of_too_many_bits_are_refused(value):
    states = torch.full((8, 1), value)
    with pytest.raises(ValueError, match="no path of the trellis"):
        trellis.pack(states, torch.tensor([24]), 8, 6)


@pytest.mark.parametrize(
    ("rows", "T"),
    [
        (1, 1),
        (63, 63),
        (64, 64),
        (512, 512),
        (513, 171),
        (640, 320),
        (1024, 512),
        (1000, 500),
        (997, 997),
        (1994, 1994),
    ],
)
def test_segments_have_the_most_rows_that_divide(rows, T):
    assert trellis.segment_rows(rows) == T


@pytest.mark.parametrize("rows", range(1, 700, 7))
def test_segments_divide_the_rows_and_are_not_short(rows):
    T = trellis.segment_rows(rows)
    assert rows % T == 0 and (rows == T or trellis.FEWEST_ROWS <= T <= trellis.MOST_ROWS)


def test_allowed_widths_are_those_of_whole_rings_no_shorter_than_a_state():
    assert trellis.allowed_widths(512, 12) == (0, *range(4, 49))
    assert trellis.allowed_widths(6, 4) == (0, *range(4, 17, 2))
    assert trellis.allowed_widths(3, 6) == (0, 8, 12, 16, 20, 24)
    assert trellis.allowed_widths(1, 4) == (0, 16)


@pytest.mark.parametrize(
    ("widths", "bits"),
    [([4, 3], 14), ([4, 5], 18), ([4, 28], 64), ([4, 6], 21), ([4, 6], 19), ([0, 0], 1), ([4, -4], 0)],
)
def test_widths_that_are_not_allowed_or_do_not_add_up_are_refused(widths, bits):
    with pytest.raises(ValueError, match=f"code_widths do not add up to segment_bits {bits}"):
        trellis.check_widths(torch.tensor(widths), 6, 6, bits)


def test_good_widths_pass_in_the_type_that_is_stored():
    trellis.check_widths(torch.tensor([4, 6, 0, 24], dtype=torch.uint8), 6, 6, 51)
    trellis.check_widths(torch.full((1000,), 64, dtype=torch.uint8), 64, 16, 1000 * 64 * 16)


@pytest.mark.parametrize("L", range(4, 17))
def test_the_table_holds_all_quantiles_and_is_symmetric(L):
    values = trellis.table(L).sort().values
    quantiles = torch.special.ndtri((torch.arange(2**L, dtype=torch.float64) + 0.5) / 2**L)
    assert torch.equal(values, quantiles.to(torch.float16).float()) and torch.equal(values, -values.flip(0))


@pytest.mark.parametrize("L", range(4, 13))
def test_neighbours_in_the_trellis_lie_one_in_each_part_of_the_distribution(L):
    values = trellis.table(L)
    assert len(values.unique()) == 2**L
    for k in range(1, L + 1):
        part = values.argsort().argsort() >> (L - k)  # of 2^k, of every state
        followers, predecessors = part.view(-1, 2**k), part.view(2**k, -1).T
        for some in (followers, predecessors):
            assert torch.equal(some.sort(1).values, torch.arange(2**k).expand(len(some), -1))


@pytest.mark.parametrize("exponent", [-20, -3, 0, 7])
def test_stored_logarithms_of_scales_round_trip(exponent):
    logarithms = torch.arange(256, dtype=torch.uint8)
    scales = trellis.scale_values(logarithms, exponent)
    assert torch.equal(trellis.scale_logarithms(scales, exponent), logarithms)
    assert scales[0] == 0 and scales[trellis.MIDDLE] == 2.0**exponent
    assert torch.equal(scales[17:], 2 * scales[1:-16])  # an octave is sixteen steps


def test_scales_are_stored_within_two_and_a_quarter_percent():
    scales = torch.logspace(-2, 2, 5000)
    stored = trellis.scale_values(trellis.scale_logarithms(scales))
    assert ((stored / scales - 1).abs() < 0.0225).all()
    assert torch.equal(stored.half().float(), stored)


def test_scales_too_small_to_be_stored_are_zero_and_too_large_ones_the_largest():
    scales = torch.tensor([0.0, 1e-30, 1e30, 2.0**-8])
    assert trellis.scale_logarithms(scales).tolist() == [0, 0, 255, 0]
