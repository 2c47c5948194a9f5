# docker build -t shiftnet .                          for CPUs
# docker build -t shiftnet --build-arg EXTRA=cuda .   for NVIDIA GPUs (the image has CUDA's libraries)
# docker run --shm-size=2g -v "$PWD:/work" shiftnet train --config shiftresnet20_c100
# With GPUs add --gpus all. Batches of image files pass through /dev/shm, of which Docker gives 64 MB
# unless told otherwise: with less room fewer processes decode, and the run says so.
FROM python:3.12-slim
# Compiles the CPU's convolutions when a network is first traced.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG EXTRA=""
COPY . /src
RUN pip install --no-cache-dir "/src${EXTRA:+[$EXTRA]}" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["shiftnet"]
