"""The figure of bits against quality."""

import itertools
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from vqdm.metrics.pareto import far, front, write_names


def test_front_keeps_what_nothing_beats():
    points = [(4.0, 30.0), (3.0, 25.0), (3.5, 24.0), (2.0, 20.0), (2.0, 19.0)]
    assert front(points, higher=True) == [3, 1, 0]
    assert front([(b, -v) for b, v in points], higher=False) == [3, 1, 0]
    assert front([(2.0, 1.0), (2.0, 1.0)], higher=True) == [0, 1]


def test_a_line_far_from_all_points_is_left_out():
    assert far(100, [30, 32]) and not far(34, [30, 32]) and not far(5, [])


@pytest.mark.parametrize("upside_down", [False, True])
def test_names_neither_overlap_nor_leave_their_panel_sideways(upside_down):
    """Points at one place, near each other, and at the right edge, where the axis grows."""
    axes = Figure(figsize=(4, 3)).add_subplot()
    axes.set(xlim=(1.5, 4.5), ylim=(9, 0) if upside_down else (0, 9))
    axes.annotate("full precision", (0, 5), (4, 3), textcoords="offset points")
    places = [(2, 5), (2, 5), (2, 5.1), (3, 4.9), (4.4, 5), (4.4, 5)]
    write_names(
        axes, [(SimpleNamespace(bits=bits, name=f"{k} bits, fine-tuned"), y) for k, (bits, y) in enumerate(places)]
    )
    assert len(axes.texts) == 7
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes[1:])
