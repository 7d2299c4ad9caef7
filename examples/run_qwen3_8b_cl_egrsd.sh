#!/usr/bin/env bash
# CL-EGRSD on Qwen3-8B, on one node or many: run this same script on every node.
#
#   MODEL=/models/Qwen3-8B DATA=/data/train.jsonl bash examples/run_qwen3_8b_cl_egrsd.sh
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MODEL=... DATA=... bash examples/run_qwen3_8b_cl_egrsd.sh
#
# Placement is disaggregated: of every node the first NPROC_PER_NODE GPUs train and the others run SGLang, which the
# node's first training rank starts and ends. With ROLLOUT_URLS all GPUs train, and the servers are the user's.
# COLOCATED=1: all GPUs train and run SGLang, in turns.
#
# Further words are overrides: bash ... --optimizer.lr 2e-6 --steps 50, or --dry-run. All other settings, the parallel
# layout among them, are in CONFIG. Nothing is downloaded. SIGTERM to any node's script saves and ends all of them with
# status 0; the same command continues. Status: 0 done or saved, 2 if this script refuses, 1 for a failure under torchrun,
# 143 for SIGTERM while torchrun has no ranks yet, because the nodes wait for each other.
# The whole script has run on CPU, on one host and on two (tests/end_to_end/test_multi_node.py), but not on a GPU yet.
# docs/guides/cluster.md and docs/guides/reliability.md say more.
set -euo pipefail

fail() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}
positive() { [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || fail "$1 is '${!1}'; it must be a positive whole number"; }

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# What to train, on what, and where to.
MODEL="${MODEL:-models/Qwen3-8B}"            # directory of the Hugging Face checkpoint, at the same path on every node
DATA="${DATA:-data/train.jsonl}"             # problem, answer, solution; the same file on every node (docs/guides/data.md)
EVAL_DATA="${EVAL_DATA:-}"                   # held-out problems; empty: no evaluation
OUTPUT="${OUTPUT:-runs/qwen3-8b-cl-egrsd}"   # new or empty, or a run to continue; every node must see it
RESUME="${RESUME-auto}"                      # continue from OUTPUT's newest intact checkpoint; empty: only a new OUTPUT
SAVE_SECONDS="${SAVE_SECONDS:-600}"          # that torchrun leaves its ranks to save after SIGTERM, or after a failure
CONFIG="${CONFIG:-$here/configs/qwen3_8b_cl_egrsd.yaml}"  # layout and hyper-parameters

# The nodes. Slurm's own numbering is used where NODE_RANK is not given.
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"  # 0 is the first node
MASTER_ADDR="${MASTER_ADDR:-}"               # an address of the first node that every node reaches
MASTER_PORT="${MASTER_PORT:-29500}"          # a free port on the first node, the same value everywhere
RENDEZVOUS_TIMEOUT="${RENDEZVOUS_TIMEOUT:-900}"  # seconds that nodes wait for each other at the start

# Their GPUs.
ROLLOUT_URLS="${ROLLOUT_URLS:-}"             # servers that already run, separated by commas; empty: launch them here
COLOCATED="${COLOCATED:-0}"                  # 1: SGLang on the GPUs that train, in turns
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
if [[ -n "$ROLLOUT_URLS" || "$COLOCATED" == 1 ]]; then
    NPROC_PER_NODE="${NPROC_PER_NODE:-$GPUS_PER_NODE}"          # training ranks of each node: all GPUs
else
    NPROC_PER_NODE="${NPROC_PER_NODE:-$(((GPUS_PER_NODE + 1) / 2))}"  # or half of them, the others sample
fi
# What is trained: adapters (LoRA) as in the paper, or all weights.
LORA_RANK="${LORA_RANK:-}"                   # rank of the adapters; 0: all weights; empty: CONFIG's, which is 64
FULL_TENSOR="${FULL_TENSOR:-4}"              # TP for all weights (LORA_RANK=0); recomputation is on then
[[ "$LORA_RANK" =~ ^(|0|[1-9][0-9]*)$ ]] || fail "LORA_RANK is '$LORA_RANK'; it must be a whole number, 0 for all weights"
[[ "$LORA_RANK" != 0 ]] || TENSOR="${TENSOR:-$FULL_TENSOR}"
# TENSOR, PIPELINE, VIRTUAL_PIPELINE, CONTEXT, EXPERT and ENGINE_TENSOR replace the layout of CONFIG if they are set.

for name in NNODES MASTER_PORT RENDEZVOUS_TIMEOUT SAVE_SECONDS GPUS_PER_NODE NPROC_PER_NODE FULL_TENSOR \
    ${TENSOR:+TENSOR} ${PIPELINE:+PIPELINE} ${VIRTUAL_PIPELINE:+VIRTUAL_PIPELINE} ${CONTEXT:+CONTEXT} \
    ${EXPERT:+EXPERT} ${ENGINE_TENSOR:+ENGINE_TENSOR}; do
    positive "$name"
done
[[ "$COLOCATED" == [01] ]] || fail "COLOCATED is '$COLOCATED'; it must be 0 or 1"
if ((COLOCATED)); then
    [[ -z "$ROLLOUT_URLS" ]] || fail "COLOCATED=1 launches its servers, and ROLLOUT_URLS names others; set one of them"
fi
dry_run=0
for word in "$@"; do [[ "$word" != --dry-run ]] || dry_run=1; done
if ((NNODES == 1 || dry_run)); then  # one process plans for every rank of every node
    NODE_RANK="${NODE_RANK:-0}"
    MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
fi
[[ -n "$MASTER_ADDR" ]] || fail "MASTER_ADDR is not set; with NNODES=$NNODES every node needs the first node's address"
if ! [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ && "$NODE_RANK" -lt "$NNODES" ]]; then
    fail "NODE_RANK is '$NODE_RANK'; it must be this node's number, 0 to $((NNODES - 1))"
