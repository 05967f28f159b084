"""Scalars that are patched into an encoded event, against protobuf's own encoding."""

from __future__ import annotations

import sys
import threading

import pytest

from moe_rules_callback.sinks.events import EventFile, proto

TAGS = ("loss", "rules/" + 200 * "long_", *(f"signals/{i}" for i in range(50)))


def of_protobuf(step: int, wall_time: float, tags: tuple[str, ...], values: list[float]) -> bytes:
    Summary = proto("summary").Summary
    scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in zip(tags, values, strict=True)]
    event = proto("event").Event(step=step, wall_time=wall_time, summary=Summary(value=scalars))
    return event.SerializeToString()


@pytest.mark.parametrize("tags", [(), TAGS[:1], TAGS], ids=len)
def test_bytes_are_those_of_protobuf(tags, tmp_path, monkeypatch):
    file, written = EventFile(tmp_path), []
    monkeypatch.setattr(file._writer, "write", written.append)
    rows = [
        (0, 0.0, [0.0] * len(tags)),
        (7, 1.7e9, [0.1 * i for i in range(len(tags))]),
        (2**40, 1.7e9, [(float("inf"), -1e300, 1e-60, -0.0)[i % 4] for i in range(len(tags))]),
        (8, 1.7e9, [float("nan")] * len(tags)),
    ]
    for step, wall_time, values in rows:
        file.scalars(step, wall_time, tags, values)
    file.close()
    assert written == [of_protobuf(step, wall_time, tags, values) for step, wall_time, values in rows]


def test_every_tag_has_a_value(tmp_path):
    file = EventFile(tmp_path)
    with pytest.raises(ValueError, match="shape"):
        file.scalars(0, 0.0, TAGS, [1.0, 2.0])
    file.close()


def test_threads_do_not_mix_their_events(tmp_path):
    file = EventFile(tmp_path)
    tags = [(f"thread_{number}",) for number in range(4)]

    def work(own: tuple[str, ...]) -> None:
        for step in range(200):
            file.scalars(step, 0.0, own, [float(step)])

    threads, patience = [threading.Thread(target=work, args=(own,)) for own in tags], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(patience)
    file.close()
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    (path,) = tmp_path.iterdir()
    events = list(loader.RawEventFileLoader(str(path)).Load())  # checks the sums of each record
    assert len(events) == 1 + 4 * 200
