"""What names and tables of others bring along steers neither a log, nor a tag, nor a reader of tables."""

from __future__ import annotations

import dataclasses

import fake_records as fake
import pytest
from collector import HOT, RULES

from moe_rules_callback import MetricsError, RuleAuditCallback
from moe_rules_callback.errors import FitError
from moe_rules_callback.fit.labels import read_labels
from moe_rules_callback.plots.affinity import read_affinity
from moe_rules_callback.sinks.scalars import ScalarTable


def test_an_alert_in_the_log_steers_no_terminal(caplog):
    rule = dataclasses.replace(HOT, description="\x1b]52;c;ZXZpbA==\x07\u202e", next_step="two\nlines")
    with RuleAuditCallback(dataclasses.replace(RULES, rules=(rule,))) as audit:
        audit.on_step({"x": -1.0})
    (message,) = caplog.messages
    assert "\\x1b]52;c;ZXZpbA==\\x07\\u202e" in message
    assert all(c.isprintable() or c == "\n" for c in message)


def test_no_part_of_a_tag_is_a_step_up():
    rules = (dataclasses.replace(fake.RULES[0], name="../../etc/passwd"), *fake.RULES[1:])
    table = ScalarTable(fake.make_schema(rules=rules))
    assert not any(part in ("", ".", "..") for tag in table.tags for part in tag.split("/"))


@pytest.mark.parametrize("content", [b"\xff\xfe1,2\n", b"a,b\n1," + b"2" * 200_000 + b"\n"])
@pytest.mark.parametrize(("read", "error"), [(read_affinity, MetricsError), (read_labels, FitError)])
def test_what_is_no_table(read, error, content, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(error) as told:
        read(path)
    assert str(told.value).startswith(f"{path} is no table in UTF-8: ")
    assert len(str(told.value)) < 400
