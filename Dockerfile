# The CPU server: built with the pinned toolchain, run as an unprivileged user.
#   docker build -t rheostat .
#   docker run -p 8080:8080 -p 50051:50051 -v rheostat-cache:/var/cache/rheostat rheostat
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release -p rheostat && strip target/release/rheostat

FROM debian:bookworm-slim
# pip is how the catalogue's default model is fetched; ca-certificates serves the hub path.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/cache/rheostat --create-home rheostat
COPY --from=build /src/target/release/rheostat /usr/local/bin/rheostat
USER rheostat
ENV RHEOSTAT_CACHE=/var/cache/rheostat \
    RHEOSTAT_HTTP=0.0.0.0:8080 \
    RHEOSTAT_GRPC=0.0.0.0:50051
VOLUME /var/cache/rheostat
EXPOSE 8080 50051
STOPSIGNAL SIGTERM
ENTRYPOINT ["rheostat"]
CMD ["serve"]
