"""Fixtures of the host side: a callback over one rule whose truth a test sets, and what it was seen to do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from collector import Collector, make

from moe_rules_callback import RuleAuditCallback


@pytest.fixture
def seen() -> Collector:
    return Collector()


@pytest.fixture
def audit(seen: Collector) -> Iterator[RuleAuditCallback]:
    with make(seen) as audit:
        yield audit
