"""transformers' own ways to generate, timed on the same prompts: what `outrider bench --peers` compares with.

    transformers    generate, one token a forward
    assisted        generate with a draft model (assistant_model), a fixed number of draft tokens
    prompt-lookup   generate with tokens that followed an earlier match of the last ones

Owns: loading a model through transformers alone and timing it. Must not know: the paged engine, the command line.
`python -m services.engine.peers` reads a Task as JSON from standard input and writes one JSON object a line: a Ready,
then a Timed for each prompt and peer, all peers in turn at each prompt, so that a noisy machine treats them alike. A
peer that raises is a Failed, and left out from then on; the others go on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from services.engine.models import torch_dtype

TRANSFORMERS, ASSISTED, PROMPT_LOOKUP = PEERS = ("transformers", "assisted", "prompt-lookup")
_MAX_REASON_LEN = 300


@dataclass(frozen=True, slots=True)
class Task:
    """What to run. `draft` is a directory for `assisted`, else empty; temperature 0 is greedy."""

    target: str
    draft: str
    peers: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    num_draft_tokens: int
    dtype: str
    device: str
    threads: int
    temperature: float
    seed: int
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """Loaded and warm."""

    version: str
    event: str = "ready"


@dataclass(frozen=True, slots=True)
class Timed:
    """One generation. `steps` holds (ns since the start, number of tokens so far) behind each forward of the target."""

    peer: str
    prompt: int
    token_ids: tuple[int, ...]
    total_ns: int
    steps: tuple[tuple[int, int], ...]
    event: str = "timed"


@dataclass(frozen=True, slots=True)
class Failed:
    """A peer that cannot go on, and why, in one line."""

    peer: str
    reason: str
    event: str = "failed"


Event = Ready | Timed | Failed


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes when each step ended.

    transformers asks it once a step, also in assisted generation; some versions ask it about candidates as well.
    """

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len = prompt_len
        self._started_ns = time.perf_counter_ns()
        self._asked: list[tuple[int, int]] = []

    @property
    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._started_ns

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self._asked.append((self.now_ns, input_ids.shape[1] - self._prompt_len))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """When there were how many tokens for the first time for good: candidates that were taken back do not count."""
        steps: list[tuple[int, int]] = []
        for at_ns, num_tokens in reversed(self._asked):
            if steps and num_tokens == steps[-1][1]:
                steps[-1] = at_ns, num_tokens
            elif num_tokens and (not steps or num_tokens < steps[-1][1]):
                steps.append((at_ns, num_tokens))
        return tuple(reversed(steps))


class Peers:
    """A task's models. Each is loaded when a peer first needs it, so that one that cannot be fails its peers alone."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        self._task = task

    @functools.cached_property
    def _target(self) -> Any:
        model = self._load(self._task.target)
        eos = None if self._task.ignore_eos else model.generation_config.eos_token_id
        return self._configured(model, eos)

    @functools.cached_property
    def _draft(self) -> Any:
        return self._configured(self._load(self._task.draft), self._target.generation_config.eos_token_id)

    def _load(self, directory: str) -> Any:
        dtype = torch_dtype(self._task.dtype)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, use_safetensors=True)
        return model.to(self._task.device).eval()

    def _configured(self, model: Any, eos: Any) -> Any:
        """What a model's own configuration asks for is not applied, as in Outrider."""
        model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
        return model

    @torch.inference_mode()
    def generate(self, peer: str, index: int) -> Timed:
        """Continues prompt `index`. The number of draft tokens is held fixed, however the peer fares."""
        prompt = self._task.prompts[index]
        ids = torch.tensor([prompt], device=self._task.device)
        target, options = self._target, self._options(peer)  # loaded before the clock starts
        torch.manual_seed(self._task.seed + index)
        clock = Clock(len(prompt))
        output = target.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock], **options)
        token_ids = tuple(output[0, len(prompt) :].tolist())
        return Timed(peer, index, token_ids, clock.now_ns, clock.steps)

    def _options(self, peer: str) -> dict[str, Any]:
        task = self._task
        options: dict[str, Any] = {"max_new_tokens": task.max_tokens, "do_sample": False}
        if task.temperature > 0:
            options |= {"do_sample": True, "temperature": task.temperature, "top_k": 0, "top_p": 1.0}
        if peer == PROMPT_LOOKUP:
            options["prompt_lookup_num_tokens"] = task.num_draft_tokens
        if peer == ASSISTED:
            config = self._draft.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = task.num_draft_tokens, "constant"
            config.assistant_confidence_threshold = 0.0
            options["assistant_model"] = self._draft
        return options


def main() -> None:
    fields = json.load(sys.stdin)
    task = Task(**fields | {"peers": tuple(fields["peers"]), "prompts": tuple(map(tuple, fields["prompts"]))})
    transformers.logging.set_verbosity_error()
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what a library prints is no event
        for event in events(Peers(task), task):
            output.write(json.dumps(asdict(event)) + "\n")
            output.flush()


def events(peers: Peers, task: Task) -> Iterator[Event]:
    """Warms all peers up, then times those that have not failed."""
    running = list(task.peers)
    for peer in task.peers:
        event = _attempt(peers, peer, 0)
        if isinstance(event, Failed):
            running.remove(peer)
            yield event
    yield Ready(transformers.__version__)
    for index in range(len(task.prompts)):
        for peer in tuple(running if index % 2 == 0 else reversed(running)):
            event = _attempt(peers, peer, index)
            if isinstance(event, Failed):
                running.remove(peer)
            yield event


def _attempt(peers: Peers, peer: str, index: int) -> Timed | Failed:
    try:
        return peers.generate(peer, index)
    except Exception as error:  # whatever transformers cannot do with these models
        lines = (line.strip() for line in str(error).splitlines())
        first = next((line for line in lines if line), "no reason given")
        return Failed(peer, f"{type(error).__name__}: {first}"[:_MAX_REASON_LEN])


if __name__ == "__main__":
    main()
