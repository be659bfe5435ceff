"""Asks a service of this container for its health, as the kubelet's gRPC probe does; exits with 0 where it serves.

Owns: the HEALTHCHECK of the images. Must not know: the services; reads nothing but its arguments and the probe port.
"""

from __future__ import annotations

import argparse
import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a service's health over gRPC.")
    parser.add_argument("service", nargs="?", default="", help="a service's full name; empty: whether it is alive")
    parser.add_argument("--address", default=f"127.0.0.1:{os.environ.get('OUTRIDER_PROBE_PORT', '8081')}")
    parser.add_argument("--timeout-s", type=float, default=2.0)
    options = parser.parse_args()
    with grpc.insecure_channel(options.address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=options.service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=options.timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            sys.stderr.write(f"{options.address}: {error.code().name}: {error.details()}\n")
            return 1
    sys.stdout.write(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) + "\n")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
