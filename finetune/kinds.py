"""What finetuning does in a way of its own for each kind of task; train.py does all the rest.

A kind is asked, in this order: does the corpus fit the task, which training cases can be used,
which network is to be trained, on which crops, what is watched meanwhile, and at the end for the
network as a file, the answers to the test cases and their rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_prep.corpus import Corpus
from data_prep.errors import InputError, some
from data_prep.progress import bar
from data_prep.volume import write_nifti
from finetune.answerer import Answerer
from finetune.answers import ANSWERS, read_answers, score_answers, write_answers
from finetune.evaluate import Split, score, task_problems
from finetune.model_file import write_network
from finetune.plan import Plan
from finetune.pooled import Pooled, pooled, standard
from finetune.predictions import Labels, find_predictions, read_prediction
from finetune.probes import fit_probe
from finetune.protocol import phase_steps
from finetune.rows import Row
from finetune.scan_task import ScanTask
from finetune.segmentation import Segmentation
from finetune.segmenter import Segmenter
from finetune.settings import FinetuneSettings, TaskSettings
from finetune.supervised import Supervised
from finetune.targets import Targets, read_targets
from finetune.validation import Validation
from pretrain.augment import Augment
from pretrain.backbones.backbone import Backbone
from pretrain.device import chosen_device
from pretrain.loader import CropDataset
from pretrain.objective import Batch
from pretrain.preemption import heed
from pretrain.run_folder import RunFolder


class Kind(ABC):
    """A kind of task, with the settings of a run."""

    def __init__(self, settings: FinetuneSettings) -> None:
        self.settings = settings

    @abstractmethod
    def problems(self, corpus: Corpus) -> list[str]:
        """Why the task cannot be learnt from a corpus; empty if it can."""

    def targets(self, corpus: Corpus, split: str) -> Targets | None:
        """What is to be answered for the cases of a split, where that is no label map."""
        return None

    def partial(self, corpus: Corpus, train: Split) -> dict[str, list[str]]:
        """Training cases that cannot be used, and the classes that each of them lacks."""
        return {}

    @abstractmethod
    def unlabelled(
        self, corpus: Corpus, keys: Sequence[str], targets: Targets | None
    ) -> tuple[str, ...]:
        """Classes that no chosen case has.

        Raises:
            InputError: nothing can be learnt from these cases.
        """

    @abstractmethod
    def network(self, encoder: Backbone, targets: dict[str, float]) -> Supervised:
        """What is trained: an encoder with a decoder of its own."""

    @abstractmethod
    def crops(self) -> dict[str, Any]:
        """Arguments of the crops' dataset."""

    @abstractmethod
    def augment(self) -> Augment:
        """How crops are changed on the device."""

    def fit(self, model: Supervised, dataset: CropDataset) -> None:
        """Fits a probe in closed form."""
        raise NotImplementedError

    def validation(self, plan: Plan, run: RunFolder, model: Supervised) -> Validation | None:
        """What watches the training."""
        return None

    def notes(self, plan: Plan) -> list[str]:
        """What is said before a run begins."""
        chosen = self.settings
        if chosen.fit != "descent":
            return []
        warmups = {f"phases[{i}].warmup": one.warmup for i, one in enumerate(chosen.phases)}
        warmups["warmup"] = chosen.warmup
        stretches = phase_steps(chosen.phases, chosen.steps)
        return [
            f"{name}={warmup}: not shorter than the {len(steps)} steps that it is of, so that the "
            "rate never gets to lr"
            for (name, warmup), steps in zip(warmups.items(), stretches, strict=True)
            if warmup >= len(steps)
        ]

    @abstractmethod
    def score(self, plan: Plan, run: RunFolder, model: Supervised) -> list[Row]:
        """Writes the network and its answers for the test cases; returns their rows."""

    @abstractmethod
    def score_again(self, plan: Plan, run: RunFolder) -> list[Row]:
        """Rows from what a finished run has answered.

        Raises:
            InputError: it is not there any more.
        """

    @abstractmethod
    def look(self, model: Supervised, batch: Batch) -> Tensor:
        """What a window costs at test time, done once to be timed."""


def kind_of(settings: FinetuneSettings) -> Kind:
    """The kind of the settings' task."""
    return Answering(settings) if isinstance(settings.task, ScanTask) else Segmenting(settings)


def device_of(settings: FinetuneSettings) -> torch.device:
    """Where a run's network is outside of its training."""
    return chosen_device("auto", settings.trainer.accelerator)


