"""Which charts a report has, and what to look for in each."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from firm_jax.charts import COLOURS, line_chart


@dataclass(frozen=True)
class Curve:
    """A chart of all metrics whose names match, with a line on what a healthy and what a hacked or sick run shows.

    A hacked run is one whose reward rises because the policy has found what the critic overrates.
    """

    title: str
    names: str
    text: str


# A metric is on the first chart that wants it; those that none wants follow, each on its own.
CURVES = (
    Curve(
        "held out: the critic's reward beside the oracle's score",
        "eval/reward|eval/oracle_(fraction|edit)",
        "Healthy: both rise together. Hacked: the reward goes on rising while the oracle, which reads the pixels, "
        "stalls or falls. Where no oracle is drawn a hacked run can look healthy, as the same critic judges: look at "
        "the pictures.",
    ),
    Curve(
        "held out: the critic, by criterion",
        "eval/(?!oracle_|critic_|loss|psnr).*",
        "Healthy: all rise or hold. Hacked: one climbs to its end while another sinks.",
    ),
    Curve(
        "held out: the oracle, by what it checks",
        "eval/oracle_(?!.*_se$).*",
        "The critic has no part in it. Healthy: all rise or hold. Hacked: one is paid for with another, such as "
        "changes carried out at the cost of what was to be kept.",
    ),
    Curve(
        "reward",
        "reward/mean",
        "On training prompts. Healthy: rises, fast at first. Hacked: a sudden jump, or a climb to the top that "
        "held-out pictures do not bear out.",
    ),
    Curve(
        "reward by criterion",
        "reward/(?!mean$|std$|zero_std_ratio$|group_std$|missing$|missing_groups$|.*_se$).*",
        "Healthy: criteria rise together or by turns. Hacked: one is at its end and the others pay for it.",
    ),
    Curve(
        "spread of rewards, of all and within a prompt",
        "reward/(std|group_std)",
        "Healthy: shrinks slowly while prompts are solved. Hacked: falls to nothing within prompts, because the critic "
        "takes all pictures of a prompt for alike.",
    ),
    Curve(
        "share of prompts whose pictures all have one reward",
        "reward/zero_std_ratio",
        "They teach nothing. Healthy: well below a half. Sick: near one; the prompts are solved, or the critic always "
        "says the same.",
    ),
    Curve(
        "share of judgements that failed",
        "(eval/)?critic[/_]failure_rate",
        "Healthy: near zero, and flat. Hacked: rises, because the pictures have left what the critic can judge.",
    ),
    Curve(
        "judgements that failed, by reason",
        "(eval/)?critic[/_]status[/_].*",
        "Healthy: few, of mixed reasons. Sick: one reason grows; the gallery shows what the critic wrote instead.",
    ),
    Curve(
        "entropy of the critic's scores, in nats",
        "(eval/)?critic[/_]entropy",
        "Healthy: level, or falling slowly. Hacked: climbs, the critic guesses; or vanishes as the reward peaks, it "
        "says the same of everything.",
    ),
    Curve(
        "deviation from the old policy",
        "policy/old_deviation",
        "Mean squared difference of velocities from the policy that draws the rollouts. Healthy: small and level. "
        "Sick: grows from epoch to epoch; the steps are too large for what the rollouts can tell.",
    ),
    Curve(
        "KL: distance from the reference",
        "policy/kl",
        "Mean squared difference of velocities from the untrained model. Healthy: rises slowly and levels off. Hacked: "
        "shoots up together with the reward, or never levels off.",
    ),
    Curve(
        "loss",
        "loss/(total|policy)",
        "There is no value it has to fall to, as the rollouts change with the policy. Healthy: of about one size. "
        "Sick: jumps, or grows without an end.",
    ),
    Curve("gradient norm, before clipping", "grad/norm", "Healthy: of about one size. Sick: spikes that come again."),
    Curve("updates skipped so far", "update/skipped", "Healthy: none. Sick: any; skipped_updates.jsonl says why."),
    Curve(
        "seconds an epoch, by phase",
        "time/.*",
        "Healthy: level, but for the evaluations. Sick: a phase grows; if it is the critic's, its answers get longer.",
    ),
    Curve(
        "goodput: share of the time that epochs which count have used",
        "goodput/fraction",
        "Healthy: climbs towards one and stays. Sick: falls, through restarts, repeated epochs, or slow storage.",
    ),
    Curve("images a second", "throughput/images_per_s", "Healthy: level. Sick: falls without a change of the batch."),
)
_NOT_DRAWN = ("step", "epoch", "time", "non_finite", "checkpoint/damaged", "goodput/productive_s", "goodput/wall_s")


def charts(rows: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    """The charts of the lines of metrics.jsonl: those of CURVES, and those of all other metrics.

    Each has `title`, `text`, `svg`, `legend` (name, colour) of several series, and `last`, the last value of the first.
    """
    names = sorted({name for row in rows for name in row if name not in _NOT_DRAWN and not name.endswith("_se")})
    series = {name: _points(rows, name, name) for name in names}
    series = {name: points for name, points in series.items() if points}
    errors = {name: _points(rows, name, f"{name}_se") for name in series}
    drawn, left = [], list(series)
    for curve in CURVES:
        if members := [name for name in left if re.fullmatch(curve.names, name)]:
            left = [name for name in left if name not in members]
            drawn.append(_chart(curve.title, curve.text, members, series, errors))
    return drawn, [_chart(name, "", [name], series, errors) for name in left]


def _chart(title: str, text: str, members: list[str], series: dict, errors: dict) -> dict:
    svg = line_chart({n: series[n] for n in members}, {n: errors[n] for n in members if errors[n]}, title)
    legend = list(zip(members, itertools.cycle(COLOURS), strict=False)) if len(members) > 1 else []
    return {"title": title, "text": text, "svg": Markup(svg), "legend": legend, "last": series[members[0]][-1][1]}


def _points(rows: list[dict[str, Any]], name: str, value: str) -> list[tuple[int, float]]:
    return [(row["epoch"], row[value]) for row in rows if isinstance(row.get(value), int | float)]
