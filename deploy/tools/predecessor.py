"""`python -m deploy.tools.predecessor REF FOLDER`: the services as of an earlier commit, with stubs of their own.

Owns: what of that commit is taken, and how its stubs are made. Must not know: who runs it.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from grpc_tools import protoc


def check_out(ref: str, folder: Path) -> None:
    """Replaces what is in `folder`; its file COMMIT names the commit.

    Raises SystemExit where git knows no such commit, or its protos are at fault.
    """
    archive = subprocess.run(["git", "archive", ref, "services", "protos"], capture_output=True, check=False)
    if archive.returncode:
        sys.exit(f"predecessor: {archive.stderr.decode().strip()}")
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    commit = subprocess.run(["git", "rev-parse", "--short", ref], capture_output=True, text=True, check=True)
    (folder / "COMMIT").write_text(commit.stdout.strip())
    protos, stubs = folder / "protos", folder / "protos" / "gen"
    stubs.mkdir()
    sources = sorted(str(path) for path in protos.glob("outrider/v1/*.proto"))
    outputs = [f"--python_out={stubs}", f"--grpc_python_out={stubs}"]
    if protoc.main(["protoc", f"-I{protos}", *outputs, *sources]):
        sys.exit(f"predecessor: the protos of {ref} make no stubs")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m deploy.tools.predecessor REF FOLDER")
    check_out(sys.argv[1], Path(sys.argv[2]))
