# A device: apply, rollback, run, status, pull. No torch, no onnx.
#   docker build -f docker/device.Dockerfile -t kilodelta-device .
#   docker run --rm -v /srv/model:/device kilodelta-device kilodelta apply /device /device/task-7.kd
#
# ONNX Runtime on the CPU needs no more than this base. For TensorRT take the JetPack's own image and
# run with `--runtime nvidia --gpus all`:
#   JetPack 6    --build-arg BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0    Ubuntu 22.04, Python 3.10
#   JetPack 7.2  --build-arg BASE=ubuntu:24.04, and TensorRT 10.16 from NVIDIA's apt repository
# These names are from NVIDIA's documentation. This file has not been built: see docs/deploy.md.
ARG BASE=ubuntu:24.04
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
# The system's packages stay visible: TensorRT's Python module is one of them.
RUN python3 -m venv --system-site-packages /opt/kilodelta \
    && /opt/kilodelta/bin/pip install --no-cache-dir -c /src/constraints.txt '/src[cpu,trust,mirror]'
ENV PATH=/opt/kilodelta/bin:$PATH KILODELTA_CACHE=/tmp/kilodelta
CMD ["kilodelta", "doctor"]
