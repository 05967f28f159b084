"""Numbers of steps that are none: refused where they can be looked at, else as if none had been given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import RULES, make

from moe_rules_callback import Audit, MetricsError

NONE: dict[str, Any] = {
    "bool": True,
    "bool of NumPy": np.bool_(True),
    "bool of a device": jnp.bool_(True),
    "float": 3.0,
    "float of a device": jnp.float32(3),
    "complex of a device": jnp.complex64(3),
    "array": np.array([3]),
    "array of a device": jnp.array([3]),
    "list": [3],
    "text": "3",
    "key": jax.random.key(0),
    "negative": -1,
    "huge": 2**31,
    "huge of NumPy": np.int64(2**40),
}


@pytest.mark.parametrize("every_n", [1, 2])
def test_beside_the_step(every_n: int, seen: Any) -> None:
    with make(seen, every_n=every_n) as audit:
        for i, none in enumerate(NONE.values()):
            audit.on_step({"x": i}, 2 * i)
            with pytest.raises(MetricsError) as error:
                audit.on_step({"x": -1.0}, none)
            assert str(error.value) == f"step is {none!r}; it is a whole number, at least 0 and below 2**31."
    assert seen.steps == list(range(0, 2 * len(NONE), 2))
    assert seen.x == list(range(len(NONE)))


@pytest.mark.parametrize("name", NONE)
def test_inside_the_step(name: str) -> None:
    audit = Audit(RULES)
    state = audit.init({"x": 0.0})
    with pytest.raises(MetricsError, match=r"it is a whole number, at least 0 and below 2\*\*31\."):
        audit.update(state, {"x": 0.0}, NONE[name])


@pytest.mark.parametrize("number", [jnp.int32(-1), jnp.int32(-5), jnp.uint32(2**32 - 1), jnp.int8(-3)])
def test_a_number_on_a_device_that_is_none_counts_as_not_given(number: jax.Array, tmp_path: Path) -> None:
    """A row of a negative step would pass for one that is not written, and take later ones with it."""
    with make(logdir=tmp_path, sinks=["zarr"]) as audit:
        for step in (0, 1, number, None, 9):
            audit.on_step({"x": 0.0}, step)
        assert audit.history.step.values.tolist() == [0, 1, 2, 3, 9]


def test_numbers_of_a_program_of_64_bits() -> None:
    audit, metrics = Audit(RULES), {"x": 0.0, "router_probs": np.full((3, 4), 0.25)}
    state, update = audit.init(metrics), jax.jit(audit.update)
    jax.config.update("jax_enable_x64", True)
    try:
        for step in (5, 2**31 - 2, 2**32 + 1):
            state = update(state, metrics, jnp.int64(step))
    finally:
        jax.config.update("jax_enable_x64", False)
    rows = audit.records(np.asarray(state.rows), np.arange(3), np.zeros(3))
    assert rows.step.tolist() == [5, 2**31 - 2, 2**31 - 1]


def test_numbers_that_repeat_or_go_back_make_rows(seen: Any) -> None:
    with make(seen, every_n=2) as audit:
        for i, step in enumerate((4, 4, 2, jnp.int32(4), 5, np.uint8(6))):
            audit.on_step({"x": i}, step)
    assert (seen.steps, seen.x) == ([4, 4, 2, 4, 6], [0, 1, 2, 3, 5])
