"""Whether the rates of the arms were chosen, and fairly: a search, held against the report.

Scratch at its own best is only that if its recipe was chosen on validation with no less search than
the pretrained arm had. What a protocol says of it (`own`, `search`) is a claim; the runs show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from finetune.facts import Facts, find_rows, read_run
from finetune.lines import Metric, metrics_of, shown_digits
from finetune.rows import Row
from finetune.scan_metrics import mean_score

FREE = frozenset({"lr", "weight_decay", "warmup", "part"})
"""What a search may vary, and the part of the split, which it must."""

Rates = dict[float, dict[str, float]]
"""Of each rate the score of each run."""
Known = Mapping[str, Sequence[Facts | None]]


@dataclass
class Search:
    """Runs on one data set, of the pretrained arm and of scratch."""

    metric: Metric
    """The main one of the data set's task, Dice of a segmentation."""

    arms: dict[str, Rates] = field(default_factory=dict)
    encoders: dict[str, Rates] = field(default_factory=dict)
    """The pretrained arm, each recipe of pretraining by itself; `about` makes one of them."""
    cases: set[tuple[str, str]] = field(default_factory=set)
    """Split hash and key of what was scored."""
    trained: dict[str, Any] = field(default_factory=dict)
    """The recipe of a run."""

    def best(self, arm: str) -> tuple[float, float]:
        """The rate with the best mean score over draws, and that score in its unit."""
        means = {rate: float(np.mean([*d.values()])) for rate, d in self.arms[arm].items()}
        sign = 1 if self.metric.higher_is_better else -1
        rate = max(means, key=lambda rate: sign * means[rate])
        return rate, means[rate]

    def runs(self, arm: str) -> int:
        """How many runs an arm had."""
        return sum(len(draws) for draws in self.arms.get(arm, {}).values())

    def about(self, encoders: set[str]) -> Search:
        """What was tried with these encoders, and for scratch."""
        found: Rates = {}
        for name in encoders & self.encoders.keys():
            for rate, draws in self.encoders[name].items():
                found.setdefault(rate, {}).update(draws)
        return replace(self, arms={**self.arms, **({"pretrained": found} if found else {})})


def read_searches(folder: Path) -> dict[str, Search]:
    """The search of each data set, from a run folder or a folder of them.

    Raises:
        InputError: there are none, or a run does not say what it trained with.
    """
    found: dict[str, Search] = {}
    for path in find_rows([folder]):
        rows, facts = read_run(path)
        if not rows:
            continue
        if "lr" not in facts.trained:
            raise InputError(
                f"{path.parent}: no run.json that says its rate, so it shows no search; give the "
                "folder of the runs as finetune made it"
            )
        metric, head = metrics_of(rows)[0], rows[0]
        one = found.setdefault(head.dataset, Search(metric))
        if head.arm == "pretrained":
            ran = one.encoders.setdefault(_encoder(head), {})
        else:
            ran = one.arms.setdefault("scratch" if head.arm == "scratch-own" else head.arm, {})
        rates = ran.setdefault(float(facts.trained["lr"]), {})
        rates[f"{head.checkpoint_digest} {head.draw}"] = _score(rows, metric)
        one.cases |= {(row.split_hash, row.case) for row in rows}
        one.trained = one.trained or facts.trained
    return found


def _encoder(row: Row) -> str:
    """The recipe of its pretraining: seeds of one share a rate; the checkpoint if it says none."""
    return row.pretrain_recipe or row.checkpoint_digest


def _score(rows: Sequence[Row], metric: Metric) -> float:
    """Over classes, then cases; of answers for whole scans as `scan_metrics` has it."""
    if metric.of_scans:
        return mean_score(rows)
    cases: dict[str, list[float]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row.dsc)
    scored = [np.nanmean(values) for values in cases.values() if not np.all(np.isnan(values))]
    return 100 * float(np.mean(scored)) if scored else float("nan")


def search_notes(
    arms: Mapping[str, list[Row]], known: Known, searches: Mapping[str, Search] | None
) -> list[str]:
    """What a group's rates rest on.

    Args:
        arms: rows of pretrained, scratch and scratch-own.
        known: what their folders say.
        searches: of each data set; None where no search was given.
    """
    rows = [row for found in arms.values() for row in found]
    if searches is None:
        own = [one for one in known["scratch-own"] if one is not None]
        rate = f" (rate {own[0].trained['lr']:g})" if own and "lr" in own[0].trained else ""
        claim = f"scratch's own recipe{rate} is its protocol's claim: no search is shown (search=)"
        return [claim] if arms["scratch-own"] else []
    search = searches.get(rows[0].dataset)
    if search is None:
        return ["no run of the search is about this data set"]
    search = search.about({_encoder(row) for row in arms["pretrained"]})
    return [_shown(search), *_unfair(search, arms, known)]


def _shown(search: Search) -> str:
    """What each arm could choose from, and chose."""
    said = []
    for arm in ("pretrained", "scratch"):
        if arm in search.arms:
            rate, found = search.best(arm)
            rates = ", ".join(f"{one:g}" for one in sorted(search.arms[arm]))
            score = f"{search.metric.title} {found:.{shown_digits(search.metric, found)}f}"
            said.append(f"{arm} {rate:g} of {rates} ({score}, {search.runs(arm)} runs)")
        else:
            said.append(f"{arm} had none")
    return f"rates were chosen: {'; '.join(said)}"


def _unfair(search: Search, arms: Mapping[str, list[Row]], known: Known) -> list[str]:
    """What speaks against the choice."""
    found = []
    a, b = search.arms.get("pretrained", {}), search.arms.get("scratch", {})
    if not b.keys() >= a.keys() or search.runs("scratch") < search.runs("pretrained"):
        found.append("scratch was searched with less than the pretrained arm")
    own = "scratch-own" if arms["scratch-own"] else "scratch"
    for arm, name in (("pretrained", "pretrained"), (own, "scratch")):
        rates = {one.trained["lr"] for one in known[arm] if one and "lr" in one.trained}
        for rate in sorted(rates) if name in search.arms else ():
            best, _ = search.best(name)
            if rate != best and arm == "scratch":
                found.append(f"scratch is best with {best:g}, its twin has {rate:g}: recipe_of=own")
            elif rate != best:
                found.append(f"{arm} trained with {rate:g}, where {best:g} was best")
    rows = [row for part in arms.values() for row in part]
    if search.cases & {(row.split_hash, row.case) for row in rows}:
        found.append("rates were chosen on cases that are reported")
    reported = {_encoder(row) for row in arms["pretrained"]}
    if search.encoders and not reported <= search.encoders.keys():
        found.append("the rate was chosen with another checkpoint")
    trained = [one.trained for one in known["pretrained"] if one and one.trained]
    if trained:
        names = sorted(search.trained.keys() | trained[0].keys())
        other = [n for n in names if search.trained.get(n) != trained[0].get(n)]
        if other := [name for name in other if name not in FREE]:
            found.append(f"it differs from the report in {', '.join(other)}")
    return [f"the search: {one}" for one in found]
