"""Options that several commands share, and the values made of them.

Owns: their names, defaults and help. Must not know: what the commands do with them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from services.cli.cluster import DTYPES, SIMULATED, ClusterSpec, default_draft, default_drafter
from services.client import Access
from services.common.drafters import DRAFTER_HELP, parse_chain
from services.common.errors import ConfigError
from services.common.values import MAX_DRAFT_TOKENS, VerificationMethod

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_ADDRESS = "127.0.0.1:50051"
METHODS = tuple(method.value for method in VerificationMethod)


def _stated(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty; name a coordinator as host:port", context, parameter)
    return value


def _chain(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return value if value is None else ",".join(parse_chain(value))
    except ConfigError as error:
        raise click.BadParameter(str(error).removeprefix("drafter: "), context, parameter) from None


def address_option(default: str | None = DEFAULT_ADDRESS, help: str = "Coordinator to use.") -> Callable[[F], F]:
    return click.option(
        "--address",
        envvar="OUTRIDER_ADDRESS",
        default=default,
        show_default=default is not None,
        show_envvar=True,
        callback=_stated,
        help=help,
    )


_ACCESS_OPTIONS = (
    click.option(
        "--tls-ca",
        envvar="OUTRIDER_TLS_CA",
        default="",
        help="Use TLS: PEM file of the authorities that vouch for the coordinator, or `system`.",
    ),
    click.option("--tls-cert", envvar="OUTRIDER_TLS_CERT", default="", help="PEM file of this client's certificate."),
    click.option("--tls-key", envvar="OUTRIDER_TLS_KEY", default="", help="PEM file of the certificate's key."),
    click.option(
        "--api-key-file",
        envvar="OUTRIDER_API_KEY_FILE",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with the API key; else the variable OUTRIDER_API_KEY is used.",
    ),
    click.option(
        "--insecure", envvar="OUTRIDER_INSECURE", is_flag=True, help="Allow the API key to be sent in plaintext."
    ),
)


def access_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what reaches a protected coordinator; the command gets it as one argument, `access`. There is no option for
    the key itself: everybody on a machine sees the options of its processes."""

    @functools.wraps(command)
    def with_access(
        tls_ca: str, tls_cert: str, tls_key: str, api_key_file: Path | None, insecure: bool, **options: Any
    ) -> Any:
        key = api_key_file.read_text() if api_key_file else os.environ.get("OUTRIDER_API_KEY", "")
        return command(access=Access(tls_ca, tls_cert, tls_key, key.strip(), insecure), **options)

    return _apply(with_access, _ACCESS_OPTIONS)


class _NumDraftTokens(click.ParamType[int | None]):
    """A number, or `auto`, which is None."""

    name = f"auto|0-{MAX_DRAFT_TOKENS}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        return click.IntRange(0, MAX_DRAFT_TOKENS).convert(value, param, ctx)


NUM_DRAFT_TOKENS = _NumDraftTokens()
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

_CLUSTER_OPTIONS = (
    click.option(
        "--target",
        default="sample",
        show_default=True,
        help="Target model: sample, a Hugging Face id, a directory, a GGUF file, or simulated.",
    ),
    click.option(
        "--draft",
        help="Draft model, for --drafter model, features, mtp and staged: as --target.  [default for the sample "
        "target: sample-head with features, else sample-draft]",
    ),
    click.option(
        "--drafter",
        callback=_chain,
        help=f"How tokens are proposed: {DRAFTER_HELP}.  [default: suffix,features with the sample "
        "target, simulated with a simulated one, else ngram; suffix,model with --draft]",
    ),
    click.option(
        "--targets",
        "num_targets",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="Target workers; generations are spread over them.",
    ),
    click.option(
        "--drafts",
        "num_drafts",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="Draft workers, of one pool.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="Floating point type of the models.",
    ),
    click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
    click.option(
        "--threads",
        type=click.IntRange(min=0),
        default=0,
        help="Threads for the models on CPU, split between the workers; 0 takes all cores.",
    ),
    click.option(
        "--simulated",
        is_flag=True,
        help="Simulated target and drafter: no weights, given latencies. Short for --target simulated.",
    ),
    click.option(
        "--simulated-step-ms",
        type=click.FloatRange(min=0),
        default=20.0,
        show_default=True,
        help="Simulated target: milliseconds of a forward.",
    ),
    click.option(
        "--simulated-row-ms",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Simulated target: milliseconds for each row of a forward.",
    ),
    click.option(
        "--simulated-token-ms",
        type=click.FloatRange(min=0),
        default=2.0,
        show_default=True,
        help="Simulated drafter: milliseconds for each token.",
    ),
    click.option(
        "--simulated-acceptance",
        type=click.FloatRange(0, 1),
        default=0.7,
        show_default=True,
        help="Simulated drafter: probability that a token is right.",
    ),
)

_SPEC_FIELDS = (
    "dtype",
    "device",
    "threads",
    "simulated_step_ms",
    "simulated_row_ms",
    "simulated_token_ms",
    "simulated_acceptance",
    "num_targets",
    "num_drafts",
)
"""Options that go into the spec as they are."""

_DECODE_OPTIONS = (
    click.option(
        "--verification",
        type=click.Choice(METHODS),
        default="coupled",
        show_default=True,
        help="How proposals are checked; threshold is lossy.",
    ),
    click.option(
        "--num-draft-tokens",
        type=NUM_DRAFT_TOKENS,
        help="Draft tokens a round; 0 decodes plainly.  [default: the server's, which is as many as pay]",
    ),
)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that describe a cluster; the command gets them as one argument, `spec`."""

    @functools.wraps(command)
    def with_spec(**options: Any) -> Any:
        target, draft, drafter = (options.pop(name) for name in ("target", "draft", "drafter"))
        if options.pop("simulated"):
            target = SIMULATED
        draft = draft or default_draft(target, drafter)
        spec = ClusterSpec(
            target=target,
            draft=draft,
            drafter=drafter or default_drafter(target, draft),
            **{name: options.pop(name) for name in _SPEC_FIELDS},
        )
        return command(spec=spec, **options)

    return _apply(with_spec, _CLUSTER_OPTIONS)


def decode_options(command: F) -> F:
    """Adds --verification and --num-draft-tokens."""
    return _apply(command, _DECODE_OPTIONS)


def _apply(command: F, options: tuple[Callable[[Any], Any], ...]) -> F:
    for option in reversed(options):
        command = option(command)
    return command