fi
[[ -f "$CONFIG" ]] || fail "there is no configuration file $CONFIG; set CONFIG"
[[ -f "$MODEL/config.json" ]] || fail "there is no Hugging Face checkpoint in $MODEL (no config.json); set MODEL"
[[ -f "$DATA" ]] || fail "there is no training file $DATA; set DATA (megatron-egrsd prepare-data makes one)"
[[ -z "$EVAL_DATA" || -f "$EVAL_DATA" ]] ||
    fail "there is no evaluation file $EVAL_DATA; set EVAL_DATA, or leave it empty"
command -v torchrun >/dev/null || fail "torchrun is not on PATH; activate the environment that megatron_egrsd is in"

MODEL_ARGS=(
    --model.path "$MODEL"
    ${LORA_RANK:+--lora.rank "$LORA_RANK"}
)
DATA_ARGS=(
    --data.train "$DATA"
    --data.evaluation "$EVAL_DATA"
)
ROLLOUT_ARGS=(
    ${ENGINE_TENSOR:+--rollout.servers.tensor_parallel "$ENGINE_TENSOR"}  # TP of each launched SGLang server
)
PARALLEL_ARGS=(
    ${TENSOR:+--parallel.tensor "$TENSOR"}          # TP; keep it within a node
    ${TENSOR:+--parallel.sequence_parallel "$( ((TENSOR > 1)) && echo true || echo false)"}  # needs TP > 1
    ${PIPELINE:+--parallel.pipeline "$PIPELINE"}    # PP; may cross nodes
    ${VIRTUAL_PIPELINE:+--parallel.virtual_pipeline "$VIRTUAL_PIPELINE"}  # VPP; chunks of layers a stage
    ${CONTEXT:+--parallel.context "$CONTEXT"}       # CP; ranks that share each sequence
    ${EXPERT:+--parallel.expert "$EXPERT"}          # EP; ranks of a stage that share a mixture's experts
)
RUN_ARGS=(
    --output "$OUTPUT"
    ${RESUME:+--checkpoint.resume "$RESUME"}
    ${SEED:+--seed "$SEED"}  # data order and sampling
)
TRAIN=(
    train --config "$CONFIG" "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${RUN_ARGS[@]}"
)
if [[ -n "$ROLLOUT_URLS" ]]; then
    ROLLOUT_ARGS+=(--rollout.servers.urls "[\"${ROLLOUT_URLS//,/\",\"}\"]")
else
    # GPUs of each server to launch, and of all servers of a node; without COLOCATED they lie behind those of the ranks.
    ENGINE_TENSOR="${ENGINE_TENSOR:-$(megatron-egrsd "${TRAIN[@]}" "$@" --print rollout.servers.tensor_parallel)}" || exit
    serving=$((COLOCATED ? GPUS_PER_NODE : GPUS_PER_NODE - NPROC_PER_NODE))
    ((serving >= ENGINE_TENSOR)) || fail "an SGLang server takes $ENGINE_TENSOR GPU(s), and GPUS_PER_NODE=$GPUS_PER_NODE, \
NPROC_PER_NODE=$NPROC_PER_NODE and COLOCATED=$COLOCATED leave $serving; change one of them, or set ROLLOUT_URLS"
    ROLLOUT_ARGS+=(--rollout.servers.engines "$((serving / ENGINE_TENSOR))")
    if ((COLOCATED)); then
        ROLLOUT_ARGS+=(--rollout.servers.colocated true --rollout.sync.transport ipc)  # NCCL: one process on a GPU
    fi
fi
TORCHRUN_ARGS=(
    --nnodes "$NNODES"
    --node-rank "$NODE_RANK"
    --nproc-per-node "$NPROC_PER_NODE"
    --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT"
    --rdzv-conf "timeout=$RENDEZVOUS_TIMEOUT"
    --shutdown-timeout "$SAVE_SECONDS"
    --max-restarts 0  # a failure ends the job on every node; submit the same job again, and it continues
)

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"                            # torchrun's own choice, without its warning
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"    # megatron-core: TP overlap before Blackwell

TRAIN+=("${ROLLOUT_ARGS[@]}" "$@")
((!dry_run)) || exec megatron-egrsd "${TRAIN[@]}" --world-size "$((NNODES * NPROC_PER_NODE))"

# The ranks are told to stop, not torchrun, if there are any: it would pass the signal on, but report a failure. Job
# control gives it a process group of its own, which Ctrl-C then has to be passed on to.
set -m
torchrun "${TORCHRUN_ARGS[@]}" -m megatron_egrsd.cli "${TRAIN[@]}" &
launcher=$!
trap 'kill -TERM $(ps -o pid= --ppid "$launcher" || echo "$launcher") 2>/dev/null || true' TERM
trap 'kill -INT -- "-$launcher" 2>/dev/null || true' INT
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done  # a trap interrupts the first wait
wait "$launcher"
