# Every example in one container: all extras, and a C++ compiler for sums in C++. The extra `kernels` is left out: it holds jax at an old version,
# and wants an environment of its own. NOT BUILT by the authors: no container runtime was at hand where this was written.
#
#   docker build -f Dockerfile --build-arg USER_ID=$(id -u) --build-arg GROUP_ID=$(id -g) -t nvidiaconda .
#   docker run --gpus all -i -v .:/pai -w /pai -t nvidiaconda /bin/bash
#
# torch brings its own CUDA libraries; of the machine it needs the driver, which the NVIDIA runtime hands in.
FROM ubuntu:24.04

ARG USER_ID=1000
ARG GROUP_ID=1000
ENV DEBIAN_FRONTEND=noninteractive NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY . /opt/pilimit
RUN pip install --no-cache-dir "/opt/pilimit[images,cox,dendrites,lab,tensorboard,wandb,hub]"
# the image has a user of number 1000 already: -o
RUN (getent group ${GROUP_ID} || groupadd -g ${GROUP_ID} user) && useradd -o -m -u ${USER_ID} -g ${GROUP_ID} user
USER user
WORKDIR /pai
