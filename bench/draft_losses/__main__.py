"""Forward KL against total variation, one layer against two and a narrower one, in equal time from the same self-play.

    python -m bench.draft_losses --self-play my-draft/self-play --minutes 1.5

Writes draft_losses.json and draft_losses.png. Variants that are in the file already, and are not trained now, are kept.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import click
import matplotlib
from rich.table import Table

from bench.draft_losses.measure import VARIANTS, measure
from services.cli.bench.machine import environment
from services.cli.terminal import notices, progress_bar, results
from services.common.config import cache_dir
from services.engine import digest
from services.engine.prepare import resolve_model
from services.engine.progress import Reporter
from services.engine.training.corpus import Corpus
from services.engine.training.shards import ShardStore

matplotlib.use("Agg")
from matplotlib import pyplot

Found = dict[str, dict[str, Any]]


@click.command()
@click.option("--target", default="sample", show_default=True, help="The model that wrote the self-play.")
@click.option("--self-play", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--variants", default=",".join(VARIANTS), show_default=True, help="Which to train now.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=1.5, show_default=True, help="Of each.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("bench/results"), show_default=True
)
def main(target: str, self_play: Path, variants: str, minutes: float, out: Path) -> None:
    """Train variants of a draft for equally long, one thread each, and compare what they foresee and cost."""
    names = variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(VARIANTS)}", param_hint="--variants")
    directory = resolve_model(target, cache_dir(), Reporter())
    corpus = Corpus([info.path for info in ShardStore(self_play, digest.model_digest(directory)).infos()])
    file = out / "draft_losses.json"
    found: Found = json.loads(file.read_text())["variants"] if file.exists() else {}
    with progress_bar(notices()) as progress, tempfile.TemporaryDirectory() as folder:
        for name in names:
            task = progress.add_task(name, total=1.0)
            draft = Path(folder) / name.replace(" ", "-")
            found[name] = measure(
                VARIANTS[name],
                directory,
                corpus,
                60 * minutes,
                draft,
                lambda share, task=task: progress.update(task, completed=share),
            )
    found = {name: found[name] for name in VARIANTS if name in found}
    out.mkdir(parents=True, exist_ok=True)
    taken = dataclasses.asdict(environment([])) | {"command": f"python -m bench.draft_losses --minutes {minutes:g}"}
    content = {"self_play_tokens": corpus.num_tokens, "variants": found, "environment": taken}
    file.write_text(json.dumps(content, indent=1) + "\n")
    _print(found)
    _plot(found, out / "draft_losses.png")


def _print(found: Found) -> None:
    header = ("", "parameters", "tokens", "KL", "greedy", "warm", "len, K=5", "by position", "draft cost", "speed-up")
    table = Table(*header)
    for name, figures in found.items():
        held_out = figures["held_out"]
        table.add_row(
            name,
            f"{figures['num_parameters'] / 1e6:.1f} M",
            f"{figures['trained_tokens']:,}",
            *(
                f"{held_out[key]:.3f}"
                for key in ("loss", "greedy_acceptance", "warm_acceptance", "mean_acceptance_len")
            ),
            " ".join(f"{alpha:.2f}" for alpha in held_out["conditional_acceptance"]),
            f"{figures['draft_cost']:.3f}",
            f"{figures['expected_speed_up']:.3f}",
        )
    table.caption = "greedy: share of tokens foreseen; warm: of its draws accepted at temperature 1; in target steps"
    results().print(table)


def _plot(found: Found, file: Path) -> None:
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, figures in found.items():
        alphas = figures["held_out"]["conditional_acceptance"]
        panels[0].plot(range(1, len(alphas) + 1), alphas, "o-", label=name)
        seconds = [point["trained_s"] for point in figures["curve"]]
        panels[1].plot(seconds, [point["greedy_acceptance"] for point in figures["curve"]], label=name)
        panels[2].plot(seconds, [point["warm_acceptance"] for point in figures["curve"]], label=name)
    panels[0].set(xlabel="position in the draft", ylabel="conditional acceptance, greedy", ylim=(0, 1))
    panels[1].set(xlabel="seconds of training", ylabel="greedy tokens foreseen")
    panels[2].set(xlabel="seconds of training", ylabel="accepted of its draws, temperature 1")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
