#!/usr/bin/env bash
# The comparison of docs/evidence.md: every arm trained, sampled and scored, the probe, the report.
#   bash train/evidence.sh DATA OUTPUT [key=value ... | --seconds N]
# DATA: emoji64.npz (metrics/emoji_dataset.py) or a folder with one sub-folder of images a class.
# Three to five minutes an arm where five share one H100. Interrupted, it goes on with the same command.
set -euo pipefail
data=${1:?usage: bash train/evidence.sh DATA OUTPUT [key=value ...]}
output=${2:?usage: bash train/evidence.sh DATA OUTPUT [key=value ...]}
shift 2
metrics=$(dirname "$0")/../metrics
python "$metrics/evidence_run.py" "$data" "$output" "$@"
python "$metrics/evidence_probe.py" "$output"
python "$metrics/evidence_report.py" "$output"
