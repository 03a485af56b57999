"""What stands in ``launch/`` for clusters, against stand-ins for SLURM's commands."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$CALLS"
if [ "$1 $2" = "show hostnames" ]; then printf 'n1\\nn2\\n'; fi
"""
# Both "nodes" one after the other, as srun would start them side by side.
SRUN = """#!/bin/sh
shift
worst=0
for id in 0 1; do
  SLURM_NODEID=$id "$@" || worst=$?
done
exit $worst
"""
DEEPSPEED = """#!/bin/sh
echo "deepspeed $*" >> "$CALLS"
echo "$NCCL_SOCKET_IFNAME" >> "$CALLS.interfaces"
cat "$HOSTFILE" > "$CALLS.hosts"
mkdir -p "$RUN_DIR"
if [ -n "$EVENT" ]; then echo "{\\"event\\": \\"$EVENT\\"}" >> "$RUN_DIR/journal.jsonl"; fi
exit "$CODE"
"""


@pytest.fixture
def cluster(tmp_path):
    """A submit folder with the commands that a job finds on a node."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    texts = {"scontrol": SCONTROL, "srun": SRUN, "deepspeed": DEEPSPEED}
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    return tmp_path


def environment(cluster, **more):
    return {
        "PATH": f"{cluster}/venv/bin:{os.environ['PATH']}",
        "VENV": "venv",
        "CALLS": str(cluster / "calls"),
        "SLURM_SUBMIT_DIR": str(cluster),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "EVENT": "",
        "CODE": "0",
        **more,
    }


def submit(cluster, *options, **more):
    """The job's exit code and output, and the commands that it called."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), "configs/x.yaml", *options],
        env=environment(cluster, **more),
        capture_output=True,
        text=True,
    )
    calls = (cluster / "calls").read_text().splitlines()
    return done.returncode, done.stdout + done.stderr, calls


def make_hostfile(cluster, *arguments, without=(), **more):
    variables = environment(cluster, **more)
    for name in without:
        del variables[name]
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "make_hostfile.sh"), *arguments],
        env=variables,
        capture_output=True,
        text=True,
    )


def test_a_hostfile_has_a_line_for_each_node(cluster):
    assert make_hostfile(cluster).stdout == "n1 slots=8\nn2 slots=8\n"
    assert make_hostfile(cluster, "4").stdout == "n1 slots=4\nn2 slots=4\n"


@pytest.mark.parametrize(
    ("arguments", "without", "message"),
    [
        ((), ["SLURM_JOB_NODELIST"], "run this inside a SLURM job"),
        ((), ["SLURM_GPUS_ON_NODE"], "how many ranks has a node? (got '')"),
        (("0",), [], "how many ranks has a node? (got '0')"),
        (("many",), [], "how many ranks has a node? (got 'many')"),
    ],
)
def test_a_hostfile_that_cannot_be_made_says_why(cluster, arguments, without, message):
    result = make_hostfile(cluster, *arguments, without=without)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr


@pytest.mark.parametrize("hosts", ["", "n1 slots=4", "n1\\n\\nn2"])
def test_names_that_are_no_hosts_make_no_hostfile(cluster, hosts):
    scontrol = next(cluster.rglob("scontrol"))
    scontrol.write_text(f"#!/bin/sh\nprintf '{hosts}\\n'\n")
    result = make_hostfile(cluster)
    assert (result.returncode, result.stdout) == (2, "")
    assert "scontrol names no hosts" in result.stderr


def test_a_job_starts_one_launcher_on_each_node(cluster):
    code, output, calls = submit(cluster, "--set", "seed=3", EVENT="run_finished")
    assert code == 0, output
    launches = [call for call in calls if call.startswith("deepspeed")]
    assert launches == [
        f"deepspeed --hostfile {cluster}/.cache/hostfile.1234567 --no_ssh --node_rank {node} "
        "--master_addr n1 --master_port 24567 launch/train.py --config configs/x.yaml "
        "--run-dir runs/x --set seed=3"
        for node in (0, 1)
    ]
    assert (cluster / "calls.hosts").read_text() == "n1 slots=8\nn2 slots=8\n"
    assert list((cluster / ".cache").iterdir()) == []


def test_a_finished_run_is_not_queued_again(cluster):
    code, _, calls = submit(cluster, EVENT="run_finished")
    assert (code, [call for call in calls if "requeue" in call]) == (0, [])


@pytest.mark.parametrize(
    ("event", "code"),
    [("", "0"), ("checkpoint", "0"), ("checkpoint", "1"), ("probe_finished", "137")],
    ids=["stopped early", "stopped", "failed after a checkpoint", "killed after a probe"],
)
def test_an_unfinished_run_is_queued_again(cluster, event, code):
    status, output, calls = submit(cluster, EVENT=event, CODE=code)
    assert status == 0, output
    assert "scontrol requeue 1234567" in calls


@pytest.mark.parametrize("code", ["1", "2"])
def test_a_run_that_fails_without_getting_further_is_not_queued_again(cluster, code):
    run_dir = cluster / "runs" / "x"
    run_dir.mkdir(parents=True)
    (run_dir / "journal.jsonl").write_text(json.dumps({"event": "checkpoint"}) + "\n")
    status, output, calls = submit(cluster, EVENT="run_started", CODE=code)
    assert status == int(code)
    assert "not queueing" in output
    assert not [call for call in calls if "requeue" in call]


def test_a_job_takes_the_variables_of_deepspeed_env(cluster):
    (cluster / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=ib0\nOTHER=a b=$c\n")
    code, output, _ = submit(cluster, EVENT="run_finished", MASTER_PORT="555", MASTER_ADDR="ib-n1")
    assert code == 0, output
    assert (cluster / "calls.interfaces").read_text() == "ib0\nib0\n"
    assert "--master_addr ib-n1 --master_port 555" in (cluster / "calls").read_text()


def test_the_example_of_deepspeed_env_is_what_deepspeed_reads():
    """DeepSpeed splits each line at its first ``=``: a comment or an empty line would end it."""
    for line in (ROOT / "launch" / "deepspeed_env.example").read_text().splitlines():
        name, value = line.split("=", maxsplit=1)
        assert name.replace("_", "").isalnum()
        assert name.isupper()
        assert value
        assert value == value.strip()
