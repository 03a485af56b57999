"""Two writers of one target: the second is refused, whatever the program; killed owners let go."""

import errno
import fcntl
import os
import shutil
import signal
import time

import pytest
from converting import convert
from programs import grow, inspect, program
from racing import race
from synthetic_run import SyntheticRun

import lag_megatron as lag
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import RunError
from lag_megatron.targets.file_lock import is_locked, lock_file, sole_writer

report, evaluate, compare = map(program, ("report", "evaluate", "compare_policies"))
LAG = ("index=0", "block_size=2", "init=random")
OPERATOR = ("--operator", "lag", *(text for value in LAG for text in ("--set", value)))
SEEDED = (*OPERATOR, "--layers", 4)
FORMATS = ("zero", "universal", "megatron", "hf")


def tag_in(form, folder):
    names = {"zero": "step3", "universal": "step3_universal", "megatron": "iter_0000003"}
    return folder / names[form] if form in names else folder


def test_the_second_writer_names_the_first(checkpoint, tmp_path, capsys):
    target = tmp_path / "out"
    with sole_writer(target / "step3"):
        assert grow(checkpoint, target, *SEEDED) == 2
        with pytest.raises(RunError, match="is being written by"):
            lag.grow(checkpoint, target)
    printed = capsys.readouterr().err
    assert f"{target / 'step3'}: is being written by " in printed
    assert f"(pid {os.getpid()} on {os.uname().nodename}, since 20" in printed
    assert not (target / "step3").exists()
    assert grow(checkpoint, target, *SEEDED) == 0
    assert sorted(path.name for path in target.iterdir()) == ["latest", "step3"]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_one_writer(form, checkpoint, tmp_path, capsys):
    target = tmp_path / "out"
    with sole_writer(tag_in(form, target)):
        assert convert(checkpoint, target, "--to", form) == 2
        with pytest.raises(RunError, match="is being written by"):
            lag.convert(checkpoint, target, to=form)
    assert "is being written by" in capsys.readouterr().err
    assert not tag_in(form, target).exists()


def test_writers_of_results_and_reports(tmp_path, capsys):
    run = SyntheticRun(tmp_path / "run")
    with sole_writer(run.path / "report"):
        assert report(run.path) == 2
    assert f"{run.path / 'report'}: is being written by" in capsys.readouterr().err
    assert not (run.path / "report.html").exists()
    data = tmp_path / "lambada.jsonl"
    rows = (f'{{"context": "a b", "continuation": "{word}"}}\n' for word in "cd")
    data.write_text("".join(rows))
    out = tmp_path / "results" / "scores.json"
    options = ("--tasks", "lambada", "--data", tmp_path)
    with sole_writer(out):
        assert evaluate(run.path, *options, "--output", out) == 2
    assert f"{out}: is being written by" in capsys.readouterr().err
    with sole_writer(run.path / "scores"):
        assert evaluate(run.path, *options, "--candidates") == 2
    assert f"{run.path / 'scores'}: is being written by" in capsys.readouterr().err


