#!/usr/bin/env bash
# Creates the environment of the vLLM checks: torch (tools/dev/torch-cpu-venv.sh), what vLLM's Python files import, and
# what the tests of other integrations import (90 MB, JAX for the most part). Does nothing if the environment exists.
#
#   tools/dev/vllm-venv.sh DIR
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:?usage: vllm-venv.sh DIR}
lists=(packaging/requirements-{vllm,integrations,run}.txt tools/dev/torch-cpu-venv.sh)
state=$(cat "${lists[@]}" | sha256sum | cut -c1-16)
[[ -f $venv/.stamp && $(<"$venv/.stamp") == "$state" ]] && exit 0

rm -rf "$venv"
tools/dev/torch-cpu-venv.sh "$venv"
pip=("$venv/bin/pip" install --quiet --disable-pip-version-check --no-warn-conflicts)
"${pip[@]}" --no-deps -r packaging/requirements-vllm.txt -r packaging/requirements-integrations.txt
"${pip[@]}" -r packaging/requirements-run.txt
echo "$state" >"$venv/.stamp"
