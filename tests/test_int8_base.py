"""What the measurement of an int8 base says of pictures that it is given."""

import numpy as np

from benchmarks.int8_base import compare


def test_a_base_is_compared_picture_by_picture():
    base = np.zeros((2, 4, 2, 2, 3), np.float32)  # two noises, four prompts
    images = base.copy()
    images[1, 2] += 0.25
    images[0, 0, 0] -= 0.5
    told, base_told = np.array([[1.0, 0.5, 0.0, 0.5]] * 2), np.array([[1.0, 0.5, 0.0, 0.5], [0.0, 0.5, 0.5, 0.5]])
    found = compare(images, {"fraction": told}, base, {"fraction": base_told})
    assert (found["pictures"], found["mean_pixel_difference"]) == (8, (0.25 + 0.25) / 8)
    assert found["largest_picture_difference"] == 0.25
    # By prompt the sums differ by 1, 0, -1/2 and 0: a mean of 1/16 for one picture.
    error = np.sqrt(np.square(np.array([1, 0, -0.5, 0]) - 2 / 16).sum() * 4 / 3) / 8
    assert found["oracle"]["fraction"] == {
        "mean": 0.5,
        "standard_error": round(np.sqrt(np.square(np.array([1, 0, -1, 0])).sum() * 4 / 3) / 8, 4),
        "change": 0.0625,
        "change_standard_error": round(error, 4),
        "by_seed": [0.5, 0.5],
        "pictures_judged_otherwise": 2,
    }
    same = compare(base, {"fraction": base_told}, base, {"fraction": base_told})
    assert same["mean_pixel_difference"] == same["oracle"]["fraction"]["change"] == 0
