"""Each mistake in a small file is one error that names it, what was expected and what was found."""

import gzip
import re

import pytest

from lag_megatron.errors import CheckpointError, ConfigError, RunError
from lag_megatron.small_files import (
    read_json,
    read_json_lines,
    read_pointer,
    read_text,
    read_yaml,
)

WHAT = "the facts of a run"


def written(folder, data):
    path = folder / "file"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_a_sound_file_is_read_with_or_without_byte_order_mark(tmp_path):
    for data in ('{"a": 1}', '\ufeff{"a": 1}', '{"a":\r\n 1}\n'):
        path = written(tmp_path, data)
        assert read_json(path, what=WHAT, error=RunError) == {"a": 1}
        assert read_yaml(path, what=WHAT, error=RunError) == {"a": 1}


BROKEN = {
    "UTF-16": ('{"a": 1}'.encode("utf-16"), r"it is not UTF-8 \(byte 1 is 0xff\)"),
    "Latin-1": ('{"a": "ä"}'.encode("latin-1"), r"it is not UTF-8 \(byte 8 is 0xe4\)"),
    "empty": (b"", "it is empty"),
    "blank": (b" \n", "it is empty"),
    "cut short": (b'{"a": ', "it cannot be read as JSON: .*char 6"),
    "zeros": (bytes(16), "it cannot be read as JSON"),
    "list": (b"[1]", "it holds a list in place of a JSON object"),
    "number": (b"3", "it holds a number in place of a JSON object"),
    "null": (b"null", "it holds null in place of a JSON object"),
    "duplicate": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
    "deep duplicate": (b'{"x": [{"a": 1, "a": 1}]}', "the key 'a' is given twice"),
    "deep": (b"[" * 100_000, "it is nested too deeply"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "it cannot be read as JSON: .*4300"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json_is_refused_with_file_expected_and_found(tmp_path, name):
    data, found = BROKEN[name]
    path = written(tmp_path, data)
    with pytest.raises(
        RunError, match=f"^{path}: expected {WHAT}, but .*{found}.*Restore it"
    ) as got:
        read_json(path, what=WHAT, error=RunError, advice="Restore it.")
    assert "\n" not in str(got.value)


@pytest.mark.parametrize(
    "text",
    [
        *("a: 1\na: 2", "a: [", "a: *b", "!!int x", "a: 2001-99-99", "!!bool x", "!!timestamp x"),
        *("!!python/object:os.system {}", "a: \0", "? [a]\n: 1", "- " * 5000, "a: !!int ''"),
    ],
)
def test_broken_yaml_is_refused(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^{path}: expected {WHAT}, but it cannot be read as"):
        read_yaml(path, what=WHAT, error=ConfigError)


def test_a_missing_file_a_folder_and_an_impossible_path_are_named(tmp_path):
    with pytest.raises(RunError, match="nowhere: expected text, but there is no such file"):
        read_text(tmp_path / "nowhere", what="text", error=RunError)
    with pytest.raises(RunError, match="it cannot be read: Is a directory"):
        read_text(tmp_path, what="text", error=RunError)
    with pytest.raises(RunError, match="its path cannot be used"):
        read_text(tmp_path / "a\0b", what="text", error=RunError)


def test_a_file_that_is_too_long_is_refused(tmp_path):
    path = written(tmp_path, "abcde")
    assert read_text(path, what="text", error=RunError, max_bytes=5) == "abcde"
    with pytest.raises(RunError, match="it is longer than 4 bytes"):
        read_text(path, what="text", error=RunError, max_bytes=4)


def test_packed_files_are_unpacked_or_refused(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}'))
    assert read_json(path, what=WHAT, error=RunError) == {"a": 1}
    for data in (path.read_bytes()[:-4], path.read_bytes()[:-6] + bytes(6), b'{"a": 1}'):
        path.write_bytes(data)
        with pytest.raises(RunError, match="it cannot be unpacked"):
            read_json(path, what=WHAT, error=RunError)


def test_lines_are_read_but_for_one_that_a_kill_cut_short(tmp_path):
    read = {"what": "a run's metrics", "error": RunError}
    assert read_json_lines(tmp_path / "nowhere", **read) == []
    path = written(tmp_path, '{"a": 1}\n\n{"b": "\u2028"}\n{"c": ')
    assert read_json_lines(path, **read) == [{"a": 1}, {"b": "\u2028"}]
    path = written(tmp_path, '{"a": 1}')  # written whole, without an end of line
    assert read_json_lines(path, **read) == [{"a": 1}]


@pytest.mark.parametrize("line", [b"{", b"3", b"[]", b'{"a": 1, "a": 1}', b"\xff", b'{"a": 1} {}'])
def test_any_other_line_is_refused_with_its_number(tmp_path, line):
    path = written(tmp_path, b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    with pytest.raises(RunError, match=f"^{path}:2: expected a line of a run's metrics, but"):
        read_json_lines(path, what="a run's metrics", error=RunError)


@pytest.mark.parametrize("text", ["step1", " step1\n", "\ufeffstep1", "a/b", "schöner"])
def test_a_pointer_names_what_lies_beside_it(tmp_path, text):
    name = read_pointer(written(tmp_path, text), error=CheckpointError)
    assert name == text.strip().strip("\ufeff")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("", "it is empty"),
        ("\n", "it is empty"),
        ("step1".encode("utf-16"), "it is not UTF-8"),
        ("x" * 5000, "it holds 5,000 characters"),
        ("/etc", "it leads elsewhere ('/etc')"),
        ("..", "it leads elsewhere ('..')"),
        ("a/../../b", "it leads elsewhere ('a/../../b')"),
        (".", "it leads elsewhere ('.')"),
        ("a\nb", r"it holds characters that no such name has ('a\nb')"),
        ("a\0", r"it holds characters that no such name has ('a\x00')"),
        ("\x1b[2J", r"it holds characters that no such name has ('\x1b[2J')"),
    ],
)
def test_a_pointer_that_leads_elsewhere_is_refused(tmp_path, data, found):
    path = written(tmp_path, data)
    with pytest.raises(CheckpointError, match=f"^{path}: expected .*but {re.escape(found)}"):
        read_pointer(path, error=CheckpointError)


def test_messages_show_control_characters_as_escapes():
    text = str(RunError("a\x1b[31m\0\x85\u202e\udc80 tab\there\nschöne Grüße \u3000"))
    assert text == "a\\x1b[31m\\x00\\x85\\u202e\\udc80 tab\there\nschöne Grüße \u3000"
