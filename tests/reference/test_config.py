"""One option a field, and settings that do not go together."""

from __future__ import annotations

import dataclasses

import pytest

from reference.config import Config, ConfigError, from_command_line


def test_no_arguments_give_the_defaults():
    assert from_command_line([]) == Config()


def test_every_field_is_an_option_of_its_type():
    line = "--steps 7 --learning-rate 1e-2 --no-audit --distributed --rules my.toml --dataset tinyshakespeare"
    expected = Config(
        steps=7, learning_rate=1e-2, audit=False, distributed=True, rules="my.toml", dataset="tinyshakespeare"
    )
    assert from_command_line(line.split()) == expected


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        from_command_line(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in shown
        assert "".join(field.metadata["help"].split()) in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10, "heads": 4}, "width 10 is no multiple of the 4 heads: change one of the two."),
        ({"top_k": 3, "experts": 2}, "top_k 3 asks for more than the 2 experts: change one of the two."),
        ({"steps": 0}, "steps is 0; it must be 1 or more."),
    ],
)
def test_settings_that_do_not_go_together(changes, message, capsys):
    with pytest.raises(ConfigError) as raised:
        Config(**changes)
    assert str(raised.value) == message
    with pytest.raises(SystemExit, match="2"):
        from_command_line([f"--{key.replace('_', '-')}={value}" for key, value in changes.items()])
    assert message in capsys.readouterr().err
