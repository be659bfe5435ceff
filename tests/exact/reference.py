"""transformers' own `generate` on the same weights: what greedy output is held against.

Owns: the reference tokens, and the verdict on a first difference (near-tie or defect).
Must not know: Outrider's engine beyond its processing and noise, which a near-tie at temperature > 0 is judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.common.items import Identity
from services.common.values import SamplingParams, VerificationMethod
from services.engine.noise import Purpose, gumbel_row
from services.engine.processing import Row, process
from services.engine.sequence import Sequence as EngineSequence

NEAR_TIE = 1e-3
"""A first difference is a near-tie where the best two processed scores, noise included, lie within this."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two outputs part. `gap` is between the two tokens' scores there, given the common prefix."""

    index: int
    expected: int | None
    actual: int | None
    gap: float

    @property
    def near_tie(self) -> bool:
        return self.gap <= NEAR_TIE


class Reference:
    """A model read by transformers alone, in float32 on CPU."""

    def __init__(self, model_dir: Path, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, use_safetensors=True).eval()
        eos = self._model.generation_config.eos_token_id
        self.eos_token_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """One user message in the model's chat template."""
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return tuple(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """The greedy continuation, the end-of-sequence token included."""
        ids = torch.tensor([prompt_ids])
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        return tuple(output[0, len(prompt_ids) :].tolist())

    @torch.inference_mode()
    def first_difference(
        self,
        prompt_ids: Sequence[int],
        expected: Sequence[int],
        actual: Sequence[int],
        sampling: SamplingParams,
    ) -> Difference | None:
        """None where the outputs are equal. Where one merely ends early the gap is infinite."""
        length = min(len(expected), len(actual))
        index = next((i for i in range(length) if expected[i] != actual[i]), length)
        if index == length:
            if len(expected) == len(actual):
                return None
            ends = (expected[index] if index < len(expected) else None, actual[index] if index < len(actual) else None)
            return Difference(index, *ends, gap=float("inf"))
        tokens = (*prompt_ids, *expected[:index])
        scores = self._scores(tokens, len(prompt_ids), sampling)
        best = torch.topk(scores, 2)
        pair = {expected[index], actual[index]}
        gap = float(best.values[0] - best.values[1]) if pair == set(best.indices.tolist()) else float("inf")
        return Difference(index, expected[index], actual[index], gap)

    def _scores(self, tokens: Sequence[int], prompt_len: int, sampling: SamplingParams) -> torch.Tensor:
        logits = self._model(torch.tensor([tokens]), logits_to_keep=1).logits[0].float()
        sequence = EngineSequence(
            identity=Identity("reference", 0, 0, 0, len(tokens)),
            tokens=list(tokens),
            prompt_len=prompt_len,
            eos_token_ids=self.eos_token_ids,
            sampling=sampling,
            verification=VerificationMethod.COUPLED,
            max_len=len(tokens) + 1,
        )
        scores = process(logits, [Row(sequence)])[0]
        if sampling.greedy:
            return scores
        return scores + torch.as_tensor(gumbel_row(sampling.seed, len(tokens), Purpose.COUPLED, range(scores.numel())))
