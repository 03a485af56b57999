"""Conversions done again: what a kill left is gone on with, what is there is not replaced."""

import json
import os

import pytest
from converting import convert, refused, save_families

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer import job
from lag_megatron.checkpoint.writer.progress_log import WriteProgress

families = pytest.fixture(save_families, scope="module")


def test_goes_on_after_a_kill(checkpoint, tmp_path, monkeypatch):
    """Parts that are on disk are not written again, and the result is the same."""
    assert convert(checkpoint, tmp_path / "expected", "--to", "universal") == 0
    expected = manifest.read_manifest(tmp_path / "expected" / "step3_universal")["files"]
    target, pid = tmp_path / "out", os.fork()
    if pid == 0:
        mark_done, left = WriteProgress.mark_done, [5]

        def stop(self, name, files):
            mark_done(self, name, files)
            left[0] -= 1
            if not left[0]:
                os._exit(9)

        WriteProgress.mark_done = stop
        convert(checkpoint, target, "--to", "universal", "--workers", 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (target / "latest_universal").exists()
    staging = target / "step3_universal.tmp"
    lines = (staging / ".parts.jsonl").read_text().splitlines()
    done = [json.loads(line)["part"] for line in lines[1:]]
    assert len(done) == 5
    with (staging / ".parts.jsonl").open("a") as file:
        file.write('{"part": "torn')
    written, mark_done = [], WriteProgress.mark_done
    monkeypatch.setattr(
        WriteProgress,
        "mark_done",
        lambda self, name, files: written.append(name) or mark_done(self, name, files),
    )
    assert convert(checkpoint, target, "--to", "universal", "--verify") == 0
    assert written
    assert not set(written) & set(done)
    assert manifest.read_manifest(target / "step3_universal")["files"] == expected
    assert not list((target / "step3_universal").glob(".parts*"))


def test_another_conversion_does_not_go_on_with_unfinished_files(checkpoint, tmp_path):
    staging = tmp_path / "out" / "step3_universal.tmp"
    staging.mkdir(parents=True)
    (staging / ".parts.jsonl").write_text('{"about": {}}\n{"part": "optimizer", "files": {}}\n')
    (staging / "stray").touch()
    assert convert(checkpoint, tmp_path / "out", "--to", "universal", "--verify") == 0
    assert not (tmp_path / "out" / "step3_universal" / "stray").exists()


def test_the_same_conversion_twice_is_done_once(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "out", "--to", "megatron") == 0
    (tmp_path / "out" / "latest_checkpointed_iteration.txt").unlink()
    assert convert(checkpoint, tmp_path / "out", "--to", "megatron") == 0
    assert (
        f"there already: {tmp_path / 'out' / 'iter_0000003'}, of 2 layers"
        in capsys.readouterr().out
    )
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "3"
    other = ("--to", "megatron", "--operator", "last", "--layers", 3)
    assert "exists already" in refused(capsys, 2, checkpoint, tmp_path / "out", *other)


def test_a_pointer_that_cannot_be_written_is_told_as_such(
    checkpoint, tmp_path, monkeypatch, capsys
):
    def full(*unused):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(job.WriteJob, "point", full)
        error = refused(capsys, 2, checkpoint, tmp_path / "out", "--to", "megatron")
    assert "is written, but latest_checkpointed_iteration.txt beside it is not" in error
    assert convert(checkpoint, tmp_path / "out", "--to", "megatron") == 0
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_the_job_is_part_of_what_a_universal_checkpoint_is(checkpoint, tmp_path, capsys):
    """Under ZeRO-3 DeepSpeed looks for model files of other names."""
    out = tmp_path / "out"
    assert convert(checkpoint, out, "--to", "universal") == 0
    other = ("--to", "universal", "--world-size", 4, "--zero-stage", 3)
    assert "exists already" in refused(capsys, 2, checkpoint, out, *other)


def test_a_draft_of_other_files_is_not_gone_on_with(families, tmp_path, monkeypatch):
    _, source = families["gpt2"]
    file_entry, left = manifest.file_entry, [2]

    def die(path):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return file_entry(path)

    monkeypatch.setattr(manifest, "file_entry", die)
    small = ("--max-shard-size", "10KB", "--workers", 1)
    assert convert(source, tmp_path / "hf", "--to", "hf", *small) == 130
    assert list(tmp_path.glob("hf.tmp/*"))
    monkeypatch.undo()
    sizes = ("--max-shard-size", "20KB", "--verify")
    assert convert(source, tmp_path / "hf", "--to", "hf", *sizes) == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "hf").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
