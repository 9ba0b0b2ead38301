#!/usr/bin/env bash
# Fine-tune what quantization.sh made towards the full-precision model: the paper's data, batches and epochs.
#
#     bash scripts/finetuning_quantization.sh
#     LAUNCH="accelerate launch" bash scripts/finetuning_quantization.sh        # on all GPUs
#     MODEL=assets/shapes-xl PROFILE=small bash scripts/finetuning_quantization.sh
#
# The learning rate is finetune.py's own choice, by the remaining error; the best step is kept, the start included.
# Further flags go to finetune.py.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"

case "$PROFILE" in
sdxl)
    settings=(
        --finetune_method teacher --finetune_nsamples 512 --finetune_max_epochs 4
        --finetune_batch_size 64
        --evaluation_nsamples 32 --visualize_nsamples 16
    )
    ;;
small)
    settings=(
        --finetune_method teacher --finetune_nsamples 192 --finetune_max_epochs 4
        --finetune_batch_size 32 --local_batch_size 16
        --evaluation_nsamples 24 --visualize_nsamples 16
    )
    ;;
esac
"${LAUNCH[@]}" finetune.py "$MODEL" "$QUANTIZED" "$CALIBRATION" "$EVALUATION" \
    "${SAMPLING[@]}" "${settings[@]}" --output_dir "$FINETUNED" --resume "$@"
