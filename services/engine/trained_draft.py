"""A draft that was trained for one target: its few layers, between the target's own embedding and part of its head.

Owns: the form of such a directory and how it becomes a transformers model. Must not know: training, the pool, steps.

    config.json         of the target's own family, with fewer layers, and the section `outrider_draft` (Manifest)
    model.safetensors   the weights by their names in that family's causal model; and
        input_projection   [width, hidden]    embedding of the draft = embedding of the target x its transpose, or it
        output_projection  [hidden, width]    head of the draft = the target's head, rows head_ids, x it
        head_ids           int32 [R]          the tokens that it can propose, as ids of the target
        feature_projection [width, hidden]    kind features: to a token's embedding is added the target's final hidden
                                              state before it x the transpose (services.engine.feature_input)
        mtp_down, mtp_up   [heads, ...]       kind mtp: in place of layers (services.engine.mtp_heads)

Of the target are read, and only from its file, the embedding and the head (one tensor where they are tied), and for the
kind early_exit the layers too, which then are not shipped. The projections are multiplied in once. Logits are as wide
as the target's vocabulary: all that follows, noise and penalties included, counts in the target's ids. Tokens outside
`head_ids` lie NEVER below the least of the row.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from services.common.errors import ModelUnsupported
from services.engine.feature_input import FeatureInput

SECTION = "outrider_draft"
EARLY_EXIT = "early_exit"
FEATURES = "features"
MTP = "mtp"
NEVER = 25.0
"""More than Gumbel noise can make up for (noise.gumbel spans 26.0, and the least is no likely token)."""
_EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a trained draft says of itself."""

    target: str
    """The model it was trained for, as it was named then."""
    embedding_digest: str
    vocab_digest: str
    vocab_size: int
    """Width of the target's logits."""
    kind: str = "model"
    """`model`: with layers of its own. `early_exit`: the target's layers as they are, a trained norm and projection.
    `features`: as `model`, fed with the target's features. `mtp`: heads on these, without layers."""
    layers: tuple[int, ...] = ()
    """Of the target: those that it began as, or is."""
    version: int = 1

    def section(self) -> dict[str, Any]:
        return asdict(self)


