# Sourced by quantization.sh, finetuning_quantization.sh, eval_image_generation.sh and metric_calculation.sh: the settings
# that they share. Each can be set in the environment.
#
#     MODEL    the pipeline: a folder, or a name on the hub
#     PROFILE  sdxl: the paper's settings, for a machine with GPUs; small: minutes on a laptop, for assets/shapes-xl
#     BITS     stored bits per weight; codebooks of 8 bits per group of 8 weights with FORMAT=paper of quantization.sh
#     OUT      where everything goes
#     LAUNCH   what starts a program: python, or "accelerate launch" for all GPUs

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python -c "import vqdm" 2>/dev/null || source "$root/scripts/install.sh" requirements.txt
cd "$root"

MODEL="${MODEL:-stabilityai/stable-diffusion-xl-base-1.0}"
PROFILE="${PROFILE:-sdxl}"
BITS="${BITS:-3}"
OUT="${OUT:-out/$PROFILE-${BITS}bit}"
read -ra LAUNCH <<<"${LAUNCH:-python}"

case "$PROFILE" in
sdxl)
    CALIBRATION="${CALIBRATION:-prompts/calibration.csv}"
    EVALUATION="${EVALUATION:-prompts/evaluation.csv}"
    PROMPTS="${PROMPTS:-prompts/evaluation.csv}"
    SAMPLING=(--scheduler ddim --num_inference_steps 50 --guidance_scale 5)
    ;;
small)
    CALIBRATION="${CALIBRATION:-prompts/shapes_calibration.csv}"
    EVALUATION="${EVALUATION:-prompts/shapes_evaluation.csv}"
    PROMPTS="${PROMPTS:-prompts/shapes_test.csv}"
    SAMPLING=(--num_inference_steps 10 --guidance_scale 3)
    ;;
*)
    echo "error: PROFILE is $PROFILE; allowed are sdxl and small" >&2
    exit 2
    ;;
esac

# The last step with a result.
QUANTIZED="${QUANTIZED:-$OUT/quantized}"
FINETUNED="$OUT/finetuned"
[ -f "$FINETUNED/model_index.json" ] && LAST="$FINETUNED" || LAST="$QUANTIZED"
