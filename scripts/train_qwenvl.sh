#!/usr/bin/env bash
# The front door: fine-tune a Qwen2.5-VL with DFT, evaluate it before and after, and show the result.
#
#   bash scripts/train_qwenvl.sh                      a tiny model on a drawn set: any machine, 2 cores, under 8 minutes
#   OBJECTIVE=dft,nll bash scripts/train_qwenvl.sh    DFT and plain SFT from the same start, compared
#   MODEL=Qwen/Qwen2.5-VL-3B-Instruct RECIPE=wethink ENGINE=zero2 NPROC=8 bash scripts/train_qwenvl.sh
#                                                     the paper's setting: 8 GPUs of 80 GB, 1 epoch, lr 5e-5
#
# Variables, all optional (unset ones are decided by the recipe and by vlm_dft/config.py):
#   MODEL      tiny, a hub id or a folder (tiny)          OUTPUT     the run folder (runs/...)
#   RECIPE     what to train on (drawn)                   LORA       rank of a low-rank adapter (train all weights)
#   DATA       where the recipe's files lie               NPROC      processes, one a GPU (1)
#   OBJECTIVE  dft, nll, floor ..., or several (dft)      ENGINE     zero2, zero3 or your own .json (none)
#   BENCHMARK  what to evaluate on (the recipe's own)     EXTRA      more words for `vlm-dft train`
# Words after the script's name go to `vlm-dft train` too: --dry-run prints the resolved run and stops.
#
# Result: a table (base and trained: accuracy, standard error, count) and, in OUTPUT, the checkpoint, report.json and
# report.html. Interrupted? The same command resumes. First use makes .venv: see scripts/setup.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

train=(train "$@")
for name in MODEL RECIPE DATA OBJECTIVE BENCHMARK OUTPUT LORA ENGINE; do
  [[ -z ${!name:-} ]] || train+=("--$(tr '[:upper:]' '[:lower:]' <<<"$name")" "${!name}")
done
[[ -z ${NPROC:-} ]] || train+=(--processes "$NPROC") # torchrun would take --nproc for its own
read -ra extra <<<"${EXTRA:-}"
train+=(${extra[@]+"${extra[@]}"})

launch=(vlm-dft)
needs=()
if [[ " ${train[*]} " != *" --dry-run "* ]]; then
  [[ -z ${ENGINE:-} ]] || needs=(deepspeed)
  if [[ ${NPROC:-1} != 1 || -n ${ENGINE:-} ]]; then # DeepSpeed wants its launcher for one process too
    launch=(torchrun --standalone --nproc_per_node "${NPROC:-1}" -m vlm_dft.cli)
  fi
fi

set_up ${needs[@]+"${needs[@]}"}
export TOKENIZERS_PARALLELISM=false # said once here, or tokenizers warn whenever the data loader forks
printf '+ %s\n' "${launch[*]} ${train[*]}" >&2
exec "${launch[@]}" "${train[@]}"
