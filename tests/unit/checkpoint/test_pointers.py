"""Files that name a checkpoint's directory lead nowhere else, in every format."""

import pytest

from lag_megatron.checkpoint.open import resolve_checkpoint
from lag_megatron.errors import CheckpointError

POINTERS = ("latest", "latest_universal", "latest_checkpointed_iteration.txt")


@pytest.mark.parametrize("pointer", POINTERS)
@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "it is empty"),
        ("step1".encode("utf-16"), "it is not UTF-8"),
        (b"x" * 5000, "it holds 5,000 characters"),
        (b"/tmp", "it leads elsewhere"),
        (b"../step1", "it leads elsewhere"),
    ],
)
def test_a_pointer_that_is_no_name_is_refused(tmp_path, pointer, data, found):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "step1").mkdir()
    (folder / pointer).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{pointer}: expected the name .*but {found}"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize(("text", "tag"), [("7", "iter_0000007"), ("release", "release")])
def test_megatrons_pointer_names_an_iteration(tmp_path, text, tag):
    (tmp_path / tag).mkdir()
    (tmp_path / POINTERS[2]).write_text(text)
    assert resolve_checkpoint(tmp_path) == tmp_path / tag
