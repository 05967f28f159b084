"""Numbers at the end of what float32 and int32 can hold: never a verdict from what overflowed."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback import Audit, MetricsError, RuleAuditCallback, State
from moe_rules_callback.replay import Replay
from moe_rules_callback.trends import level_shift, spike_score, steadiness

ROWS = 40
AGE = jnp.arange(ROWS)[::-1]


@pytest.mark.parametrize("scale", [1e10, 1e25, 1e37])
def test_squares_that_overflow_give_no_trend(scale):
    noise = np.random.default_rng(0).normal(size=ROWS)
    rows = np.asarray(np.linspace(1, 3, ROWS) + 0.1 * noise, np.float32)[:, None]
    for function in (steadiness, spike_score, level_shift):
        value = float(function(jnp.asarray(np.float32(scale) * rows), AGE)[0])
        sound = float(function(jnp.asarray(rows), AGE)[0])
        if scale == 1e10:
            assert value == pytest.approx(sound, rel=1e-4)
        else:
            assert np.isnan(value)


def test_a_loss_that_explodes_is_no_verdict():
    rules = {"steady": "stable_loss", "spikes": "high_loss_spike_score"}
    with RuleAuditCallback(rules) as audit:
        for row in range(ROWS):
            audit.on_step({"loss": 1e30 * (1 + row % 3)})
    assert audit.history.loss.values[-1] == np.float32(1e30)
    assert (audit.history.state == State.UNKNOWN).all()


@pytest.mark.parametrize("steps", [[0.0, 1.0], [False, True], [-1, 0], [0, 2**31]])
def test_replay_takes_only_numbers_of_steps(steps):
    with pytest.raises(MetricsError) as error:
        Replay({"loss": np.zeros(2)}, {"r": "high_loss"}, steps=steps)
    assert str(error.value) == "steps are not all whole numbers, at least 0 and below 2**31."


def test_replay_of_complex_numbers():
    with pytest.raises(MetricsError, match="a metric of the table is complex; pass what is meant of it"):
        Replay({"loss": np.zeros(2, complex)}, {"r": "high_loss"})


def test_loads_have_their_experts_last():
    with pytest.raises(MetricsError) as error:
        Audit({"r": "high_load_cv"}, top_k=2, layer_axis=-1).init({"expert_load": jnp.ones((4, 2))})
    assert "layer_axis=-1 does not count layers in expert_load" in str(error.value)


def test_without_routers_in_x64():
    code = (
        "import jax; jax.config.update('jax_enable_x64', True)\n"
        "from moe_rules_callback import RuleAuditCallback\n"
        "with RuleAuditCallback({'r': 'high_loss'}) as audit:\n"
        "    for x in range(3): audit.on_step({'loss': float(x)})\n"
        "print(audit.history.loss.values.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[0.0, 1.0, 2.0]\n"
