"""Whether the rates of the arms were chosen, and fairly: a search, held against the report.

Scratch at its own best is only that if its recipe was chosen on validation with no less search than
the pretrained arm had. What a protocol says of it (`own`, `search`) is a claim; the runs show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from finetune.cells import mean_score
from finetune.facts import Facts, find_rows, read_run
from finetune.lines import Metric, metrics_of, shown_digits
from finetune.rows import Row

MAY_DIFFER = frozenset({"lr", "weight_decay", "warmup", "part", "labels"})
"""What a search may vary, the part of the split, which it must, and labels, told by themselves."""

Known = Mapping[str, Sequence[Facts | None]]


@dataclass(frozen=True)
class Tried:
    """One run of a search.

    `encoder` is the recipe of its pretraining, whose seeds share a rate, or the checkpoint if it
    says none; empty for scratch. `draw` is what runs of two rates have in common.
    """

    encoder: str
    rate: float
    labels: str
    draw: str
    score: float
    cases: frozenset[tuple[str, str]]
    """Split hash and key of what was scored."""
    trained: dict[str, Any]
    """Its recipe."""


@dataclass(frozen=True)
class Search:
    """Runs on one data set, of the pretrained arm and of scratch."""

    metric: Metric
    """The main one of the data set's task, Dice of a segmentation."""
    tried: Sequence[Tried]

    def of(self, arm: str) -> list[Tried]:
        """The runs of an arm, pretrained or scratch."""
        return [one for one in self.tried if bool(one.encoder) == (arm == "pretrained")]

    def rates(self, arm: str) -> list[float]:
        """What an arm could choose from."""
        return sorted({one.rate for one in self.of(arm)})

    def shared(self, arm: str) -> dict[float, list[float]]:
        """The scores of each rate on the draws that all rates of the arm have.

        A run whose every case pretraining has seen has none.
        """
        runs: dict[float, dict[tuple[str, str], float]] = {}
        for one in self.of(arm):
            if math.isnan(one.score):
                continue
            runs.setdefault(one.rate, {})[one.labels, one.draw] = one.score
        common = set.intersection(*map(set, runs.values())) if runs else set()
        return {rate: [draws[draw] for draw in common] for rate, draws in sorted(runs.items())}

    def best(self, arm: str) -> tuple[float, float]:
        """The rate with the best mean score over shared draws, and that score in its unit.

        NaN, twice, where the rates share no draw.
        """
        means = {rate: float(np.mean(d)) for rate, d in self.shared(arm).items() if d}
        if not means:
            return math.nan, math.nan
        sign = 1 if self.metric.higher_is_better else -1
        rate = max(means, key=lambda rate: sign * means[rate])
        return rate, means[rate]

    def about(self, encoders: set[str], labels: str, networks: Sequence[Any]) -> Search:
        """What was tried for these encoders, and for scratch of their networks.

        With so many labels, if it was at all.
        """
        scratch = [one for one in self.tried if not one.encoder]
        # A search with other crops has another network by name, and says so among the differences.
        own = [one for one in scratch if one.trained.get("network") in networks] or scratch
        tried = [one for one in self.tried if one.encoder in encoders] + own
        same = [one for one in tried if one.labels == labels]
        return replace(self, tried=same or tried)


def read_searches(folder: Path) -> dict[str, Search]:
    """The search of each data set, from a run folder or a folder of them.

    Raises:
        InputError: there are none, or a run does not say what it trained with.
    """
    metrics: dict[str, Metric] = {}
    found: dict[str, list[Tried]] = {}
    for path in find_rows([folder]):
        rows, facts = read_run(path)
        if not rows:
            continue
        if "lr" not in facts.trained:
            raise InputError(
                f"{path.parent}: no run.json that says its rate, so it shows no search; give the "
                "folder of the runs as finetune made it"
            )
        head = rows[0]
        metrics.setdefault(head.dataset, metrics_of(rows)[0])
        one = Tried(
            encoder=_encoder(head) if head.arm == "pretrained" else "",
            rate=float(facts.trained["lr"]),
            labels=head.labels,
            draw=f"{head.split_hash} {head.checkpoint_digest} {head.draw}",
            score=mean_score(rows),
            cases=frozenset((row.split_hash, row.case) for row in rows),
            trained=facts.trained,
        )
        found.setdefault(head.dataset, []).append(one)
    return {name: Search(metrics[name], tried) for name, tried in found.items()}


