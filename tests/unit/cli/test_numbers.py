"""Numbers on command lines are checked before anything is opened."""

import pytest
from programs import program

GROWTH = [
    *(("--workers", "0"), ("--workers", "-1"), ("--layers", "-3"), ("--layers", "0")),
    *(("--init-std", "nan"), ("--init-std", "inf"), ("--init-std", "-1"), ("--seed", "-1")),
]
PREPARE = [
    *(("--workers", "0"), ("--chunk-mb", "nan"), ("--chunk-mb", "inf"), ("--show", "-1")),
    *(("--vocab-size", "-5"), ("--validation-fraction", "nan"), ("--seq-length", "0")),
    *(("--sentinels", "-1"), ("--seed", "-1")),
]
PLAN = [
    *(("--layers", "0"), ("--hidden", "-1"), ("--tau-optimal", "nan"), ("--tau-depth", "inf")),
    *(("--ratio-depth", "nan"), ("--ratio-depth", "0"), ("--set", "n_c=nan"), ("--set", "s_c=-1")),
]


def refused(capsys, name, *arguments):
    assert program(name)(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(("option", "value"), GROWTH)
@pytest.mark.parametrize(
    ("tool", "more"), [("grow_checkpoint", ()), ("convert_checkpoint", ("--to", "zero"))]
)
def test_growing(capsys, tmp_path, tool, more, option, value):
    error = refused(capsys, tool, tmp_path / "none", tmp_path / "out", option, value, *more)
    assert error.startswith(f"{option}: expected ")


@pytest.mark.parametrize(("option", "value"), PREPARE)
def test_preparing(capsys, tmp_path, option, value):
    arguments = ("--source", "text", "--paths", "none", "--output", tmp_path / "out")
    error = refused(capsys, "prepare_data", *arguments, option, value)
    assert option.removeprefix("--").replace("-", "_") in error.replace("-", "_")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), PLAN)
def test_planning_stages(capsys, option, value):
    sizes = {"--layers": ["4", "8"], "--hidden": ["64"]}
    sizes[option] = [value, *sizes[option][1:]] if option in sizes else [value]
    arguments = [word for name, values in sizes.items() for word in (name, *values)]
    refused(capsys, "plan_stages", *arguments)


def test_comparing_policies(capsys, tmp_path):
    error = refused(capsys, "compare_policies", tmp_path / "none.yaml", "--workers", "0")
    assert error.startswith("--workers: expected a whole number")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["two", "-1", "", "1.5"])
def test_the_launchers_variables(monkeypatch, name, value):
    from lag_megatron.distributed.world import environment
    from lag_megatron.errors import RunError

    monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=f"the environment's {name} is '{value}'"):
        environment()
