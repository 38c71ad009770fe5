#!/usr/bin/env bash
# The comparison of docs/evidence.md: arms trained, sampled and scored, the main ones longer too; the
# speed of each; the probe; the report. Every result is kept: interrupted, it goes on where it was.
#   bash experiments/evidence.sh DATA OUTPUT [key=value ... | --seconds N]
# DATA: emoji64.npz (experiments/emoji_dataset.py) or a folder with one sub-folder of images a class.
# Any number of these may work on one OUTPUT: each takes the next arm that nobody has. Two to six
# minutes an arm where seven share one H100. Leave the GPU alone while speeds are measured.
set -euo pipefail
data=${1:?usage: bash experiments/evidence.sh DATA OUTPUT [key=value ...]}
output=${2:?usage: bash experiments/evidence.sh DATA OUTPUT [key=value ...]}
shift 2
evidence=$(dirname "$0")/evidence
long=$evidence/long.yaml
python "$evidence/evidence_run.py" "$data" "$output" "$@"
python "$evidence/evidence_run.py" "$data" "$output/long" --plan "$long" "$@"
python "$evidence/evidence_speed.py" "$output"
for seed in 0 1; do
    python "$evidence/evidence_probe.py" "$output" --seed "$seed"
done
python "$evidence/evidence_report.py" "$output"
python "$evidence/evidence_report.py" "$output/long" --plan "$long"
