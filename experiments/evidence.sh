#!/usr/bin/env bash
# The comparisons of docs/evidence.md (exact pairs beside MHLA: from scratch, converted, on clips) and
# of docs/mixing.md (MHLA against linear attention, main arms also longer). Results are kept, and
# refused if they are of other settings.
#   bash experiments/evidence.sh DATA OUTPUT [--seconds N] [--processes N] [key=value ...]
# DATA: emoji64.npz (experiments/evidence/emoji_dataset.py) or a folder with one sub-folder of images
# per class. All GPUs of this machine are used, with several processes each. After --seconds, runs
# write checkpoints into OUTPUT/*/work, and the same command resumes from there.
# PLANS names some of exact, arms, long, gates, small. arms takes some 90 minutes of an H100, long 60;
# exact has not been run to its end; small is for a CPU.
set -euo pipefail
usage="usage: bash experiments/evidence.sh DATA OUTPUT [--seconds N] [--processes N] [key=value ...]"
data=${1:?$usage}
output=${2:?$usage}
shift 2
evidence=$(dirname "$0")/evidence
for plan in ${PLANS:-exact arms long}; do
    python "$evidence/evidence_launch.py" "$data" "$output/$plan" --plan "$evidence/$plan.yaml" "$@"
done
