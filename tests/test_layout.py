"""TokenLayout: lengths, invalid arguments, and conversion between tokens and coordinates."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import TokenLayout

grids = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@given(grids, st.integers(0, 4), st.integers(0, 4))
def test_coordinates_round_trip(grid, before, after):
    layout = TokenLayout(grid, before, after)
    assert layout.seq_len == before + math.prod(grid) + after
    coordinates = [layout.coordinates(token) for token in range(layout.seq_len)]
    assert coordinates[:before] == [None] * before and coordinates[layout.seq_len - after :] == [None] * after
    inside = coordinates[layout.grid_slice]
    assert inside == sorted(inside) and len(set(inside)) == len(inside)
    assert [layout.token(x) for x in inside] == list(range(before, before + math.prod(grid)))


def test_layout_is_frozen_hashable_and_pickles():
    layout = TokenLayout([2, 3], after=1)
    assert layout == pickle.loads(pickle.dumps(layout)) and hash(layout) == hash(TokenLayout((2, 3), 0, 1))
    with pytest.raises(AttributeError):
        layout.before = 3


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"grid": ()}, ValueError, "1, 2 or 3 axes"),
        ({"grid": (1, 2, 3, 4)}, ValueError, "1, 2 or 3 axes"),
        ({"grid": (3, 0)}, ValueError, "at least 1"),
        ({"grid": (3,), "before": -1}, ValueError, "negative"),
        ({"grid": (3,), "after": -2}, ValueError, "negative"),
        ({"grid": (3.0, 2)}, TypeError, "expects integers"),
        ({"grid": (True, 2)}, TypeError, "expects integers"),
        ({"grid": (3, 2), "before": 1.5}, TypeError, "expects integers"),
        ({"grid": (3, 2), "after": 5, "references": ((3, 2),)}, ValueError, "more tokens than"),
    ],
)
def test_invalid_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        TokenLayout(**arguments)


def test_outside_tokens_and_coordinates_raise():
    layout = TokenLayout((2, 3), before=1)
    for token in (-1, 7):
        with pytest.raises(IndexError):
            layout.coordinates(token)
    with pytest.raises(IndexError):
        layout.token((2, 0))
    with pytest.raises(ValueError, match="expected 2 coordinates"):
        layout.token((1,))
