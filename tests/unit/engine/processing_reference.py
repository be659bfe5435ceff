"""Processing of one row in plain loops and floats, after the order that services.engine.processing documents."""

from __future__ import annotations

import math

from services.engine.processing import Row


def reference(logits: list[float], row: Row) -> list[float]:
    """Log-probabilities of one row of logits; adjusted logits where the row is greedy."""
    p, before = row.sampling, [*row.sequence.tokens, *row.drafted]
    generated = before[row.sequence.prompt_len :]
    scores = list(logits)
    for token in set(before):
        if token < len(scores):
            scores[token] = (
                scores[token] / p.repetition_penalty if scores[token] > 0 else scores[token] * p.repetition_penalty
            )
    for token in set(generated):
        if token < len(scores):
            scores[token] -= p.presence_penalty + p.frequency_penalty * generated.count(token)
    for token, bias in p.logit_bias:
        if token < len(scores):
            scores[token] += bias
    if len(generated) < p.min_tokens:
        for token in row.sequence.eos_token_ids:
            scores[token] = -math.inf
    if p.temperature == 0.0:
        return scores
    scores = [score / p.temperature for score in scores]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    kept = order[: p.top_k] if p.top_k else order
    mass = [math.exp(scores[token] - scores[order[0]]) for token in kept]
    if p.top_p < 1.0:
        reached, count = 0.0, 0
        while count < len(kept) and reached < p.top_p * sum(mass):
            reached, count = reached + mass[count], count + 1
        kept, mass = kept[:count], mass[:count]
    kept = [token for token, m in zip(kept, mass, strict=True) if m >= p.min_p]
    total = sum(math.exp(scores[token] - scores[order[0]]) for token in kept)
    return [
        scores[token] - scores[order[0]] - math.log(total) if token in kept else -math.inf
        for token in range(len(scores))
    ]