def device_name(settings: FinetuneSettings) -> str:
    """What costs call it."""
    device = device_of(settings)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class Segmenting(Kind):
    """Each voxel gets a class; labels are those of the corpus."""

    @property
    def task(self) -> TaskSettings:
        """What is segmented."""
        assert isinstance(self.settings.task, TaskSettings)
        return self.settings.task

    def problems(self, corpus: Corpus) -> list[str]:
        """The corpus has no labels, or not those of the task."""
        return task_problems(corpus, self.task)

    def partial(self, corpus: Corpus, train: Split) -> dict[str, list[str]]:
        """Training cases in which not every class was annotated, and the classes that were not.

        A structure that nobody looked for may be there; as background it would be learnt away.

        Raises:
            InputError: that is so in all of them.
        """
        found = {}
        for key in train.keys:
            annotated = set(corpus.meta(corpus.position(key))["annotated"])
            missing = [c.name for c in self.task.classes if not annotated.issuperset(c.values)]
            if missing:
                found[key] = missing
        if len(found) == len(train.keys):
            raise InputError(
                f"corpus={corpus.path}: none of the {len(found)} training cases of split "
                f"{train.name} is annotated for all classes of task {self.task.name} (missing: "
                f"{missing_classes(found)}), and what is not annotated would be learnt as "
                "background; choose a task with the classes that are annotated"
            )
        return found

    def unlabelled(
        self, corpus: Corpus, keys: Sequence[str], targets: Targets | None
    ) -> tuple[str, ...]:
        """Classes of which no chosen training case has a voxel."""
        present = {
            int(value)
            for key in keys
            for value, voxels in corpus.meta(corpus.position(key))["class_voxels"].items()
            if voxels
        }
        return tuple(c.name for c in self.task.classes if not present & set(c.values))

    def network(self, encoder: Backbone, targets: dict[str, float]) -> Segmentation:
        """An encoder with a decoder of voxels."""
        return Segmentation(
            encoder=encoder,
            task=self.task,
            decoder=self.settings.decoder,
            deep_supervision=self.settings.deep_supervision,
        )

    def crops(self) -> dict[str, Any]:
        """Labelled crops, some of them around a voxel of a class."""
        return {
            "label": True,
            "foreground": self.settings.foreground,
            "classes": [c.values for c in self.task.classes],
        }

    def augment(self) -> Augment:
        """Mirrors that exchange the label values of sides."""
        return Augment(self.task.flip, self.settings.augment, self.task.swap)

    def fit(self, model: Supervised, dataset: CropDataset) -> None:
        """A probe of voxels, from as many crops as training would see."""
        assert isinstance(model, Segmentation)
        fit_probe(model, dataset, self.settings.steps * self.settings.batch_size)

    def validation(self, plan: Plan, run: RunFolder, model: Supervised) -> Validation | None:
        """Dice on validation cases."""
        settings = self.settings
        if not settings.validations or not plan.validation:
            return None
        return Validation(
            self._segmenter(plan, model),
            plan.corpus,
            plan.validation,
            steps=settings.steps,
            times=settings.validations,
            run=run.path,
        )

    def notes(self, plan: Plan) -> list[str]:
        """What nothing is measured of, learnt of or done with."""
        said = super().notes(plan)
        if self.settings.validations and not plan.validation:
            said.append(
                f"split {plan.test.name!r} has no validation part, so validations="
                f"{self.settings.validations} measures nothing"
            )
        if plan.unlabelled:
            said.append(f"no training case has {', '.join(plan.unlabelled)} in this label draw")
        if plan.partial:
            said.append(
                f"{len(plan.partial)} training cases are left out, for not every class was "
                f"annotated in them (missing: {missing_classes(plan.partial)})"
            )
        return said

    def score(self, plan: Plan, run: RunFolder, model: Supervised) -> list[Row]:
        """Label maps in predictions/, and their rows; those that these weights gave stay."""
        corpus, segmenter = plan.corpus, self._segmenter(plan, model)
        folder, backbone = run.path / "predictions", plan.release.config["backbone"]
        write_network(segmenter, backbone, self.settings.decoder, run.path, answered=folder)
        folder.mkdir(exist_ok=True)

        def predict(key: str) -> Labels:
            heed(self.settings.steps)
            volume, file = corpus.volume(corpus.position(key)), folder / f"{key}.nii.gz"
            if file.exists():
                return read_prediction(file, volume)
            labels = segmenter.label_values(segmenter.segment(volume))
            write_nifti(labels, volume.native, file)
            return labels

        return score(corpus, plan.test, self.task, predict, plan.origin)

    def score_again(self, plan: Plan, run: RunFolder) -> list[Row]:
        """From predictions/."""
        corpus = plan.corpus
        files = find_predictions(run.path / "predictions", corpus, plan.test.keys, None)

        def read(key: str) -> Labels:
            return read_prediction(files[key], corpus.volume(corpus.position(key)))

        return score(corpus, plan.test, self.task, read, plan.origin)

    def look(self, model: Supervised, batch: Batch) -> Tensor:
        """Logits."""
        assert isinstance(model, Segmentation)
        return model.logits(batch.image[:1])

    def _segmenter(self, plan: Plan, model: Supervised) -> Segmenter:
        assert isinstance(model, Segmentation)
        return Segmenter(model=model, task=self.task, **looks(plan))


