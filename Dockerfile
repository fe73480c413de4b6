# Every example in one container. NOT BUILT by the authors: no container runtime was at hand where this was written.
#
#   docker build -f Dockerfile --build-arg USER_ID=$(id -u) --build-arg GROUP_ID=$(id -g) -t nvidiaconda .
#   docker run --gpus all -i -v .:/pai -w /pai -t nvidiaconda /bin/bash
FROM nvidia/cuda:12.4.1-cudnn-runtime-ubuntu22.04

ARG USER_ID=1000
ARG GROUP_ID=1000
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates git && rm -rf /var/lib/apt/lists/*
COPY --from=continuumio/miniconda3:latest /opt/conda /opt/conda
ENV PATH=/opt/conda/bin:$PATH
COPY . /opt/pilimit
RUN conda create -y -n pai -c conda-forge --override-channels python=3.11 pip \
    && /opt/conda/envs/pai/bin/pip install --no-cache-dir "/opt/pilimit[images,dendrites]"
RUN (getent group ${GROUP_ID} || groupadd -g ${GROUP_ID} user) && useradd -m -u ${USER_ID} -g ${GROUP_ID} user
ENV PATH=/opt/conda/envs/pai/bin:$PATH
USER user
WORKDIR /pai