class Ends(NamedTuple):
    """What a draft shares with its target: embedding [V, hidden] and head [V, hidden], as they are stored."""

    embedding: torch.Tensor
    head: torch.Tensor

    @property
    def digest(self) -> str:
        """SHA-256 over both in bfloat16, so that a copy of the target in another type is the same."""
        found = hashlib.sha256()
        for part in (self.embedding,) if self.head is self.embedding else self:
            found.update(part.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class ReducedHead(torch.nn.Module):
    """Hidden states (..., width) to logits (..., vocab_size) of which only those of `head_ids` are computed."""

    head_ids: torch.Tensor

    def __init__(self, weight: torch.Tensor, head_ids: torch.Tensor, vocab_size: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("head_ids", head_ids.long(), persistent=False)
        self.vocab_size = vocab_size

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.linear(hidden)
        lowest = logits.amin(dim=-1, keepdim=True) - NEVER
        whole: torch.Tensor = lowest.expand(*logits.shape[:-1], self.vocab_size).contiguous()
        return whole.index_copy_(-1, self.head_ids, logits)


def read_manifest(config: Any) -> Manifest | None:
    """What the configuration says of a trained draft; None for any other model. Raises ModelUnsupported."""
    section = getattr(config, SECTION, None)
    if section is None:
        return None
    try:
        manifest = Manifest(**section)
    except TypeError as error:
        raise ModelUnsupported(f"its section {SECTION} is malformed: {error}") from error
    if manifest.version != 1:
        raise ModelUnsupported(f"it is a trained draft of version {manifest.version}; this program reads version 1")
    return manifest


def read_ends(directory: Path) -> Ends:
    """The target's embedding and head, from its safetensors. Raises ModelUnsupported where they are not found."""
    embedding = head = None
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(_EMBEDDING_SUFFIXES):
                    embedding = file.get_tensor(name)
                elif name in _HEAD_NAMES:
                    head = file.get_tensor(name)
    if embedding is None:
        raise ModelUnsupported(f"{directory.name} has no token embedding that a draft could use")
    return Ends(embedding, embedding if head is None else head)


def read_layers(target: Path, names: Iterable[str], layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Weights of the draft by `names`, each from that of the target's `layers` which stands at its place.

    Raises ModelUnsupported where the target has none.
    """
    found: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(safe_open(path, "pt")) for path in sorted(target.glob("*.safetensors"))]
        stored = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name in names:
            wanted = _stored_name(name, layers)
            key = wanted if wanted in stored else wanted.partition(".")[2]  # some files leave the first part out
            if key not in stored:
                raise ModelUnsupported(f"{target.name} has no weight {wanted} that a draft could start from")
            found[name] = stored[key].get_tensor(key).float()
    return found


def _stored_name(name: str, layers: tuple[int, ...]) -> str:
    """`name` with the number of the draft's layer replaced by that of the target's."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is not None:
        parts[at] = str(layers[int(parts[at])])
    return ".".join(parts)


def load_trained_draft(directory: Path, config: Any, target: Path, dtype: torch.dtype, attention: str) -> Any:
    """The draft as a transformers model in `dtype`, in evaluation mode. Raises ModelUnsupported for another target."""
    manifest = read_manifest(config)
    if manifest is None:
        raise ModelUnsupported(f"{directory.name} is no trained draft")
    if manifest.kind == MTP:
        raise ModelUnsupported(f"{directory.name} holds heads for the drafter mtp, and no model")
    ends = read_ends(target)
    if ends.digest != manifest.embedding_digest:
        raise ModelUnsupported(
            f"{directory.name} was trained for {manifest.target}; {target.name} has other embeddings"
        )
    weights = load_file(directory / "model.safetensors")
    input_projection, output_projection = weights.pop("input_projection", None), weights.pop("output_projection")
    head_ids, feature_projection = weights.pop("head_ids").long(), weights.pop("feature_projection", None)
    module = skeleton(config, attention)
    missing, unexpected = module.load_state_dict(weights, strict=False)
    embedding_names = set(_names_of(module, module.get_input_embeddings(), module.get_output_embeddings()))
    lacking = sorted(set(missing) - embedding_names)
    if lacking and manifest.kind == EARLY_EXIT:
        module.load_state_dict(read_layers(target, lacking, tuple(manifest.layers)), strict=False)
        lacking = []
    if unexpected or lacking:
        raise ModelUnsupported(f"{directory.name} lacks weights or has others: {lacking} {unexpected}")
    embedding = ends.embedding.float() * embedding_scale(module)
    if input_projection is not None:
        embedding = embedding @ input_projection.float().T
    head = ends.head[head_ids].float() @ output_projection.float()
    if feature_projection is None:
        plain = torch.nn.Embedding.from_pretrained(embedding, freeze=True)  # type: ignore[no-untyped-call]
        module.set_input_embeddings(plain)
    else:
        module.set_input_embeddings(FeatureInput(embedding, feature_projection.float()))
    module.set_output_embeddings(ReducedHead(head, head_ids, manifest.vocab_size))
    module.config.vocab_size = manifest.vocab_size
    return module.to(dtype).eval()


def skeleton(config: Any, attention: str) -> Any:
    """The model of `config` with random weights in float32, and a token embedding and head of no size to speak of."""
    small = copy.deepcopy(config)
    small.vocab_size, small.tie_word_embeddings, small.pad_token_id = 8, False, None
    return transformers.AutoModelForCausalLM.from_config(
        small, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )


def embedding_scale(module: Any) -> float:
    """What the model multiplies its token embeddings by as it looks them up (Gemma: the root of its width); mostly 1.

    Raises ModelUnsupported for a look-up that does anything else.
    """
    lookup = module.get_input_embeddings()
    with torch.no_grad():
        stored, found = lookup.weight[0].float(), lookup(torch.zeros(1, dtype=torch.int64))[0].float()
        if found.shape == stored.shape:
            scale = float((found @ stored / (stored @ stored)).detach())
            if torch.allclose(found, scale * stored, rtol=1e-4):
                return scale
    raise ModelUnsupported(
        f"the token embedding of {type(module).__name__} is no scaled look-up; no draft can share it"
    )


def _names_of(module: torch.nn.Module, *parts: torch.nn.Module) -> list[str]:
    return [
        f"{name}.{parameter}"
        for name, child in module.named_modules()
        if any(child is part for part in parts)
        for parameter, _ in child.named_parameters()
    ]
