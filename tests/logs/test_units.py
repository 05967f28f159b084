"""Units told from values, names and the number of experts, or asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs.units import SHARES, UNITS, to_signal, units_of
from moe_rules_callback.signals import SCALAR_RAMPS, shipped

UNIFORM = math.log(6)


@pytest.mark.parametrize("unit", UNITS["entropy"])
def test_an_entropy_at_its_maximum_is_1_in_every_unit(unit: str):
    logged = {"nats": UNIFORM, "bits": math.log2(6), "share": 1.0}[unit]
    values, used, _ = to_signal("router_entropy", np.array([logged, math.nan]), unit, experts=6)
    np.testing.assert_allclose(values, [1, math.nan])
    assert used == unit


@pytest.mark.parametrize(
    ("values", "name", "unit", "why"),
    [
        ([1.4012, 0.9], "entropy", "nats", "up to 1.401, at most ln 6 = 1.792"),
        ([2.4, 0.9], "entropy", "bits", "up to 2.400, above ln 6 = 1.792"),
        ([0.9, 0.3], "normalized_entropy", "share", "by its name"),
        ([0.9, 0.3], "entropy_bits", "bits", "by its name"),
        ([0.9, 0.3], "router_entropy", "share", "the signal's own name"),
        ([1.4], "router_entropy", "nats", "up to 1.400, at most ln 6 = 1.792"),
    ],
)
def test_the_unit_of_an_entropy_is_told(values: list[float], name: str, unit: str, why: str):
    assert to_signal("router_entropy", np.array(values), experts=6, name=name)[1:] == (unit, why)


@pytest.mark.parametrize(
    ("values", "unit", "experts", "message"),
    [
        ([0.9, 0.3], "", 6, "has values 0.3 .. 0.9: nats, bits, or already a share of the maximum?"),
        ([1.4], "", None, "has values 1.4 .. 1.4 and is not normalised: how many --experts are there"),
        ([1.4], "nats", None, "is in nats .* how many --experts"),
        ([1.4], "nats", 1, "how many --experts"),
        ([2.6], "", 6, r"has values 2.6 .. 2.6, above the largest entropy of 6 experts, 2.585 bits"),
        ([1.9], "nats", 6, "above the largest entropy of 6 experts, 1.792 nats"),
        ([1.4, -0.1], "", 6, "an entropy is not negative"),
    ],
)
def test_an_entropy_that_cannot_be_told_is_asked_for(
    values: list[float], unit: str, experts: int | None, message: str
):
    with pytest.raises(LogError, match=message):
        to_signal("router_entropy", np.array(values), unit, experts=experts, name="entropy")


@pytest.mark.parametrize(
    ("values", "name", "expected", "unit"),
    [
        ([0.58, 1.0], "routing_acc", [0.58, 1.0], "share"),
        ([58.0, 100.0], "routing_acc", [0.58, 1.0], "percent"),
        ([0.5, 0.6], "routing_acc_percent", [0.005, 0.006], "percent"),
        ([math.nan, math.inf], "routing_acc", [math.nan, math.inf], "share"),
    ],
)
def test_shares_and_per_cent(values: list[float], name: str, expected: list[float], unit: str):
    converted, used, _ = to_signal("routing_accuracy", np.array(values), name=name)
    np.testing.assert_allclose(converted, expected)
    assert used == unit


def test_neither_share_nor_per_cent():
    with pytest.raises(LogError, match=r"has values -1 .. 300, which are neither shares nor per cent"):
        to_signal("routing_accuracy", np.array([-1.0, 300.0]))


def test_other_signals_have_one_unit():
    values = np.array([-3.0, 1e9])
    assert to_signal("loss", values) == (values, "", "")
    assert units_of("loss") == ()
    assert units_of("router_entropy") == ("nats", "bits", "share")


def test_the_signals_named_here_exist():
    assert not SHARES - {*shipped(), *SCALAR_RAMPS, "routing_accuracy"}
