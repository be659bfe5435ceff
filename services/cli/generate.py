"""`outrider generate`: one generation, streamed to the terminal or printed as JSON.

Owns: the request made of options, and how its result is shown. Must not know: streams and retries (services.client).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys

import click

from services.cli.failure import CommandFailed, describe
from services.cli.options import access_options, address_option, decode_options, json_option
from services.cli.terminal import is_coloured, legend, notices, write_text
from services.client import Access, Chat, GenerateOptions, OutriderClient, Prompt, Result
from services.common.errors import OutriderError
from services.common.values import VerificationMethod

_UINT64 = click.IntRange(0, 2**64 - 1)


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Most tokens to generate."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, help="Keep the smallest set of tokens that reaches this probability.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Keep the k most likely tokens; 0 keeps all.")
@click.option("--min-p", type=float, default=0.0, help="Keep tokens with this share of the highest probability.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Penalty on every token seen; 1 is none.")
@click.option("--presence-penalty", type=float, default=0.0, help="Subtracted from the logits of generated tokens.")
@click.option("--frequency-penalty", type=float, default=0.0, help="As presence, once for each occurrence.")
@click.option("--seed", type=_UINT64, help="Key of the noise. Drawn if absent, and told in --json.")
@click.option("--stop", multiple=True, help="Text that ends the generation; may be given several times.")
@decode_options
@click.option("--session", help="A session's UUID: the prompt is its next turn, or its first.")
@click.option("--continue", "continues", is_flag=True, help="Fail unless the --session exists: it may have expired.")
@click.option("--system", help="System message.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the model's chat template.")
@click.option("--draft", default="", help="Draft pool to use, by name.  [default: by the pools' weights]")
@click.option("--model", default="", help="Model name; needed only where several are served.")
@click.option("--log-probs", is_flag=True, help="Each token's log-probability; needs --json.")
@address_option(help="Coordinator to use; of several, separated by commas, others take over.")
@access_options
@json_option
def generate(
    prompt: str | None,
    session: str | None,
    continues: bool,
    system: str | None,
    raw: bool,
    verification: str,
    stop: tuple[str, ...],
    address: str,
    access: Access,
    as_json: bool,
    **sampling: float | int | str | bool | None,
) -> None:
    """Generate text from PROMPT, or from standard input where it is absent or "-".

    On a terminal, accepted draft tokens are green and the target's own are yellow. With --json one object is printed at
    the end: text, token_ids, origins, prompt_token_ids, finish_reason, statistics, session_id, request_id, seed.
    """
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template; it cannot be used with --raw")
    if sampling["log_probs"] and not as_json:
        raise click.UsageError("--log-probs needs --json, which prints them")
    if continues and not session:
        raise click.UsageError("--continue needs --session, which it continues")
    text = _read_prompt(prompt)
    if not text:
        raise click.UsageError("the PROMPT is empty")
    request: Prompt = text if raw else Chat.of(text, system=system)
    options = GenerateOptions(verification=VerificationMethod(verification), stop=stop, **sampling)  # type: ignore[arg-type]
    try:
        result = asyncio.run(_generate(address, access, request, options, session, continues, stream=not as_json))
    except OutriderError as error:
        raise CommandFailed(describe(error, address)) from None
    if as_json:
        click.echo(json.dumps(as_object(result, options.log_probs), ensure_ascii=False))
    elif sys.stdout.isatty():
        _print_summary(result)


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("a PROMPT is needed, as an argument or on standard input")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the standard input is not UTF-8: {error}") from None


async def _generate(
    address: str,
    access: Access,
    prompt: Prompt,
    options: GenerateOptions,
    session_id: str | None,
    continues: bool,
    *,
    stream: bool,
) -> Result:
    async with OutriderClient(*address.split(","), access=access) as client:
        generation = client.generate(prompt, options, session_id=session_id, continue_session=continues)
        if not stream:
            return await generation.complete()
        coloured = is_coloured()
        async with contextlib.aclosing(generation):
            async for chunk in generation:
                write_text(chunk, coloured=coloured)
        if not generation.result.text.endswith("\n"):
            click.echo()
        return generation.result


def as_object(result: Result, log_probs: bool = False) -> dict[str, object]:
    """What --json prints. `origins` says of each token whether the draft or the target chose it."""
    statistics = dataclasses.asdict(result.statistics) | {
        "acceptance_rate": result.statistics.acceptance_rate,
        "mean_acceptance_length": result.statistics.mean_acceptance_length,
    }
    fields: dict[str, object] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "origins": [token.origin.name.lower() for token in result.tokens],
        "prompt_token_ids": result.prompt_token_ids,
        "finish_reason": result.finish_reason.value,
        "statistics": statistics,
        "session_id": result.session_id,
        "request_id": result.request_id,
        "model": result.model,
        "seed": result.seed,
        "lossy": result.lossy,
    }
    if log_probs:
        fields["log_probs"] = [token.log_prob for token in result.tokens]
    return fields


def _print_summary(result: Result) -> None:
    statistics = result.statistics
    seconds = statistics.total_ms / 1e3
    parts = [f"{len(result.tokens)} tokens in {seconds:.2f} s"]
    if statistics.acceptance_rate is not None:
        parts.append(f"{statistics.acceptance_rate:.0%} of {statistics.num_draft_tokens} draft tokens accepted")
    parts.append(f"ended by {result.finish_reason.value}")
    if result.lossy:
        parts.append("lossy: this verification may change the distribution")
    console = notices()
    console.print(f"\n[dim]{', '.join(parts)}[/dim]")
    console.print(f"[dim]session {result.session_id}[/dim]")
    if is_coloured():
        click.echo(legend(), err=True, color=True)
