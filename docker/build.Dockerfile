# A build machine: compress, export (ONNX, TensorRT-RTX without a GPU), bundle, release, publish.
#   docker build -f docker/build.Dockerfile -t kilodelta-build .
#   docker run --rm -v "$PWD:/work" kilodelta-build kilodelta export base task.kd -o out
# With a GPU: docker run --gpus all; torch's wheel brings its own CUDA.
# This file has not been built: see docs/deploy.md.
FROM python:3.12-slim
WORKDIR /src
COPY . /src
RUN pip install --no-cache-dir -c constraints.txt '.[hf,onnx,cpu,rtx,report,peft,sign,mirror,gguf]'
WORKDIR /work
ENV KILODELTA_CACHE=/tmp/kilodelta
CMD ["kilodelta", "--help"]
