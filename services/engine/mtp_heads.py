"""Several heads on one hidden state of the target: each foresees one token of a draft, all from the same place.

Owns: their arithmetic. Must not know: where states come from, sequences, training. As Medusa's heads (Cai et al. 2024,
section 2.1.1) they need no layers and no cache; that each also sees the token behind the state is Hydra's idea (Ankner
et al. 2024, section 3), here for the committed one alone.

    hidden_j = f + up_j silu(down_j [e; f])        e: the last committed token's embedding
                                                   f: the target's final hidden state before it; both at unit scale
    logits of the j-th drafted token = head hidden_j
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.feature_input import to_scale


def foresee(embedded: Tensor, features: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Hidden states (..., hidden) of one head: `down` [hidden, 2 hidden], `up` [hidden, hidden]."""
    inputs = torch.cat([to_scale(embedded), to_scale(features)], dim=-1)
    within = torch.nn.functional.silu(torch.nn.functional.linear(inputs, down))
    return features + torch.nn.functional.linear(within, up)
