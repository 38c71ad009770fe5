#!/usr/bin/env bash
# ADM's published samples against ADM's ImageNet 256 reference: the numbers that every evaluator
# of this protocol must reproduce.
#
#            ADM's TensorFlow script   a PyTorch port   allowed here
#   FID              3.942557             3.941033        ± 0.002
#   sFID             6.140434             6.140490        ± 0.002
#   IS             215.8370             215.9764          ± 0.2
#   precision        0.8265               0.82548         ± 0.003   (ADM rounds distances to float16)
#   recall           0.5309               0.5285          ± 0.003
#
# Usage: metrics/imagenet256.sh FOLDER      2.1 GB of reference and 9.8 GB of samples go there
set -euo pipefail
folder=${1:?usage: metrics/imagenet256.sh FOLDER}
base=https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256
mkdir -p "$folder"
for file in VIRTUAL_imagenet256_labeled.npz admnet_guided_upsampled_imagenet256.npz; do
    [ -f "$folder/$file" ] && continue
    curl --fail --location --output "$folder/$file.partial" "$base/$file"
    mv "$folder/$file.partial" "$folder/$file"
done
cd "$(dirname "$0")/.."
accelerate launch metrics/evaluate.py configs/evaluate.yaml \
    samples="$folder/admnet_guided_upsampled_imagenet256.npz" \
    reference="$folder/VIRTUAL_imagenet256_labeled.npz" \
    metrics='[fid,sfid,is,precision,recall]' \
    out="$folder/metrics.json"
python - "$folder/metrics.json" <<'PYTHON'
import json, sys

golden = {
    "fid": (3.942557, 2e-3),
    "sfid": (6.140434, 2e-3),
    "is": (215.8370, 0.2),
    "precision": (0.8265, 3e-3),
    "recall": (0.5309, 3e-3),
}
found = json.load(open(sys.argv[1]))["metrics"]
wrong = []
for name, (value, allowed) in golden.items():
    difference = found[name]["value"] - value
    print(f"{name:10} {found[name]['value']:.6f}  ADM {value:.6f}  difference {difference:+.6f}")
    if abs(difference) > allowed:
        wrong.append(name)
sys.exit(f"outside the tolerance: {', '.join(wrong)}" if wrong else 0)
PYTHON
