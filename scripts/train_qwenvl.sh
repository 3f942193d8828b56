#!/usr/bin/env bash
# The front door: fine-tune a Qwen2.5-VL with DFT, evaluate it before and after, and show the result.
#
#   bash scripts/train_qwenvl.sh                      a tiny model on a drawn set: any machine, 2 cores, under 8 minutes
#   OBJECTIVE=dft,nll bash scripts/train_qwenvl.sh    DFT and plain SFT from the same start, compared
#   MODEL=Qwen/Qwen2.5-VL-3B-Instruct RECIPE=wethink ENGINE=zero2 NPROC=8 bash scripts/train_qwenvl.sh
#                                                     the paper's setting: 8 GPUs of 80 GB, 1 epoch, lr 5e-5
#   ENGINE=zero3_offload NPROC=1 ... or ENGINE=fsdp2 NPROC=8 ...    other engines: scripts/engines/
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 NPROC=8 ...           on each of two nodes, NODE_RANK=1 on the other (torchrun)
#   HOSTFILE=hosts ENGINE=zero3 ...                                 on the first node alone (DeepSpeed's launcher, by ssh)
#
# Variables, all optional (unset ones are decided by the recipe and by vlm_dft/config.py):
#   MODEL      tiny, a hub id or a folder (tiny)          OUTPUT     the run folder (runs/...)
#   RECIPE     what to train on (drawn)                   LORA       rank of a low-rank adapter (train all weights)
#   DATA       where the recipe's files lie               NPROC      processes of this node, one a GPU (1)
#   OBJECTIVE  dft, nll, floor ..., or several (dft)      ENGINE     zero2, zero3, zero3_offload, fsdp2, your own .json (none: DDP)
#   BENCHMARK  what to evaluate on (the recipe's own)     EXTRA      more words for `vlm-dft train`
# Several nodes: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT (29500); or HOSTFILE, lines of `name slots=8`. OUTPUT must then lie
# on a disk that all nodes share, and this checkout and its environment at the same path on each.
# Words after the script's name go to `vlm-dft train` too: --dry-run prints the resolved run and stops. --engine and --nproc among
# them are ENGINE and NPROC.
#
# Result: a table (base and trained: accuracy, standard error, count) and, in OUTPUT, the checkpoint, report.json and
# report.html. Interrupted? The same command resumes. First use makes .venv: see scripts/setup.sh.
# Exit status: 0 done; 2 something to put right; 143 after SIGTERM, 130 after Ctrl-C, both once the step is saved.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Splits words into those that choose the launcher, which become ENGINE and NPROC, and the rest, left in `rest`.
take_launcher() {
  local name
  rest=()
  while (($#)); do
    case $1 in
      --engine=* | --nproc=* | --processes=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --engine | --nproc | --processes)
        name=NPROC
        [[ $1 != --engine ]] || name=ENGINE
        (($# > 1)) || die "$1 needs a value."
        [[ $name == ENGINE || ${NNODES:-1} == 1 ]] || die "On several nodes NPROC= says the processes of each. Leave out $1 $2."
        [[ -z ${!name:-} || ${!name} == "$2" ]] || die "$name=${!name}, but $1 $2. Leave out one of them."
        printf -v "$name" %s "$2"
        shift 2
        ;;
      *) rest+=("$1") && shift ;;
    esac
  done
}

take_launcher "$@"
train=(train ${rest[@]+"${rest[@]}"})
read -ra extra <<<"${EXTRA:-}"
take_launcher ${extra[@]+"${extra[@]}"}
extra=(${rest[@]+"${rest[@]}"})
for name in MODEL RECIPE DATA OBJECTIVE BENCHMARK OUTPUT LORA ENGINE; do
  [[ -z ${!name:-} ]] || train+=("--$(tr '[:upper:]' '[:lower:]' <<<"$name")" "${!name}")
done

port=${MASTER_PORT:-29500} needs=() launch=(vlm-dft)
[[ ${NNODES:-1}${NPROC:-1}${NODE_RANK:-0}$port =~ ^[0-9]+$ && ${NNODES:-1} != 0 && ${NPROC:-1} != 0 ]] ||
  die "Expected whole numbers. Found NNODES=${NNODES:-1} NPROC=${NPROC:-1} NODE_RANK=${NODE_RANK:-0} MASTER_PORT=$port."
processes=$((${NPROC:-1} * ${NNODES:-1}))
if [[ -n ${HOSTFILE:-} ]]; then
  [[ -z ${NNODES:-}${NODE_RANK:-} ]] || die "HOSTFILE names the nodes: leave out NNODES and NODE_RANK."
  [[ -f $HOSTFILE ]] || die "No file at HOSTFILE=$HOSTFILE. Expected lines of \`name slots=8\`, one a node."
  processes=$(awk '!/^[ \t]*(#|$)/ { if ($2 !~ /^slots=[1-9][0-9]*$/) { n = 0; exit }; sub("slots=", "", $2); n += $2 }
    END { print n + 0 }' "$HOSTFILE")
  ((processes > 0)) || die "Expected lines of \`name slots=8\` in HOSTFILE=$HOSTFILE, one a node. Found others, or none."
  [[ ${NPROC:-$processes} == "$processes" ]] || die "HOSTFILE has $processes slots, NPROC says $NPROC. Leave out NPROC."
elif ((${NNODES:-1} > 1)); then
  [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
    die "NNODES=$NNODES needs NODE_RANK (0 to $((NNODES - 1)), another on each node) and MASTER_ADDR (of node 0)."
  ((NODE_RANK < NNODES)) || die "NODE_RANK=$NODE_RANK, expected 0 to $((NNODES - 1)): NNODES=$NNODES."
elif [[ ${NODE_RANK:-0} != 0 ]]; then
  die "NODE_RANK=$NODE_RANK without NNODES. Say how many nodes there are: NNODES=."
fi
[[ -z ${NPROC:-}${NNODES:-}${HOSTFILE:-} ]] || train+=(--processes "$processes") # torchrun would take --nproc for its own
train+=(${extra[@]+"${extra[@]}"})

if [[ " ${train[*]} " != *" --dry"[-_]"run "* ]]; then
  if [[ -n ${HOSTFILE:-} ]]; then # this launcher starts processes of any engine
    launch=(deepspeed --hostfile "$HOSTFILE" --master_port "$port" --no_local_rank --module vlm_dft.cli)
    [[ -z ${MASTER_ADDR:-} ]] || launch=("${launch[0]}" --master_addr "$MASTER_ADDR" "${launch[@]:1}")
    needs=(deepspeed)
  elif ((${NNODES:-1} > 1)); then
    launch=(vlm-dft-launch --nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$port")
    launch+=(--nproc_per_node "${NPROC:-1}" -m vlm_dft.cli)
  elif [[ ${NPROC:-1} != 1 || -n ${ENGINE:-} ]]; then # DeepSpeed wants its launcher for one process too
    launch=(vlm-dft-launch --standalone --nproc_per_node "${NPROC:-1}" -m vlm_dft.cli)
  fi
  [[ -z ${ENGINE:-} || $ENGINE == fsdp2 ]] || grep -qs '"fsdp_config"' "$ENGINE" || needs=(deepspeed)
fi

set_up ${needs[@]+"${needs[@]}"}
export TOKENIZERS_PARALLELISM=false # said once here, or tokenizers warn whenever the data loader forks
{ printf '+' && printf ' %q' "${launch[@]}" "${train[@]}" && echo; } >&2
if [[ ${launch[0]} == deepspeed ]]; then # by ssh, which carries no variables over: the launcher reads them from this file
  DS_ENV_FILE=$(mktemp)
  export DS_ENV_FILE
  trap 'rm -f "$DS_ENV_FILE"' EXIT
  carried='HF_|NCCL_|GLOO_|VLM_DFT_|WANDB_|OMP_|DS_ACCELERATOR|TOKENIZERS_'
  env | grep -E "^($carried)[A-Z0-9_]*=" >"$DS_ENV_FILE"
  "${launch[@]}" "${train[@]}"
  exit
fi
exec "${launch[@]}" "${train[@]}"
