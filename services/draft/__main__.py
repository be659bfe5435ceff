"""`python -m services.draft`: one draft worker, configured by flags or OUTRIDER_* variables."""

from __future__ import annotations

from services.common.worker_main import worker_command
from services.draft.config import DraftConfig


def _serve(config: DraftConfig) -> None:
    import uvloop

    from services.draft.server import serve

    uvloop.run(serve(config))


main = worker_command(DraftConfig, "draft", "Serve a draft worker: proposes tokens.", _serve)

if __name__ == "__main__":
    main()
