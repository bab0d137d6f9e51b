# The server: built with the pinned toolchain, run as an unprivileged user.
#   docker build -t rheostat:0.1.0 .                          the CPU server
#   docker build --target cuda -t rheostat:0.1.0-cuda .       with the GPU's engine (deploy/cuda); run it with --gpus all
#   docker run -p 8080:8080 -p 50051:50051 -v rheostat-cache:/var/cache/rheostat rheostat:0.1.0
# With a configuration: docker run … -v ./rheostat.toml:/etc/rheostat/rheostat.toml:ro rheostat:0.1.0 \
#   serve --config /etc/rheostat/rheostat.toml

FROM rust:1.95-bookworm AS source
WORKDIR /src
COPY . .

FROM source AS build
# What cargo downloads and builds stays on the builder between builds; only the binary leaves this stage.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --locked --release -p rheostat \
    && install --strip target/release/rheostat /usr/local/bin/rheostat

FROM source AS build-cuda
# The compiler for GPUs comes by pip, see deploy/cuda/toolchain.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && deploy/cuda/toolchain /opt/cuda-toolchain
ENV CUDA_HOME=/opt/cuda-toolchain
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --locked --release -p rheostat --features cuda \
    && install --strip target/release/rheostat /usr/local/bin/rheostat

FROM debian:bookworm-slim AS base
# pip is how the catalogue's default model is fetched; ca-certificates serves the hub path. Debian mends packages of a
# release without changing what they do, so versions are left to it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 rheostat \
    && useradd --system --uid 10001 --gid rheostat --home-dir /var/cache/rheostat --create-home rheostat
ENV RHEOSTAT_CACHE=/var/cache/rheostat \
    RHEOSTAT_HTTP=0.0.0.0:8080 \
    RHEOSTAT_GRPC=0.0.0.0:50051
VOLUME /var/cache/rheostat
EXPOSE 8080 50051
# The first minutes are for pulling and loading the model.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["rheostat"]
CMD ["serve"]

FROM base AS cuda
# cuBLASLt comes by pip as well; the driver is the host's, which the container runtime brings in.
RUN python3 -m pip install --no-cache-dir --no-deps --target /opt/nvidia "nvidia-cublas==13.*"
ENV LD_LIBRARY_PATH=/opt/nvidia/nvidia/cu13/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RHEOSTAT_DEVICE=cuda
COPY --from=build-cuda /usr/local/bin/rheostat /usr/local/bin/rheostat
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001

# What is built where no target is named.
FROM base AS cpu
COPY --from=build /usr/local/bin/rheostat /usr/local/bin/rheostat
USER 10001:10001
