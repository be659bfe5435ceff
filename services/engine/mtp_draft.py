"""A draft of several heads on the target's features (services.engine.mtp_heads), loaded from its directory.

Owns: its weights, and the newest feature of each sequence. Must not know: proposals, the wire, training. Without a
feature, as on a sequence that was just opened, a head has the token alone, as in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from services.common.errors import ConfigError, ModelUnsupported
from services.common.values import ModelInfo
from services.engine import digest
from services.engine.models import load_config, torch_device, torch_dtype
from services.engine.mtp_heads import foresee
from services.engine.paged_model import LogitsSampler
from services.engine.prepare import display_name, resolve_model
from services.engine.progress import Reporter
from services.engine.sequence import Sequence
from services.engine.step import Sampled, Work
from services.engine.trained_draft import MTP, ReducedHead, embedding_scale, read_ends, read_manifest, skeleton


@dataclass(frozen=True, slots=True)
class MtpOptions:
    """What to load and where. `target`: that it was trained for; empty: as its directory names it."""

    model: str
    cache_dir: Path
    target: str = ""
    name: str = ""
    dtype: str = "float32"
    device: str = "cpu"


class MtpDraftModel:
    """Steps of all sequences that lack a token, one token each. Called by the engine thread alone."""

    def __init__(self, directory: Path, target: Path, info: ModelInfo, sampler: LogitsSampler) -> None:
        """Raises ModelUnsupported for another target than the one it was trained for."""
        config = load_config(directory)
        manifest = read_manifest(config)
        ends, weights = read_ends(target), load_file(directory / "model.safetensors")
        if manifest is None or ends.digest != manifest.embedding_digest:
            raise ModelUnsupported(f"{directory.name} was trained for another target than {target.name}")
        self.info = info
        self._device, dtype = torch_device(info.device), torch_dtype(info.dtype)
        scale = embedding_scale(skeleton(config, "sdpa"))
        head_ids = weights["head_ids"].long()
        head = ends.head[head_ids].float() @ weights["output_projection"].float()
        self._embedding = (ends.embedding.float() * scale).to(self._device, dtype)
        self._down, self._up = (weights[name].to(self._device, dtype) for name in ("mtp_down", "mtp_up"))
        self._head = ReducedHead(head, head_ids, manifest.vocab_size).to(self._device, dtype)
        self._sampler = sampler
        self._features: dict[Sequence, Tensor] = {}

    @property
    def num_heads(self) -> int:
        """Most tokens of a proposal."""
        return len(self._down)

    def take(self, sequence: Sequence, features: bytes) -> None:
        """Tokens were committed, and `features` came with them: float16 rows, the last one of the last token."""
        size = 2 * self._embedding.shape[1]
        self._features.pop(sequence, None)
        if features and not len(features) % size:
            row = torch.frombuffer(bytearray(features[-size:]), dtype=torch.float16)
            self._features[sequence] = torch.nan_to_num(row.to(self._device, self._embedding.dtype))

    def forget(self, sequence: Sequence) -> None:
        """The sequence is closed."""
        self._features.pop(sequence, None)

    @torch.inference_mode()
    def step(self, works: list[Work]) -> list[Sampled | None]:
        """A token behind those drafted so far, of which there are fewer than heads; None ends the proposal."""
        return self._sampler.sample(works, self.forward(works))

    @torch.inference_mode()
    def forward(self, works: list[Work]) -> Tensor:
        """Float32 logits [number of works, V]."""
        sequences = [work.sequence for work in works]
        last = torch.tensor([s.tokens[s.num_committed - 1] for s in sequences], device=self._device)
        embedded, missing = self._embedding[last], self._embedding.new_zeros(self._embedding.shape[1])
        features = torch.stack([self._features.get(s, missing) for s in sequences])
        places = torch.tensor([len(s) - s.num_committed for s in sequences], device=self._device)
        hidden = torch.empty_like(embedded)
        for place in {len(s) - s.num_committed for s in sequences}:
            at = (places == place).nonzero()[:, 0]
            hidden[at] = foresee(embedded[at], features[at], self._down[place], self._up[place])
        logits: Tensor = self._head(hidden)
        return logits.float()


def load_mtp(options: MtpOptions, sampler: LogitsSampler, reporter: Reporter) -> MtpDraftModel:
    """Raises ConfigError for a directory that holds no such heads, ModelUnsupported for another target's."""
    directory = resolve_model(options.model, options.cache_dir, reporter)
    manifest = read_manifest(load_config(directory))
    if manifest is None or manifest.kind != MTP:
        raise ConfigError(f"drafter: {directory.name} holds no heads; outrider train-draft --kind mtp")
    target = resolve_model(options.target or manifest.target, options.cache_dir, reporter)
    vocab_digest = digest.directory_vocab_digest(target)
    if vocab_digest != manifest.vocab_digest:
        raise ModelUnsupported(f"{directory.name} was trained for another vocabulary than that of {target.name}")
    name = options.name or display_name(options.model)
    model_digest = digest.model_digest(directory)
    info = ModelInfo(name, model_digest, vocab_digest, manifest.vocab_size, options.dtype, options.device)
    return MtpDraftModel(directory, target, info, sampler)
