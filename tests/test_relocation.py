"""Where IDs say that an object is, against the IDs themselves, token by token."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.drawing import relocation
from analysis.positions import assign
from analysis.rec.boxes import BOX_FORMATS, frame
from analysis.rec.scoring import score
from analysis.types import Truth, raster_ids

RELOCATIONS = ("rolled_columns:1/4", "rolled_rows:0.3", "flipped_columns", "flipped_rows", "exchanged", "original")


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(RELOCATIONS), st.data())
def test_a_box_of_whole_cells_is_where_the_ids_of_its_tokens_are(rows, columns, spec, data):
    spans = [sorted(data.draw(st.permutations(range(size + 1)))[:2]) for size in (columns, rows)]
    (x1, x2), (y1, y2) = spans
    box = np.array([x1 / columns, y1 / rows, x2 / columns, y2 / rows])
    moved, whole = relocation.implied_boxes(box[None], 1 - box[None, [2, 3, 0, 1]], spec, np.array([[rows, columns]]))
    unpruned = raster_ids(rows * columns)._replace(grids=((rows, columns, False),))
    truth = Truth(tuple(box), tuple(1 - box[[2, 3, 0, 1]]))
    ids = assign(torch.arange(rows * columns), unpruned, spec, 0, truth).visual.view(rows, columns)[y1:y2, x1:x2]
    found, down = ids % columns, ids // columns
    span = [int(found.min()), int(down.min()), int(found.max()) + 1, int(down.max()) + 1]
    torn = found[0, 0] != found.min() or down[0, 0] != down.min()  # its first cells are not its first ones there
    assert whole[0] == (not torn or not spec.startswith("rolled"))
    overlap = max(x1, columns - x2) < min(x2, columns - x1) and max(y1, rows - y2) < min(y2, rows - y1)
    if whole[0] and not (spec == "exchanged" and overlap):  # tokens of both boxes keep their IDs
        np.testing.assert_allclose(moved[0] * [columns, rows, columns, rows], span, atol=1e-9)


def answers(spec, pruner="none", keep=None, said=(0.375, 0.25, 0.625, 0.5)):
    """Rows of one object in a wide image on a padded grid of 4 x 4, answered with one box."""
    view, size = frame("padded"), np.array([40, 20])
    x1, y1, x2, y2 = view.decode(np.array([0.0, 0.25, 0.25, 0.5]), size)
    row = dict(image_id="a", ref_id="a1", sent_id=0, width=40, height=20, x1=x1, y1=y1, x2=x2, y2=y2)
    other = dict(ox1=20, oy1=10, ox2=30, oy2=15, dialect="llava", frame="padded", raw=BOX_FORMATS["llava"].format(said))
    cell = dict(pruner=pruner, keep=keep, order="method", ids=spec, seed=0, tokens=16.0, tokens_full=16.0)
    return score(pd.DataFrame([row | other | cell]))


ADAPTER = dict(token_frame="padded", frame="padded", grid=[4, 4])


def test_places_of_a_relocated_object():
    """A quarter of the columns is one of four cells; the answer stands half a cell too far on and is a hit there."""
    (row,) = relocation.places(answers("rolled_columns:1/4"), ADAPTER).itertuples()
    assert (row.true_x, row.true_y, row.implied_x, row.implied_y) == (0.125, 0.375, 0.375, 0.375)
    assert (row.said_x, row.said_y) == (0.5, 0.375) and row.whole and not row.there and not row.correct
    (row,) = relocation.places(answers("rolled_columns:1/4", said=(0.25, 0.25, 0.5, 0.5)), ADAPTER).itertuples()
    assert row.there and not row.correct
    (row,) = relocation.places(answers("exchanged"), ADAPTER).itertuples()
    assert (row.implied_x, row.implied_y) == (25 / 40, (12.5 + 10) / 40)


def test_places_after_pruning_are_those_of_the_kept_tokens_ids():
    """The grid of a quarter of 4 x 4 keeps (1, 1), (1, 3), (3, 1), (3, 3), which compact IDs number 0..3."""
    made = relocation.places(answers("compact", "spatial", 0.25), ADAPTER)
    assert made["implied_x"].isna().all()  # the object is in column 0
    rows = answers("compact", "spatial", 0.25).assign(x1=10, x2=20)
    made = relocation.places(rows, ADAPTER).iloc[0]
    assert (made["implied_x"], made["implied_y"]) == (0.125, 0.125) and not made["there"]
    assert relocation.places(rows.assign(tokens_full=20.0), ADAPTER)["implied_x"].isna().all()
    assert (
        relocation.places(rows.assign(ids="original"), ADAPTER).iloc[0][["implied_x", "implied_y"]].tolist()
        == [0.375] * 2
    )


def test_grids_follow_the_images_where_they_vary():
    varying = dict(grid=None, frame="resized_pixels:12,576,36864")
    assert relocation.grids(varying, np.array([[192, 144], [120, 240]])).tolist() == [[12, 16], [20, 10]]


def test_other_ids_are_refused():
    with pytest.raises(ValueError, match="'shuffled' are no relocation"):
        relocation.implied_boxes(np.zeros((1, 4)), np.zeros((1, 4)), "shuffled", np.array([[2, 2]]))
