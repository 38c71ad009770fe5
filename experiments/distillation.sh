#!/usr/bin/env bash
# Train a softmax DiT, convert it to MHLA and to plain linear attention, and compare them all:
# docs/distillation.md.
#
#     experiments/distillation.sh IMAGES OUT [key=value …]
#
# IMAGES is an npz file with arr_0 and labels, a folder with one sub-folder of images per class (64
# pixels), or the word digits, which is small enough for a CPU. key=value goes to every training.
# The same command resumes an interrupted run. CONFIGS names another folder of configs.
set -euo pipefail
images=${1:?usage: experiments/distillation.sh IMAGES OUT [key=value …]}
out=${2:?usage: experiments/distillation.sh IMAGES OUT [key=value …]}
shift 2
here=$(cd "$(dirname "$0")/distillation" && pwd)
configs=${CONFIGS:-$here}
report=(--features efficientnet-lite0)
case $images in
    digits)
        data=()
        report=(--features pixels --samples 400 --inference-steps 25)
        configs=${CONFIGS:-$here/digits}
        ;;
    *.npz) data=(data.source=npz "data.path=$images") ;;
    *) data=(data.source=folder "data.path=$images" data.image_size=64) ;;
esac
train() {
    python -m mhla_gen.cli train "$configs/$1.yaml" "output_dir=$out/$1" ${data[@]+"${data[@]}"} "${@:2}"
}
train teacher "$@"
for arm in mhla linear; do
    train "$arm" "distill.teacher=$out/teacher/pipeline" "$@"
done
train continued "model.pretrained=$out/teacher/pipeline" "$@"
python "$here/distillation_report.py" "$out" "${report[@]}"
