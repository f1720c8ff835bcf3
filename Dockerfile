# syntax=docker/dockerfile:1
# The image of every pod: gateways, leaders, ranks, Ray's head, `packtrain serve`.
#
#   docker build -t packtrain:0.2.0 .                                        # CPU
#   docker build -t packtrain:0.2.0-cuda --build-arg TARGET=cuda .           # GPU: torch with CUDA, Triton's compiler
#
# Bases by digest: --build-arg BASE=docker.io/library/debian@sha256:…
# TORCH is what pip installs; for a CPU build of torch from an index of yours, PIP_INDEX_URL or PIP_EXTRA_INDEX_URL as build arguments,
# or a wheel in the build context: --build-arg TORCH=./torch-2.13.0+cpu-….whl
# What the steps do is in image/*.sh, so that they can be run and tested without a container engine (tests/packaging/test_image.py).
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG TARGET=cpu

FROM ${BASE} AS build
ARG TARGET TORCH PIP_INDEX_URL PIP_EXTRA_INDEX_URL DEMO_MODEL=1
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . .
RUN PREFIX=/opt/packtrain image/build.sh

FROM ${BASE} AS base
# libgomp is torch's; procps, wget are what KubeRay's and people's commands expect.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 procps wget && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 packtrain && useradd --uid 10001 --gid 10001 --home-dir /home/packtrain --create-home packtrain
COPY --from=build /opt/packtrain /opt/packtrain
ENV PATH=/opt/packtrain/bin:$PATH \
    PACKTRAIN_CACHE=/opt/packtrain/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /home/packtrain
EXPOSE 50051 8000 50052 9464
ENTRYPOINT []
CMD ["packtrain", "--help"]
LABEL org.opencontainers.image.title="packtrain" org.opencontainers.image.licenses="Apache-2.0"

FROM base AS cpu

# Triton compiles a launcher in C when a kernel is first used, so a GPU image has gcc and, at run time, TRITON_CACHE_DIR below HOME.
FROM base AS cuda
USER root
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${TARGET}
