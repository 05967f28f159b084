"""Pictures of loads, decoded by Pillow."""

from __future__ import annotations

import dataclasses
import io

import fake_records as fake
import matplotlib
import numpy as np
import pytest
from PIL import Image

from moe_rules_callback.sinks.loads import Loads, png

BLUE, GREY, YELLOW = (0, 34, 78, 255), (125, 124, 120, 255), (254, 232, 56, 255)


def decode(picture: bytes) -> np.ndarray:
    """uint8 [height, width, 4]."""
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA"))


def near(pixels: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    return np.all(abs(pixels.astype(int) - colour) <= 8, axis=-1)


def records_of(share: np.ndarray):
    """Rows with these shares, [n, layers, experts]."""
    rows, layers, experts = share.shape
    records = fake.make_records(rows, fake.make_schema(layers, experts))
    return dataclasses.replace(records, expert_share=share.astype(np.float32))


def pictures_of(share: np.ndarray, batch: int = 64) -> dict[str, np.ndarray]:
    records = records_of(share)
    loads = Loads(records.schema)
    for start in range(0, len(records), batch):
        loads.add(records[start : start + batch])
    return {tag: decode(picture) for tag, _, picture in loads.pictures()}


def even(rows: int, layers: int = 2, experts: int = 4) -> np.ndarray:
    return np.full((rows, layers, experts), 1 / experts)


def test_any_pixels_come_back():
    random = np.random.default_rng(0)
    palette = random.integers(0, 256, (256, 4), np.uint8)
    for height, width in ((1, 1), (3, 7), (40, 300)):
        pixels = random.integers(0, 256, (height, width)).astype(np.uint8).repeat(2, axis=0)
        np.testing.assert_array_equal(decode(png(pixels, palette)), palette[pixels])


def test_colours_are_those_of_cividis():
    ratios = np.geomspace(0.1, 10, 12)
    share = np.concatenate([ratios, np.zeros(100)])  # of 112 experts
    (picture,) = pictures_of(np.tile(share / 112, (1, 1, 1))).values()
    found = picture[[int((expert + 0.5) * len(picture) / 112) for expert in range(12)], 0]
    want = matplotlib.colormaps["cividis"](np.linspace(0, 1, 12)) * 255
    assert abs(found - want).max() < 12  # half a level and the interpolation


def test_an_expert_that_dies_goes_dark_when_it_does():
    share = even(1_000)
    share[500:, 1] = [0, 1 / 3, 1 / 3, 1 / 3]
    pictures = pictures_of(share)
    assert list(pictures) == [
        "experts_by_layer",
        "experts_over_time/block_0/moe",
        "experts_over_time/block_1/moe",
    ]
    healthy, dying = pictures["experts_over_time/block_0/moe"], pictures["experts_over_time/block_1/moe"]
    height, width, _ = dying.shape
    assert near(healthy, GREY).all()
    assert near(dying[:, : width // 2 - 2], GREY).all()
    assert near(dying[: height // 4, width // 2 + 2 :], BLUE).all()
    assert not near(dying[height // 4 :], BLUE).any()
    now = pictures["experts_by_layer"]
    assert near(now[len(now) // 2 :, : now.shape[1] // 4], BLUE).all()
    assert near(now[: len(now) // 2], GREY).all()


def test_an_expert_that_gets_ten_times_its_share_is_yellow():
    share = np.zeros((10, 1, 20))
    share[:, 0, 0], share[:, 0, 1:] = 0.5, 0.5 / 19
    (picture,) = pictures_of(share).values()
    assert near(picture[: len(picture) // 20], YELLOW).all()


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 1_023, 1_025, 3_000])
def test_batches_make_no_difference(rows):
    random = np.random.default_rng(rows)
    share = random.dirichlet(np.full(4, 2.0), (rows, 1))
    (whole,), (parts,) = (pictures_of(share, batch).values() for batch in (rows, 37))
    assert whole.shape == parts.shape
    assert (whole != parts).any(axis=-1).mean() < 0.01  # sums in another order, at the edge of a level


def test_columns_are_means_of_neighbours():
    random = np.random.default_rng(0)
    share = random.dirichlet(np.full(4, 2.0), (2_048, 1))
    (picture,) = pictures_of(share).values()
    means = share[:, 0].reshape(256, 8, 4).mean(axis=1)
    (want,) = pictures_of(means[:, None]).values()
    assert (picture != want).any(axis=-1).mean() < 0.01


def test_what_is_not_there_is_transparent():
    share = even(100)
    share[:, 1] = [0.5, 0.5, np.nan, np.nan]  # a layer of two experts
    share[50:75, 0] = np.nan  # rows without a load
    pictures = pictures_of(share, batch=25)
    first, second = pictures["experts_over_time/block_0/moe"], pictures["experts_over_time/block_1/moe"]
    shown, width = first[..., 3] > 0, first.shape[1]
    np.testing.assert_array_equal(
        shown[0], (np.arange(width) * 100 // width < 50) | (np.arange(width) * 100 // width >= 75)
    )
    assert near(second, GREY).all()
    now = pictures["experts_by_layer"]
    assert (now[len(now) // 2 :, now.shape[1] // 2 :, 3] == 0).all()
    assert near(now[len(now) // 2 :, : now.shape[1] // 2], GREY).all()


def test_a_layer_without_any_load_is_one_transparent_picture():
    pictures = pictures_of(np.full((5, 2, 4), np.nan))
    assert all((picture[..., 3] == 0).all() for picture in pictures.values())


def test_no_router_no_picture():
    assert pictures_of(np.zeros((5, 2, 0))) == {}
