"""Hostfiles are counted as DeepSpeed's launcher counts them, or refused with the line."""

import pytest

from lag_megatron.distributed.hostfile import count_slots
from lag_megatron.errors import ConfigError


def written(folder, text):
    path = folder / "hostfile"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("a slots=2\nb slots=3\n", 5),
        ("# hosts\n\n  me@a.b\tslots=2  \n10.0.0.1 slots=1 # spare\n::1 slots=8", 11),
        ("a slots=2\r\nb slots=2\r\n", 4),
    ],
)
def test_slots_of_all_hosts_are_counted(tmp_path, text, slots):
    assert count_slots(written(tmp_path, text)) == slots


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b lots=2", "got 'b lots=2'"),
        ("b", "got 'b'"),
        ("b slots = 2", "got 'b slots = 2'"),
        ("b slots=0", "N of 1 or more"),
        ("b slots=-2", "N of 1 or more"),
        ("b slots=two", "got 'b slots=two'"),
        ("b slots=2.5", r"nothing after N but a comment, got '\.5'.*DeepSpeed's launcher"),
        ("b slots=2 max_slots=4", "got 'max_slots=4'"),
        ("b slots=2#", "nothing after N"),
        ("b slots=2 slots=2", "nothing after N"),
        ("slots=2", "got 'slots=2'"),
        ("me@ slots=2", "got 'me@ slots=2'"),
        ("a slots=1", "'a' is given twice"),
        ("me@a slots=1", "'a' is given twice"),
    ],
)
def test_any_other_line_is_refused_with_its_number(tmp_path, line, message):
    path = written(tmp_path, f"a slots=2\n# a comment\n{line}\nc slots=2\n")
    with pytest.raises(ConfigError, match=f"^{path}:3: .*{message}"):
        count_slots(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "it is empty"), ("\n \n", "it is empty"), ("# a slots=2\n", "names no host")],
)
def test_a_hostfile_without_hosts_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        count_slots(written(tmp_path, text))


def test_a_missing_hostfile_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: expected a hostfile.*no such file"):
        count_slots(tmp_path / "nowhere")
