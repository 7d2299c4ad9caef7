# The environment of a GPU node: requirements/gpu.txt, Transformer Engine, the project with its CUDA kernels.
# Written for docker and podman; it has not been built on a machine of ours yet (docs/guides/cluster.md).
#
#   docker build -t megatron-egrsd .
#   docker run --gpus all --network host --ipc host --ulimit memlock=-1 -v /models:/models -v "$PWD":/work -w /work \
#       -e MODEL=/models/Qwen3-8B -e DATA=data/train.jsonl megatron-egrsd bash /opt/megatron_egrsd/examples/run_qwen3_8b_cl_egrsd.sh
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# numactl, the RDMA libraries: SGLang and NCCL load them where a node has the hardware. tini: signals reach the script.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3.12 python3.12-dev python3.12-venv g++ ninja-build git libnuma1 numactl libibverbs1 librdmacm1 tini \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH CUDA_HOME=/usr/local/cuda

# First what changes least: a new line of code does not download torch again.
COPY requirements/gpu.txt /opt/megatron_egrsd/requirements/
RUN pip install --no-cache-dir setuptools wheel && pip install --no-cache-dir -r /opt/megatron_egrsd/requirements/gpu.txt
ARG TRANSFORMER_ENGINE=1
RUN [ "$TRANSFORMER_ENGINE" = 0 ] || pip install --no-cache-dir --no-build-isolation "transformer-engine[pytorch]"

COPY . /opt/megatron_egrsd
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e /opt/megatron_egrsd
ENTRYPOINT ["tini", "--"]
CMD ["megatron-egrsd", "doctor"]
