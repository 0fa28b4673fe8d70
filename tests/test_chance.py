"""The level of an answer that has not seen the image, against plain loops."""

import itertools

import numpy as np
import pandas as pd
import pytest

from analysis.rec.boxes import FRAMES, hit
from analysis.rec.chance import SIZE, TRUTH, chance, chances


def expressions(n=24, seed=0):
    rng = np.random.default_rng(seed)
    size = np.array([(200, 150), (120, 200), (160, 160)])[np.arange(n) // 3 % 3]
    low = rng.random((n, 2)) * size * 0.4
    high = low + size * rng.uniform(0.3, 0.6, (n, 2))
    box = np.concatenate([low, high], 1)
    table = pd.DataFrame(np.concatenate([size, box], 1), columns=["width", "height", "x1", "y1", "x2", "y2"])
    names = dict(image_id=[f"i{k // 3}" for k in range(n)], ref_id=np.arange(n) // 2, sent_id=np.arange(n))
    return table.assign(**names, dialect="llava", frame="padded", dataset="d", split="val")


@pytest.mark.parametrize("frame", ["padded", "resized"])
def test_chance_is_the_mean_over_all_pairs_of_images(frame):
    rows, hits = expressions(), []
    for i, j in itertools.permutations(range(len(rows)), 2):
        a, b = rows.iloc[i], rows.iloc[j]
        if a["image_id"] != b["image_id"]:
            (of, to), (said, truth) = ([row[columns].to_numpy(float) for row in (a, b)] for columns in (SIZE, TRUTH))
            hits.append(hit(FRAMES[frame].decode(FRAMES[frame].encode(said, of), to), truth)[1])
    assert 0.02 < np.mean(hits) < 0.9
    assert chance(rows, frame) == pytest.approx(np.mean(hits))
    cells = pd.concat([rows, rows.assign(pruner="trim")])
    assert chance(cells, frame) == pytest.approx(np.mean(hits))  # an expression counts once, however many cells ask it


def test_chance_of_a_sample_of_one_image_and_of_several_sets():
    rows = expressions(300)
    assert chance(rows, most=100) == chance(rows, most=100) == pytest.approx(chance(rows), abs=0.04)
    assert np.isnan(chance(rows.head(3)))
    assert chance(rows, convention="gt") <= chance(rows, convention="ge")
    both = pd.concat([rows, expressions(30, 1).assign(split="test")])
    found = chances(both)
    assert list(found.index) == [("d", "val"), ("d", "test")]
    assert found["d", "test"] == chance(expressions(30, 1)) and found["d", "val"] == chance(rows)
    with pytest.raises(ValueError, match="unknown frame 'paded'; did you mean 'padded'"):
        chance(rows, "paded")
