"""A coverage-guided search for input that ends in anything but a result or an error of ours.

    pip install atheris                                  # wheels for Linux, CPython 3.11 to 3.14
    python tests/fuzz/fuzz.py rules --seconds 600        # the text of rules, and rule files
    python tests/fuzz/fuzz.py logs --seconds 600         # JSON lines, CSV, TensorBoard events, netCDF
    python tests/fuzz/fuzz.py histories --seconds 600    # a zarr store of which one file is another

No part of the tests, which it outlasts. libFuzzer prints edges (cov), the size of its corpus and executions
a second. What it finds lies in the directory that is named first; give a file of it again with --again FILE,
and let it become a test.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]

INSTRUMENTED = ["moe_rules_callback", "tomllib", "lark"]
with atheris.instrument_imports(include=INSTRUMENTED):  # pyright: ignore[reportAttributeAccessIssue]
    import lark  # noqa: F401  also what is imported only when it is used, so that it counts

    from moe_rules_callback import guarded, history, stores, trimmed, verdicts  # noqa: F401
    from moe_rules_callback.errors import MoeRulesError
    from moe_rules_callback.language import parse_formula
    from moe_rules_callback.logs import datasets, delimited, events, jsonlines, map_columns, read_log  # noqa: F401
    from moe_rules_callback.rulefile import read_rule_file

sys.path.insert(0, str(Path(__file__).parents[1]))

PLACE = Path(tempfile.mkdtemp(prefix="fuzz-"))
RULES = (b"0.85 :: 2*(a | ~b) & always[3](c) -> d since[2] e  # why", b"a ->[2] b <-> c ^ d !& e !| f")
RULE_FILE = b"""description = "x"
[predicates.high_x]
signal = "x"
is = "high"
offset = 1e3
[rules.a]
rule = '''0.9 :: high_x'''
kind = "risk"
warmup = 3
[rules]
b = "high_x & ~low_y"
"""
LINES = (
    b'{"step": 1, "loss": 2.5, "utilization": [0.2, 0.8], "m": {"entropy": NaN}}\n{"step": 2, "loss": null}\n'
)
TABLE = b'step,loss,expert_0,expert_1\n1,2.5,0.2,0.8\n2,"3",,nan\n'
Target = Callable[[bytes], None]


def rules(data: bytes) -> None:
    """The first byte says whether it is a rule or a rule file."""
    text = data[1:].decode("utf-8", "surrogateescape")
    if data[:1] < b"\x80":
        formula = parse_formula(text.partition("::")[2] or text)
        assert parse_formula(str(formula)) == formula
    else:
        for rule in read_rule_file(text, "fuzz.toml").rules:
            assert parse_formula(str(rule.formula)) == rule.formula


def logs(data: bytes) -> None:
    """The first byte chooses the format."""
    format = ("json", "csv", "events", "dataset")[data[0] % 4] if data else "json"
    path = PLACE / f"log.{format}"
    path.write_bytes(records(data[1:]) if format == "events" else data[1:])
    log = read_log(path, format=format)
    assert len(log) > 0
    assert all(len(column) == len(log) for column in log.columns.values())
    map_columns(log)


def records(data: bytes) -> bytes:
    """An event file whose checksums are right."""
    from crc32c import crc32c

    def sum_of(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + sum_of(length) + data + sum_of(data)


def histories() -> tuple[Target, list[bytes]]:
    """The first byte chooses the file of a store that is replaced by the rest."""
    import fake_records as fake
    from numcodecs.zstd import Zstd

    from moe_rules_callback.sinks.zarr import ZarrSink

    fake.feed(ZarrSink(), fake.make_records(9), fake.make_run(PLACE / "run"))
    files = sorted(path for path in (PLACE / "run").rglob("*") if path.is_file())
    whole = [path.read_bytes() for path in files]
    chunk = [path.name != "zarr.json" for path in files]

    def one(data: bytes) -> None:
        number = data[0] % len(files) if data else 0
        files[number].write_bytes(
            Zstd().encode(data[1:]) if chunk[number] and data[1:2] != b"!" else data[1:]
        )
        try:
            dataset = history.open_history(PLACE / "run")
            dataset.load()
            for verdict in verdicts.verdicts(dataset):
                str(verdict)
        finally:
            files[number].write_bytes(whole[number])

    return one, [bytes([i]) + content for i, content in enumerate(whole) if not chunk[i]]


def event() -> bytes:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    value = Summary.Value(tag="loss", simple_value=2.0)
    tensor = Summary.Value(tag="load", tensor={"dtype": 1, "float_val": [1.0, 2.0]})
    return Event(step=3, summary=Summary(value=[value, tensor])).SerializeToString()


def quietly(target: Target) -> Target:
    """Errors of ours are what bad input is to end in."""

    def one(data: bytes) -> None:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.suppress(MoeRulesError):
                target(data)

    return one


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", choices=("rules", "logs", "histories"))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--again", type=Path, metavar="FILE", help="one input instead of a search")
    options = parser.parse_args(arguments)
    if options.target == "rules":
        target, seeds = rules, [*(b"\0" + rule for rule in RULES), b"\xff" + RULE_FILE]
    elif options.target == "logs":
        target, seeds = logs, [b"\0" + LINES, b"\1" + TABLE, b"\2" + event(), b"\3\x89HDF"]
    else:
        target, seeds = histories()
    if options.again:
        quietly(target)(options.again.read_bytes())
        return
    corpus = PLACE / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    print(json.dumps({"place": str(PLACE), "seeds": len(seeds)}), flush=True)
    settings = [f"-max_total_time={options.seconds}", f"-artifact_prefix={PLACE}/", "-max_len=20000"]
    settings += ["-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *settings], quietly(target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
