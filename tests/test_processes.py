"""Several processes train one model: one of them writes, what it writes is what a single process writes, and
whatever fails on one leaves none waiting for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_process import BATCH, CASES, STEPS, Plugin, Trainer

from moe_rules_callback.history import open_history

HERE = Path(__file__).parent
AUDITS = ("beside", "inside", "watched step", "watched loss")
OTHERS = tuple(name for name in CASES if name not in AUDITS)
CASES_OF = {2: (*AUDITS, *OTHERS), 4: ("beside", "inside")}
SIMPLE = [(number, case) for number in CASES_OF for case in CASES_OF[number] if case != "resumed"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Ran:
    """What the processes of one launch came to."""

    def __init__(self, number: int, folder: Path) -> None:
        self.folder = folder
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        }
        command = [sys.executable, str(HERE / "training_process.py"), ",".join(CASES_OF[number])]
        rest, pipe = (str(number), str(free_port()), str(folder)), subprocess.PIPE
        processes = [
            subprocess.Popen([*command, str(i), *rest], env=environment, text=True, stdout=pipe, stderr=pipe)
            for i in range(number)
        ]
        try:
            told = [process.communicate(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
        errors = "\n".join(error for _, error in told)
        assert [process.returncode for process in processes] == [0] * number, errors
        self.told: list[dict[str, Any]] = [json.loads(out.splitlines()[-1]) for out, _ in told]

    def of(self, case: str, what: str) -> list[Any]:
        """What each process says."""
        return [told[case][what] for told in self.told]

    def history(self, case: str) -> Any:
        return open_history(self.folder / case / "0" / "audit.zarr")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Launches so many processes, once."""
    launched: dict[int, Ran] = {}

    def launch(number: int) -> Ran:
        if number not in launched:
            launched[number] = Ran(number, tmp_path_factory.mktemp(f"of_{number}"))
        return launched[number]

    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Histories that a single process writes of the same batches."""
    folder, trainer = tmp_path_factory.mktemp("alone"), Trainer()

    def history(case: str) -> Any:
        if not (folder / case).exists():
            CASES[case](trainer, folder / case, Plugin())
        return open_history(folder / case / "audit.zarr")

    return history


@pytest.mark.slow
@pytest.mark.parametrize(("number", "case"), [run for run in SIMPLE if run[1] in AUDITS])
def test_the_records_are_those_of_a_single_process(number: int, case: str, ran: Any, alone: Any) -> None:
    expected, found = alone(case), ran(number).history(case)
    assert found.sizes == expected.sizes
    assert found.step.values.tolist() == list(range(STEPS))
    for name in ("truth", "truth_layer", "signal_value", "signal_pooled", "expert_share", "state"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("number", CASES_OF)
@pytest.mark.parametrize("case", ["beside", "inside"])
def test_all_hold_the_same_state(number: int, case: str, ran: Any) -> None:
    assert len(set(ran(number).of(case, "state"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "case"), SIMPLE)
def test_one_process_writes_and_all_take_their_steps(number: int, case: str, ran: Any) -> None:
    ran = ran(number)
    written = [path.name.split(".")[0] for path in sorted((ran.folder / case / "0").glob("*"))]
    assert written == {"no directory": [], "hangs": ["audit", "events"]}.get(case, ["audit", "events"])
    for process in range(1, number):
        assert not (ran.folder / case / str(process)).is_dir()
    zero, *others = ran.of(case, "plugin")
    steps = 0 if case == "inside" else STEPS  # there is no on_step
    assert (zero["on_train_start"], zero["on_step"], zero["on_train_end"]) == (1, steps, 1)
    assert zero["on_records"] >= (1 if case == "hangs" else 3)
    nothing = {"on_train_start": 0, "on_records": 0, "on_train_end": 0}
    assert others == [nothing | {"on_step": steps}] * (number - 1)


OFF = "plugin '{}' raised in {} and is switched off; training goes on"
AGAIN = "plugin '{}' raised in {} and will be tried again: NotADirectoryError: "
MISSED = (
    "the run has ended and not everything is written: plugin 'Fails': it has missed 12 rows (steps 0 to 11)"
)
WAIT = "the run has ended and not everything is written: plugin '{}': 12 rows (steps 0 to 11) wait for it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "zero", "one"),
    [
        *((case, [], []) for case in (*AUDITS, "resumed")),
        ("records raise", [OFF.format("Fails", "on_records"), MISSED], []),
        ("step raises", [], [OFF.format("Fails", "on_step")]),
        ("start raises", [OFF.format("Fails", "on_train_start"), MISSED], []),
        (
            "no directory",
            [
                *(AGAIN.format(sink, "on_train_start") for sink in ("TensorBoardSink", "ZarrSink")),
                *(WAIT.format(sink) for sink in ("TensorBoardSink", "ZarrSink")),
            ],
            [],
        ),
        ("hangs", [WAIT.format("Fails")], []),
    ],
)
def test_a_failure_is_reported_once_where_it_happens(case: str, zero: Any, one: Any, ran: Any) -> None:
    told = ran(2).of(case, "messages")
    for messages, begin in zip(told, (zero, one), strict=True):
        assert len(messages) == len(begin), messages
        for message, expected in zip(sorted(messages), begin, strict=True):
            assert message.startswith(expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["records raise", "step raises", "start raises"])
def test_what_fails_takes_no_row_from_the_history(case: str, ran: Any) -> None:
    assert ran(2).history(case).step.values.tolist() == list(range(STEPS))


@pytest.mark.slow
def test_a_resumed_history_goes_on_although_one_process_alone_sees_it(ran: Any) -> None:
    history = ran(2).history("resumed")
    assert history.step.values.tolist() == list(range(2 * STEPS))
    again = history.signal_value.values
    np.testing.assert_array_equal(again[:STEPS], again[STEPS:])  # the same batches, trained on anew


@pytest.mark.slow
def test_tokens_of_all_processes_count(ran: Any) -> None:
    """An independent count: shares of assignments are multiples of one over all of them."""
    share = ran(2).history("beside").expert_share.values
    np.testing.assert_allclose(share * 2 * BATCH, np.round(share * 2 * BATCH), atol=1e-4)
    assert (np.round(share * 2 * BATCH) % 2 == 1).any()  # not of the half that a process has
