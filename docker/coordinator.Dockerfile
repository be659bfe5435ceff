# The coordinator: no torch, no pip, no compiler. Also downloads models (`hf download`).
# Left out is what nobody here imports: the Kubernetes client's asynchronous half, which is larger than all of gRPC, and
# the HTTP client that it alone needs; tests; the sample draft's weights; sources and debug symbols of compiled modules.
# Build context: the repository's root. pip's configuration is mounted as the secret `pip` and stays out of the image.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

FROM ${BASE_IMAGE} AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && \
    apt-get install -y --no-install-recommends binutils ca-certificates python3 python3-venv && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log
WORKDIR /build
COPY constraints.txt pyproject.toml README.md ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/build-ca.pem \
    python3 -m venv tools && \
    tools/bin/pip install -c constraints.txt setuptools grpcio-tools && \
    python3 -m venv --without-pip /opt/outrider && \
    mkdir -p services protos/gen && touch services/__init__.py && \
    tools/bin/pip --python /opt/outrider/bin/python install -c constraints.txt '.[kubernetes,traces]'
COPY protos protos
COPY services services
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/build-ca.pem \
    mkdir -p protos/gen && \
    tools/bin/python -m grpc_tools.protoc -Iprotos --python_out=protos/gen --grpc_python_out=protos/gen protos/outrider/v1/*.proto && \
    tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . && \
    tools/bin/pip --python /opt/outrider/bin/python install --no-deps --no-index --force-reinstall dist/*.whl && \
    tools/bin/pip --python /opt/outrider/bin/python uninstall --yes \
        aiohttp aiohttp-retry aiohappyeyeballs aiosignal attrs frozenlist multidict propcache yarl && \
    find /opt/outrider -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + && \
    find /opt/outrider -type f \( -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' -o -name '*.h' -o -name '*.a' \) -delete && \
    strip --strip-debug /opt/outrider/lib/python3*/site-packages/uvloop/*.so /opt/outrider/lib/python3*/site-packages/yaml/*.so && \
    rm -rf /opt/outrider/lib/python3*/site-packages/kubernetes/aio /opt/outrider/lib/python3*/site-packages/services/engine/sample_draft /opt/outrider/lib/python3*/site-packages/services/engine/sample_head

FROM ${BASE_IMAGE}
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates python3 && \
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
EXPOSE 50051 8081 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "/usr/local/lib/outrider/healthcheck.py", "outrider.v1.CoordinatorService"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["outrider", "serve", "coordinator"]
