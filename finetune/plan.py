"""What the settings of a run come to on its release and corpus, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess
from finetune.evaluate import Origin, Seen, Split, comparable
from finetune.settings import FinetuneSettings, config_hash
from finetune.targets import Targets
from finetune.validation import watched
from pretrain.release import Release


@dataclass(frozen=True)
class Plan:
    """What a run is going to be."""

    settings: FinetuneSettings
    release: Release
    corpus: Corpus
    preprocess: Preprocess
    train_keys: tuple[str, ...]
    partial: dict[str, list[str]]
    """Training cases that are left out, and the classes that were not annotated in each."""
    unlabelled: tuple[str, ...]
    test: Split
    validation: tuple[str, ...]
    """Cases that are looked at while it trains; none where the split has no validation part."""
    recipe: dict[str, Any]
    """What all arms share; `settings` are those that this run trains with."""
    trained: dict[str, Any]
    """The recipe of this run: the same, unless it is scratch at its own best."""
    transfer: str
    """What the pretrained arm takes over: the encoder, the network (its decoder but for the head),
    or task (the head too, of a release that was finetuned for the same classes)."""
    targets: Targets | None = None
    """Of a task of whole scans: what is to be answered for each case of the split."""

    @property
    def label_subjects(self) -> int:
        """How many people the labelled cases are of."""
        subjects, position = self.corpus.subjects, self.corpus.position
        return len({subjects[position(key)] for key in self.train_keys})

    @property
    def identity(self) -> dict[str, Any]:
        """What a run is; a run folder holds one of these for life."""
        return {
            "config_hash": config_hash(self.recipe),
            "recipe_hash": config_hash(self.trained),
            "split_hash": self.test.hash,
            "checkpoint_digest": self.release.digest if self._pretrained else None,
            "init": self.settings.init,
            "seed": self.settings.seed,
            "label_seed": self.settings.label_draw,
            # Scratch takes nothing over: checkpoints of one architecture share its runs.
            "transfer": self.transfer if self._pretrained and self.transfer != "encoder" else None,
        }

    @property
    def origin(self) -> Origin:
        """Where rows of the run come from."""
        settings, release, pretrained = self.settings, self.release, self._pretrained
        made = release.config["training"] if pretrained else {}
        pretraining = str(made.get("recipe_hash", ""))
        return Origin(
            arm=settings.arm,
            protocol=settings.protocol,
            recipe_hash=config_hash(self.trained),
            labels=settings.labels,
            n_labels=len(self.train_keys),
            seed=settings.seed,
            label_seed=settings.label_draw,
            init_seed=settings.seed,
            pretrain_seed=int(made.get("seed", -1)),
            pretrain_recipe=pretraining and f"{pretraining}/{self.transfer}",
            steps=settings.steps,
            checkpoint=self.checkpoint,
            checkpoint_digest=release.digest if pretrained else "",
            config_hash=config_hash(self.recipe),
            seen=comparable(release.fingerprints) if pretrained else Seen(),
        )

    @property
    def by_voxels_alone(self) -> list[str]:
        """Test cases of which copies among what the checkpoint has seen would not be found."""
        seen, prints = self.origin.seen, self.corpus.scan_prints()
        keys = self.test.keys if seen is not None else ()
        return [key for key in keys if seen is not None and seen.by_voxels_alone(prints[key])]

    @property
    def validation_seen(self) -> list[str]:
        """Cases of its curve that the checkpoint has seen: what it says of them is no news."""
        seen, prints = self.origin.seen, self.corpus.scan_prints()
        keys = watched(self.validation) if self.settings.validations and self.validation else ()
        return [key for key in keys if seen is not None and seen.has(prints[key])]

    @property
    def _pretrained(self) -> bool:
        return self.settings.init == "pretrained"

    @property
    def checkpoint(self) -> str:
        """What rows call the checkpoint; empty for scratch."""
        if not self._pretrained:
            return ""
        also = {"encoder": "", "network": " with decoder", "task": " with decoder and head"}
        return self.release.name + also[self.transfer]
