"""A decoder's layers in one loop, where the calls between them cost a CPU more than some of what they compute.

Owns: which models run so, and the proof of it. Must not know: families of models, the pool, steps.

A decoder qualifies whose layers all are the plain pre-norm residual ones (Vaswani et al. 2017; Xiong et al. 2020), of
parts that were fused (services.engine.fused):

    hidden += attention(norm(hidden));  hidden += mlp(norm(hidden))

between an embedding and a last norm. It is recognised by its members' names, and run so only where that gives what the
model's own call gave, attention's requests included; so a family that scales something in between keeps its own call.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from services.engine.fused import NUM_PROBE_ROWS, SEED, FusedAttention, FusedMlp, FusedNorm, MixingStep
from services.engine.models import CausalModel
from services.engine.paged_attention import AttentionStep

TOLERANCE = 1e-6
"""Of the logits, relative to the largest: the same operations in the same order."""

_LAYER = {
    "input_layernorm": FusedNorm,
    "self_attn": FusedAttention,
    "post_attention_layernorm": FusedNorm,
    "mlp": FusedMlp,
}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}


class FlatDecoder:
    """What a decoder computes, to be set as its `forward`. Its parts are not replaced afterwards."""

    def __init__(self, decoder: Any) -> None:
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        layers = list(decoder.layers)
        self._first_norm: FusedNorm = layers[0].input_layernorm
        next_norms = [layer.input_layernorm for layer in layers[1:]] + [decoder.norm]
        self._layers = [
            (layer.self_attn.attend, layer.post_attention_layernorm.of_sum, layer.mlp.forward, next_norm.of_sum)
            for layer, next_norm in zip(layers, next_norms, strict=True)
        ]

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, paged_step: AttentionStep, **others: object
    ) -> BaseModelOutputWithPast:
        hidden = self._embed(input_ids)
        rotation = paged_step.rotation(self._rotary(hidden, position_ids))
        normed = self._first_norm(hidden)
        for attend, norm_attended, mlp, norm_output in self._layers:
            normed = norm_attended(hidden, attend(normed, rotation, paged_step))
            normed = norm_output(hidden, mlp(normed))
        return BaseModelOutputWithPast(last_hidden_state=normed)


@torch.inference_mode()
def flatten(model: CausalModel) -> bool:
    """Runs the model's decoder in one loop, if it qualifies; returns whether. All else has been replaced before."""
    decoders = [part for part in model.module.modules() if _is_decoder(part)]
    if len(decoders) != 1:
        return False
    decoder = decoders[0]
    own = decoder.forward
    expected, expected_step = _probe(model)
    decoder.forward = FlatDecoder(decoder).forward
    try:
        found, found_step = _probe(model)
    except (TypeError, ValueError, RuntimeError):
        decoder.forward = own
        return False
    difference = (found - expected).abs().max()
    agrees = bool(difference <= TOLERANCE * expected.abs().max()) and found_step.calls == expected_step.calls
    if not agrees:
        decoder.forward = own
    return agrees


def _probe(model: CausalModel) -> tuple[torch.Tensor, MixingStep]:
    """The logits of random tokens, and the step that saw what the layers asked for."""
    tokens = torch.randint(model.vocab_size, (NUM_PROBE_ROWS,), generator=torch.Generator().manual_seed(SEED))
    rows = torch.arange(NUM_PROBE_ROWS)
    step = MixingStep()
    return model.logits(tokens, rows + 1, rows, paged_step=step).float(), step


def _is_decoder(part: Any) -> bool:
    if {name for name, _ in part.named_children()} != _DECODER or not isinstance(part.layers, torch.nn.ModuleList):
        return False
    return all({name: type(child) for name, child in layer.named_children()} == _LAYER for layer in part.layers)
