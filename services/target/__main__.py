"""`python -m services.target`: one target worker, configured by flags or OUTRIDER_* variables."""

from __future__ import annotations

from services.common.worker_main import worker_command
from services.target.config import TargetConfig


def _serve(config: TargetConfig) -> None:
    import uvloop

    from services.target.server import serve

    uvloop.run(serve(config))


main = worker_command(TargetConfig, "target", "Serve a target worker: verifies proposals and decodes.", _serve)

if __name__ == "__main__":
    main()
