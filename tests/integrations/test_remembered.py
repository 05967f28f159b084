"""What rules remember goes through a file, and a file that is something else stops nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_rules_callback.integrations._remembered import restore, written

from moe_rules_callback import RuleAuditCallback

RULES = {"jumpy": "previously(always[5](high_loss)) -> increasing_loss", "late": "F(low_loss)"}
LOSSES = np.random.default_rng(0).normal(size=70).tolist()


def history(losses: list[float], file: Path | None = None) -> Any:
    """Of a run that goes on from a file; before its last step it writes another."""
    with RuleAuditCallback(RULES) as audit:
        if file is not None:
            restore(audit, file)
        for loss in losses:
            audit.on_step({"loss": loss})
        if file is None:
            return audit.history, written(audit.state)  # pyright: ignore[reportArgumentType]
        return audit.history


def test_a_run_goes_on_from_a_file(tmp_path: Path) -> None:
    unbroken, _ = history(LOSSES)
    _, data = history(LOSSES[:40])
    (file := tmp_path / "40.npz").write_bytes(data)
    found = history(LOSSES[40:], file).sel(step=slice(40, None))
    assert found.step.values.tolist() == list(range(40, 70))
    wanted = unbroken.sel(step=slice(40, None))
    np.testing.assert_array_equal(found.truth_layer, wanted.truth_layer)


class Opened:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("what", ["nothing", "half", "pickled", "text"])
def test_a_file_that_is_something_else(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "40.npz"
    if what == "half":
        data = history(LOSSES[:2])[1]
        file.write_bytes(data[: len(data) // 2])
    elif what == "pickled":
        np.savez(file, ring=np.array([Opened()], object))
    elif what == "text":
        file.write_text("no numbers")
    found = history(LOSSES[:3], file)
    assert found.step.values.tolist() == [0, 1, 2]
    assert caplog.messages[0] == f"{file} cannot be read: what the rules remember begins anew"
