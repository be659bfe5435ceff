# The workers: stages `draft` and `target` over one installation, so that a node holds its layers once.
# pip is part of it, since `--model sample` downloads with pip. CPU by default; VARIANT=cuda with a CUDA base adds the compiler with which Triton builds its launchers.
# Build context: the repository's root. pip's configuration is mounted as the secret `pip` and stays out of the image.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

FROM ${BASE_IMAGE} AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates python3 python3-venv && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log
WORKDIR /build
COPY constraints.txt pyproject.toml README.md ./
# Where torch comes from, if not from pip's configured index; PyTorch's own page lists an index for each build.
ARG TORCH_INDEX_URL=
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/build-ca.pem \
    python3 -m venv tools && \
    tools/bin/pip install -c constraints.txt setuptools grpcio-tools && \
    python3 -m venv /opt/outrider && \
    tools/bin/pip --python /opt/outrider/bin/python install -c constraints.txt \
        ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch && \
    mkdir -p services protos/gen && touch services/__init__.py && \
    tools/bin/pip --python /opt/outrider/bin/python install -c constraints.txt '.[engine,cuda,traces]' && \
    tools/bin/pip install -c constraints.txt --no-deps --target /opt/int8 torchao
COPY protos protos
COPY services services
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/build-ca.pem \
    mkdir -p protos/gen && \
    tools/bin/python -m grpc_tools.protoc -Iprotos --python_out=protos/gen --grpc_python_out=protos/gen protos/outrider/v1/*.proto && \
    tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . && \
    tools/bin/pip --python /opt/outrider/bin/python install --no-deps --no-index --force-reinstall dist/*.whl

FROM ${BASE_IMAGE} AS runtime
ARG VARIANT=cpu
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates python3 libgomp1 && \
    if [ "${VARIANT}" = cuda ]; then apt-get install -y --no-install-recommends gcc libc6-dev python3-dev; fi && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log && \
    useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin outrider && \
    install -d -o outrider -g outrider /models
COPY docker/healthcheck.py /usr/local/lib/outrider/healthcheck.py
COPY --from=builder /opt/outrider /opt/outrider
# Everything that is written goes to /tmp and /models: the root file system may be read-only.
ENV PATH=/opt/outrider/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    OUTRIDER_CACHE_DIR=/models OUTRIDER_HOST=0.0.0.0
USER 10001:10001
WORKDIR /tmp
VOLUME /tmp /models
STOPSIGNAL SIGTERM

FROM runtime AS draft
# Only drafts are quantised, and whatever imports transformers loads this as well, where it is there.
COPY --from=builder /opt/int8 /opt/int8
ENV PYTHONPATH=/opt/int8
EXPOSE 50052 8081 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python", "/usr/local/lib/outrider/healthcheck.py", "outrider.v1.DraftService"]
ENTRYPOINT ["outrider", "serve", "draft"]

FROM runtime AS target
EXPOSE 50053 8081 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python", "/usr/local/lib/outrider/healthcheck.py", "outrider.v1.TargetService"]
ENTRYPOINT ["outrider", "serve", "target"]
