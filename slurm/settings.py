"""What a cluster gives a job; files of conf/cluster. No torch in here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml  # type: ignore[import-untyped]
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from conf.compose import HERE, take_option
from data_prep.errors import InputError, near, plain_message

CLUSTERS = HERE / "cluster"
PREFIX = "cluster."
CLUSTER = ("cluster=", PREFIX)
"""What words of the cluster begin with."""


def _word(value: str) -> str:
    if not re.fullmatch(r"[\w.,:@=+/&|()*\[\]-]+", value):
        raise ValueError("has letters that no option of sbatch has")
    return value


def _time(value: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d{1,2}:\d{2}:\d{2}|\d+", value):
        raise ValueError("expected HH:MM:SS, DAYS-HH:MM:SS or minutes")
    return value


class _Yaml(yaml.SafeLoader):
    """YAML whose numbers stay text until a key wants one: 24:00:00 is one, to the base of 60."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in known if not tag.endswith((":int", ":float"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Word = Annotated[str, AfterValidator(_word)]
Count = Annotated[int, Field(ge=1, le=4096)]


class ClusterSettings(BaseModel):
    """The keys of a file of conf/cluster."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["local", "slurm"]
    nodes: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 0
    tasks_per_node: Count | None = None
    cpus_per_task: Count = 2
    time: Annotated[str, AfterValidator(_time)] = "24:00:00"
    memory: Word | None = None
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    gres: Word | None = None
    signal: Annotated[str, Field(pattern=r"^(USR1|USR2)@\d+$")] = "USR2@180"
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 20
    array_limit: Count | None = None
    container: Literal["none", "apptainer", "pyxis"] = "none"
    image: str | None = None
    mounts: str | None = None
    environment: list[str] = []

    @model_validator(mode="after")
    def _container_has_an_image(self) -> Self:
        if (self.container == "none") != (self.image is None):
            raise ValueError(
                f"container={self.container} with image={self.image}: give both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _signal_leaves_time(self) -> Self:
        seconds = int(self.signal.partition("@")[2])
        if 2 * seconds > self.hours * 3600:
            raise ValueError(
                f"signal={self.signal} with time={self.time}: the signal ends a start before half "
                "of its time is over; give fewer seconds, or a longer time"
            )
        return self

    @property
    def tasks(self) -> int:
        """Tasks of a node: one for each GPU."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def hours(self) -> float:
        """The time limit of one start."""
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if len(parts) == 1:
            return parts[0] / 60
        return 24 * int(days or 0) + parts[0] + parts[1] / 60 + parts[2] / 3600


def cluster_of(words: Sequence[str]) -> tuple[ClusterSettings, list[str]]:
    """Reads `cluster=NAME` and `cluster.KEY=VALUE` among words; returns the other words too.

    A folder of `--config-dir` that holds clusters and nothing else is not one of them: the command
    that is launched would look for its own groups there.

    Raises:
        InputError: there is no such cluster, or a key is wrong; all of them.
    """
    rest = without_cluster(words)
    given = dict(word.split("=", 1) for word in words if word.startswith(CLUSTER))
    name = given.pop("cluster", "slurm")
    without, own = take_option(rest, "--config-dir")
    groups = {file.parent.name for folder in own for file in Path(folder).glob("*/*.yaml")}
    rest = without if groups == {"cluster"} else rest
    roots = (CLUSTERS, *(Path(folder) / "cluster" for folder in own))
    files = {file.stem: file for root in roots for file in root.glob("*.yaml")}
    if name not in files:
        raise InputError(f"cluster={name}: no such cluster; {near(name, files)}")
    stored = yaml.load(files[name].read_text(), _Yaml) or {}
    typed = {}
    for key, value in given.items():
        try:
            typed[key.removeprefix(PREFIX)] = yaml.load(value, _Yaml)
        except yaml.YAMLError as error:
            raise InputError(
                f"{key}={value}: cannot be read; texts with brackets or colons are quoted, as in "
                f"{key}='[\"module load x\"]'"
            ) from error
    return _checked({**stored, **typed}, files[name], typed), rest


def without_cluster(words: Sequence[str]) -> list[str]:
    """The words that are not of the cluster."""
    return [word for word in words if not word.startswith(CLUSTER)]


def _checked(values: Mapping[str, Any], file: Path, typed: Mapping[str, Any]) -> ClusterSettings:
    try:
        return ClusterSettings.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            key = str(item["loc"][0]) if item["loc"] else ""
            where = "" if key in typed or not key else f" (set in {file})"
            if item["type"] == "extra_forbidden":
                hint = near(key, ClusterSettings.model_fields)
                problems.append(f"{PREFIX}{key}: no such key{where}; {hint}")
            else:
                said = plain_message([item], len(item["loc"]))
                problems.append(f"{PREFIX}{key or '*'}{where}: {said}")
        raise InputError(problems) from error
