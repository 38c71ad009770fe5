#!/usr/bin/env bash
# The comparisons of docs/evidence.md, exact pairs beside MHLA, from scratch, converted and on clips,
# and of docs/mixing.md, MHLA beside linear attention, the main arms longer too. Results are kept.
#   bash experiments/evidence.sh DATA OUTPUT [--seconds N] [--processes N] [key=value ...]
# DATA: emoji64.npz (experiments/evidence/emoji_dataset.py) or a folder with one sub-folder of images
# a class. All GPUs that this machine has are used, with several processes each. After --seconds
# trainings write checkpoints into OUTPUT/*/work, and the same command resumes from there.
# PLANS names some of exact, arms, long, gates; exact takes some 35 minutes of an H100, arms 90, long 60.
set -euo pipefail
usage="usage: bash experiments/evidence.sh DATA OUTPUT [--seconds N] [--processes N] [key=value ...]"
data=${1:?$usage}
output=${2:?$usage}
shift 2
evidence=$(dirname "$0")/evidence
for plan in ${PLANS:-exact arms long}; do
    python "$evidence/evidence_launch.py" "$data" "$output/$plan" --plan "$evidence/$plan.yaml" "$@"
done