def test_writers_of_a_study(tmp_path, capsys):
    study = ("studies/raptr_bert_small", "--out", tmp_path)
    for name, options in (("study", ()), ("report", ("--report-only",))):
        with sole_writer(tmp_path / name):
            assert compare(*study, *options) == 2
        assert f"{tmp_path / name}: is being written by" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(checkpoint, tmp_path, monkeypatch, capsys):
    def none(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    target = tmp_path / "out"
    assert grow(checkpoint, target, *SEEDED) == 2
    printed = capsys.readouterr().err
    assert "This file system has no locks" in printed
    assert "--no-lock" in printed
    with pytest.raises(RunError, match="lock=False"):
        lag.grow(checkpoint, target)
    assert not (target / "step3").exists()
    assert grow(checkpoint, target, *SEEDED, "--no-lock") == 0
    lag.convert(checkpoint, tmp_path / "hf", to="hf", lock=False)
    run = SyntheticRun(tmp_path / "run")
    assert report(run.path) == 2
    assert report(run.path, "--no-lock") == 0


def test_links_to_one_target_share_its_lock(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with sole_writer(tmp_path / "real"):
        assert convert(checkpoint, tmp_path / "link", "--to", "hf") == 2
    assert "is being written by" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "real")
    assert convert(checkpoint, ".", "--to", "hf") == 2
    assert "exists already" in capsys.readouterr().err


def test_text_in_a_lock_decides_nothing(checkpoint, tmp_path):
    """A lock's file that a killed writer has left, with whatever in it."""
    (tmp_path / "step3.lock").write_text("grow_checkpoint.py (process 1 on here, since ever)\n")
    (tmp_path / "latest.lock").write_bytes(b"\xff\x00")
    assert grow(checkpoint, tmp_path, *SEEDED) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step3"]


def test_a_killed_owner_releases_although_its_children_live(tmp_path):
    path, read_end, write_end = tmp_path / "a.lock", *os.pipe()
    owner = os.fork()
    if owner == 0:
        held = lock_file(path, timeout=0, refusal=str)
        child = os.fork()
        if child:
            os.write(write_end, f"{child}\n".encode())
        time.sleep(60)
        os._exit(int(held.closed))
    child = int(os.read(read_end, 20))
    try:
        assert is_locked(path)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        os.kill(child, 0)  # still there
        assert not is_locked(path)
        lock_file(path, timeout=0, refusal=str).close()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A ZeRO checkpoint of about 100 MB on 4 ranks: growing it takes a good part of a second."""
    import transformers

    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    given = ("--to", "zero", "--world-size", 4)
    assert convert(folder / "hf", folder / "zero", *given) == 0
    assert convert(folder / "zero", folder / "universal", "--to", "universal") == 0
    return folder


WRITERS = {"grow": ("zero", grow, ()), "link": ("universal", grow, ("--link",))}
WRITERS |= {form: ("zero", convert, ("--to", form)) for form in FORMATS}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITERS)
def test_one_of_two_growths_wins(case, large, tmp_path):
    form, tool, given = WRITERS[case]
    refusals = 0
    for number, delay in enumerate((0.0, 0.0, 0.02, 0.1, 0.3)):
        folder = tmp_path / str(number)
        folder.mkdir()

        def work(seed, folder=folder):
            options = (*OPERATOR, "--layers", 8, "--seed", seed, "--workers", 1)
            return tool(large / form, folder / "out", *given, *options)

        codes, printed = race([lambda: work(1), lambda: work(2)], delays=(0, delay), folder=folder)
        assert sorted(codes) == [0, 2], printed
        lost = printed[codes.index(2)]
        refusals += "is being written by" in lost
        assert "is being written by" in lost or "exists already" in lost
        (tag,) = (path.parent for path in (folder / "out").rglob(manifest.MANIFEST))
        assert list(manifest.find_corrupted_files(tag)) == []
        assert inspect(tag, "--verify") == 0
        assert not list(folder.rglob("*.lock"))
        assert not list(folder.rglob("*.tmp"))
    assert refusals


@pytest.mark.slow
def test_two_tags_in_one_folder_at_once(large, tmp_path):
    """Both are written, and the pointer names one of them."""
    sources = [large / "zero" / "step00000000", tmp_path / "source" / "step00000007"]
    shutil.copytree(*sources)
    works = [lambda s=s: grow(s, tmp_path / "out", "--world-size", 2) for s in sources]
    codes, printed = race(works, delays=(0, 0), folder=tmp_path)
    assert codes == [0, 0], printed
    names = ["latest", "step00000000", "step00000007"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "latest").read_text() in names[1:]
    for name in names[1:]:
        assert list(manifest.find_corrupted_files(tmp_path / "out" / name)) == []


@pytest.mark.slow
def test_one_of_two_reports_wins(tmp_path):
    run = SyntheticRun(tmp_path / "run")
    codes, printed = race(
        [lambda: report(run.path), lambda: report(run.path)], delays=(0, 0.01), folder=tmp_path
    )
    assert sorted(codes) == [0, 2], printed
    assert "is being written by" in printed[codes.index(2)]
    assert (run.path / "report.html").read_text().rstrip().endswith("</html>")
