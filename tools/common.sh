# shellcheck shell=bash
# What programs of this folder share; they source it.
#
# SPDX-License-Identifier: Apache-2.0

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root program=${0##*/}
log=  # made when the first step runs

fail() {
  printf 'tools/%s: %s\n' "$program" "$*" >&2
  exit 1
}

# step TEXT COMMAND...: says what runs and how long it took; its output goes to
# the log, the end of which is shown if it fails.
step() {
  local text=$1 start=$SECONDS status=0
  shift
  [[ -n $log ]] || log=$(mktemp "${TMPDIR:-/tmp}/xla_ops_$program.XXXXXX.log")
  printf '%s ... ' "$text"
  printf '\n== %s: %s\n' "$text" "$*" >>"$log"
  "$@" >>"$log" 2>&1 </dev/null || status=$?
  if ((status)); then
    printf 'failed\n'
    tail -n 30 "$log" >&2
    fail "'$*' failed with status $status; the whole log: $log"
  fi
  printf '%d s\n' $((SECONDS - start))
}

# Bazel finds the workspace from the current folder, and so for this alone.
bazel() { env -C "$root" bazel "$@"; }

# The compute capability of each of this machine's GPUs, in their order, one a
# line; fails without a working driver.
list_capabilities() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null
}

# check_driver CAPABILITY: the kernels are built with CUDA 13, which runs on
# drivers from 580, those for 7.0 with CUDA 12.9 (docs/adr/0003 and 0004). An
# older driver would refuse them only once all is built.
check_driver() {
  local driver oldest=580
  [[ $1 != 7.0 ]] || oldest=525
  driver=$(nvidia-smi --id=0 --query-gpu=driver_version --format=csv,noheader) ||
    fail "must find an NVIDIA driver, got none (nvidia-smi fails)"
  ((${driver%%.*} >= oldest)) ||
    fail "the NVIDIA driver must be $oldest or newer, got $driver: update it"
}

# arch_of CAPABILITY: what //third_party/cuda:archs calls it, as the configs of
# .bazelrc say; nothing for one that has no config.
arch_of() {
  sed -n "s,^build:sm${1/./} --//third_party/cuda:archs=,,p" "$root/.bazelrc"
}

# cuda_of CAPABILITY: the CUDA of the plugin for it. CUDA 13 knows no 7.0.
cuda_of() { if [[ $1 == 7.0 ]]; then echo 12; else echo 13; fi }
