#!/usr/bin/env bash
# Print a DeepSpeed hostfile for this SLURM job.  Usage: make_hostfile.sh [SLOTS] > hostfile
# SLOTS is the number of ranks on each node; without it, the GPUs of a node as SLURM tells them.
set -euo pipefail

fail() {
  echo "make_hostfile: $1" >&2
  exit 2
}

nodes=${SLURM_JOB_NODELIST:-${SLURM_NODELIST:-}}
[ -n "$nodes" ] || fail "SLURM_JOB_NODELIST is not set: run this inside a SLURM job."
command -v scontrol >/dev/null || fail "scontrol is not on PATH."

slots=${1:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-}}}
[[ $slots =~ ^[1-9][0-9]*$ ]] ||
  fail "how many ranks has a node? (got '$slots') Usage: make_hostfile.sh SLOTS"

hosts=$(scontrol show hostnames "$nodes")
! grep -qvE '^[^[:space:]#]+$' <<<"$hosts" ||
  fail "scontrol names no hosts, or others than plain names (got '$hosts')"
while read -r host; do
  echo "$host slots=$slots"
done <<<"$hosts"