def _encoder(row: Row) -> str:
    """The recipe of its pretraining, or the checkpoint."""
    return row.pretrain_recipe or row.checkpoint_digest


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
        if arms["pretrained"] and arms["scratch"] and not arms["scratch-own"]:
            return ["to the twin alone: whether scratch has a better rate of its own is not shown"]
        own = [one for one in known["scratch-own"] if one is not None]
        rate = f" (rate {own[0].trained['lr']:g})" if own and "lr" in own[0].trained else ""
        claim = f"scratch's own recipe{rate} is its protocol's claim: no search is shown (search=)"
        return [claim] if arms["scratch-own"] else []
    search = searches.get(rows[0].dataset)
    if search is None:
        return ["no run of the search is about this data set"]
    encoders = {_encoder(row) for row in arms["pretrained"]}
    # Folders that do not say their network, as those of older versions, may have any.
    said = [one.trained.get("network") for found in known.values() for one in found if one]
    narrowed = search.about(encoders, rows[0].labels, [*said, None])
    notes = [_shown(narrowed), *_unfair(narrowed, arms, known)]
    searched = {one.encoder for one in search.tried} - {""}
    if searched and not encoders <= searched:
        notes.append("the search: the rate was chosen with another checkpoint")
    return notes


def _shown(search: Search) -> str:
    """What each arm could choose from, and chose."""
    said = []
    for arm in ("pretrained", "scratch"):
        if runs := search.of(arm):
            rate, found = search.best(arm)
            rates = ", ".join(f"{one:g}" for one in search.rates(arm))
            if math.isnan(rate):
                said.append(f"{arm} none of {rates} (no draw is scored for all, {len(runs)} runs)")
                continue
            score = f"{search.metric.title} {found:.{shown_digits(search.metric, found)}f}"
            said.append(f"{arm} {rate:g} of {rates} ({score}, {len(runs)} runs)")
        else:
            said.append(f"{arm} had none")
    return f"rates were chosen: {'; '.join(said)}"


def _unfair(search: Search, arms: Mapping[str, list[Row]], known: Known) -> list[str]:
    """What speaks against the choice."""
    found = []
    a, b = (search.rates(arm) for arm in ("pretrained", "scratch"))
    if not set(b) >= set(a) or len(search.of("scratch")) < len(search.of("pretrained")):
        found.append("scratch was searched with less than the pretrained arm")
    own = "scratch-own" if arms["scratch-own"] else "scratch"
    for arm, name in (("pretrained", "pretrained"), (own, "scratch")):
        runs, shared = search.of(name), search.shared(name)
        compared = sum(map(len, shared.values()))
        if compared < len(runs):
            found.append(f"rates of {name} are compared on shared draws, {compared} of its runs")
        rates = {one.trained["lr"] for one in known[arm] if one and "lr" in one.trained}
        best, _ = search.best(name)
        if len(tried := search.rates(name)) > 1 and best in (tried[0], tried[-1]):
            end = "lowest" if best == tried[0] else "highest"
            found.append(f"{name} is best at the {end} rate that was tried: there may be a better")
        for rate in sorted(rates) if compared else ():
            if rate != best and arm == "scratch":
                found.append(f"scratch is best with {best:g}, its twin has {rate:g}: recipe_of=own")
            elif rate != best:
                found.append(f"{arm} trained with {rate:g}, where {best:g} was best")
    rows = [row for part in arms.values() for row in part]
    reported = {(row.split_hash, row.case) for row in rows}
    if any(one.cases & reported for one in search.tried):
        found.append("rates were chosen on cases that are reported")
    # Scratch at its own best leaves out what needs pretrained weights, so each arm by itself.
    reported_arms = {
        "pretrained": known["pretrained"],
        "scratch": known["scratch-own"] or known["scratch"],
    }
    other: set[str] = set()
    for arm, facts in reported_arms.items():
        for trained in [one.trained for one in facts if one and one.trained][:1]:
            other |= {
                name
                for one in search.of(arm)
                for name in one.trained.keys() | trained.keys()
                if one.trained.get(name) != trained.get(name)
            }
    if different := sorted(other - MAY_DIFFER):
        found.append(f"it differs from the report in {', '.join(different)}")
    if other_labels := {one.labels for one in search.tried} - {rows[0].labels}:
        found.append(f"it had labels={', '.join(sorted(other_labels))}")
    return [f"the search: {one}" for one in found]