class Answering(Kind):
    """Each scan has one answer; targets come from a table."""

    @property
    def task(self) -> ScanTask:
        """What is asked."""
        assert isinstance(self.settings.task, ScanTask)
        return self.settings.task

    def problems(self, corpus: Corpus) -> list[str]:
        """None: labels are not needed."""
        return []

    def targets(self, corpus: Corpus, split: str) -> Targets:
        """Those of all cases of the split, whichever of them are drawn."""
        assert self.settings.targets is not None
        parts = corpus.split(split)["parts"]
        keys = [key for part in parts.values() for key in part]
        return read_targets(self.settings.targets, self.task, corpus, keys)

    def unlabelled(
        self, corpus: Corpus, keys: Sequence[str], targets: Targets | None
    ) -> tuple[str, ...]:
        """Classes that no chosen case is of."""
        assert targets is not None
        found = targets.of(keys)
        if self.task.kind == "regression":
            standard(found)
            return ()
        present = set(found.values())
        return tuple(name for i, name in enumerate(self.task.classes) if i not in present)

    def network(self, encoder: Backbone, targets: dict[str, float]) -> Pooled:
        """An encoder with a head on its pooled features."""
        return pooled(self.task, encoder, self.settings.decoder, targets)

    def crops(self) -> dict[str, Any]:
        """Crops as pretraining has them."""
        return {}

    def augment(self) -> Augment:
        """Mirrors; where they exchange classes, the network does (finetune/pooled.py)."""
        return Augment(self.task.flip, self.settings.augment)

    def notes(self, plan: Plan) -> list[str]:
        """What of the protocol is of segmentation, and which classes cannot be learnt."""
        said = super().notes(plan)
        asked = [n for n in ("validations", "deep_supervision") if getattr(self.settings, n)]
        if asked:
            said.append(
                f"{' and '.join(asked)} are of segmentation, and {self.task.name} is a task of "
                "whole scans: they have no effect here"
            )
        if plan.unlabelled:
            said.append(f"no training case is {', '.join(plan.unlabelled)} in this label draw")
        return said

    def score(self, plan: Plan, run: RunFolder, model: Supervised) -> list[Row]:
        """answers.csv and its rows; answers that these weights gave stay."""
        assert isinstance(model, Pooled) and plan.targets is not None
        corpus, answerer = plan.corpus, Answerer(model=model, task=self.task, **looks(plan))
        backbone = plan.release.config["backbone"]
        file = run.path / ANSWERS
        write_network(answerer, backbone, self.settings.decoder, run.path, answered=file)
        answers = read_answers(run.path, "key", self.task)
        left = [key for key in plan.test.keys if key not in answers]
        try:
            for key in bar(iterable=left, desc="answer", unit="case"):
                heed(self.settings.steps)
                answers[key] = answerer.answer(corpus.volume(corpus.position(key))).tolist()
        finally:  # a run that is ended keeps the answers that it has
            write_answers(run.path, "key", self.task, answers)
        return score_answers(corpus, plan.test, plan.targets, answers, plan.origin)

    def score_again(self, plan: Plan, run: RunFolder) -> list[Row]:
        """From answers.csv."""
        assert plan.targets is not None
        answers = read_answers(run.path, "key", self.task)
        if absent := [key for key in plan.test.keys if key not in answers]:
            raise InputError(f"{run.path / ANSWERS}: has no answer for {some(absent)}")
        return score_answers(plan.corpus, plan.test, plan.targets, answers, plan.origin)

    def look(self, model: Supervised, batch: Batch) -> Tensor:
        """Answers."""
        assert isinstance(model, Pooled)
        return model.answers(batch.image[:1], batch.valid[:1])


def looks(plan: Plan) -> dict[str, Any]:
    """How a run's network looks at scans."""
    settings = plan.settings
    assert settings.crop_size is not None
    return {
        "preprocess": plan.preprocess,
        "window": settings.crop_size,
        "overlap": settings.overlap,
        "modalities": tuple(sorted(set(plan.corpus.modalities))),
        "tta": settings.tta,
        "precision": settings.trainer.precision,
        "window_batch": settings.window_batch,
    }


def missing_classes(partial: dict[str, list[str]]) -> str:
    """In how many cases each class is not annotated."""
    cases = Counter(name for names in partial.values() for name in names)
    return ", ".join(f"{name} in {count}" for name, count in cases.items())
