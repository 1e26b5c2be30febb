"""The walk of a task of whole scans: finetune, table, report, predict, export, on real scans."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scan_runs import SIDE, VOLUME, scan_settings, truth_of, write_targets
from seeds import SEED
from small_runs import add_few_split, add_split, make_release, write_encoder

from conf.compose import settings_for
from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError, InputError
from data_prep.preprocess import Preprocess
from data_prep.settings import PrepSettings
from data_prep.splits import make_split, write_split
from data_prep.volume import Volume
from finetune.answerer import Answerer
from finetune.answers import ANSWERS, read_answers
from finetune.cells import case_scores
from finetune.describe import as_text, describe
from finetune.export import export_run as export
from finetune.formats import make_table
from finetune.lines import ALL_CLASSES, METRICS
from finetune.model_file import check_golden_network, load_network
from finetune.pooled import Pooled
from finetune.predict import predict
from finetune.report import make_report
from finetune.rows import Row, read_rows, write_rows
from finetune.scan_task import ScanTask
from finetune.search import read_searches
from finetune.settings import PredictSettings
from finetune.sweep import plan_jobs
from finetune.table import read_table
from finetune.train import build_model, finetune, make_plan
from pretrain import preemption
from pretrain.release import Release, load_release


@pytest.fixture(scope="module")
def corpus(labelled_corpus: Path) -> Path:
    add_few_split(labelled_corpus)
    add_split(labelled_corpus, "some", 6, 8)
    return labelled_corpus


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("release") / "r", "resenc")


@pytest.fixture(scope="module")
def targets(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_targets(tmp_path_factory.mktemp("targets") / "t.csv", truth_of(corpus))


@pytest.fixture(scope="module")
def runs(
    release: Release, corpus: Path, targets: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Both arms of both tasks, one seed."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        f"{task['name']}-{init}": finetune(
            scan_settings(
                release, corpus, folder, task, targets, init=init, run=f"{task['name']}-{init}"
            )
        )
        for task in (VOLUME, SIDE)
        for init in ("pretrained", "scratch")
    }


def test_a_run_has_answers_and_rows(runs: dict[str, Path], corpus: Path) -> None:
    run, truth = runs["volume-pretrained"], truth_of(corpus)
    names = {path.name for path in run.iterdir()}
    assert {ANSWERS, "rows.csv", "model.json", "model.safetensors", "metrics.csv"} <= names
    assert not names & {"predictions", "checkpoints", "validation.csv"}
    test = Corpus.open(corpus).split("few")["parts"]["test"]
    rows = read_rows(run / "rows.csv")
    assert [(r.case, r.class_name, r.unit) for r in rows] == [(key, "ml", "ml") for key in test]
    assert [r.truth for r in rows] == pytest.approx([truth[key]["ml"] for key in test])
    assert all(np.isnan(r.dsc) for r in rows)
    answers = read_answers(run, "key", ScanTask.model_validate(VOLUME))
    assert [r.answer for r in rows] == [answers[key][0] for key in test]
    rows = read_rows(runs["side-scratch"] / "rows.csv")
    assert [(r.case, r.class_name) for r in rows] == [(k, n) for k in test for n in SIDE["classes"]]
    assert sum(r.answer for r in rows) == pytest.approx(len(test))
    assert [r.truth for r in rows] == [float(r.class_name == truth[r.case]["side"]) for r in rows]


def test_a_window_is_answered_as_the_network_answers_it(
    runs: dict[str, Path], corpus: Path
) -> None:
    """An oracle: windows one by one, padded where the scan is smaller, weighted by what is in.

    The weights turn out to be the same.
    """
    found = load_network(runs["side-pretrained"], "cpu")
    assert isinstance(found, Answerer)
    volume = Corpus.open(corpus).volume(3)
    image = torch.from_numpy(found.preprocess.apply(volume).array)
    shape = image.shape[1:]
    network = dataclasses.replace(found, window=(16, 32, 48), overlap=0.5, window_batch=2)
    pad = [max(w - n, 0) for n, w in zip(shape, network.window, strict=True)]
    assert any(pad) and not all(pad)
    full = torch.full((1, *(n + p for n, p in zip(shape, pad, strict=True))), float(image.min()))
    valid = torch.zeros_like(full, dtype=torch.bool)
    inside = tuple(slice(p // 2, p // 2 + n) for n, p in zip(shape, pad, strict=True))
    full[(0, *inside)], valid[(0, *inside)] = image[0], True
    total, mass = torch.zeros(2), 0.0
    steps = [w // 2 for w in network.window]
    starts = [
        sorted({*range(0, n - w, s), n - w})
        for n, w, s in zip(full.shape[1:], network.window, steps, strict=True)
    ]
    with torch.no_grad():
        for d in starts[0]:
            for h in starts[1]:
                for w in starts[2]:
                    box = (slice(None), slice(d, d + 16), slice(h, h + 32), slice(w, w + 48))
                    share = float(valid[box].float().mean())
                    total += share * found.model.answers(full[box][None], valid[box][None])[0]
                    mass += share
    assert network.answer(volume).tolist() == pytest.approx((total / mass).tolist(), abs=1e-5)
    # Padding to a multiple, which segmentation needs, is no part of the scan.
    padded = Preprocess.default(multiple=(64, 64, 64))
    assert torch.equal(
        dataclasses.replace(network, preprocess=padded).answer(volume), network.answer(volume)
    )
    # Mirrored too, the answer for the mirrored scan is that of the other side.
    both = dataclasses.replace(network, tta=True)
    turned = dataclasses.replace(volume, array=volume.array[..., ::-1].copy())
    one, other = both.answer(volume), both.answer(turned)
    assert one.tolist() == pytest.approx(other.flip(0).tolist(), abs=1e-6)
    assert one.tolist() != pytest.approx(network.answer(volume).tolist(), abs=1e-6)


def test_twins_start_with_the_same_head(release: Release, corpus: Path, targets: Path) -> None:
    for task in (VOLUME, SIDE):
        for decoder in ("auto", "mlp"):
            heads, encoders = [], []
            for init in ("pretrained", "scratch"):
                given = scan_settings(
                    release, corpus, Path("r"), task, targets, init=init, decoder=decoder
                )
                plan = make_plan(given)
                model, report = build_model(plan)
                assert all(n.startswith("decoder.") for n in report.new) == (init == "pretrained")
                heads.append(model.decoder.state_dict())
                encoders.append(model.encoder.state_dict())
            assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
            assert not all(torch.equal(encoders[0][n], encoders[1][n]) for n in encoders[0])


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    release: Release, corpus: Path, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = scan_settings(
        release, corpus, tmp_path, SIDE, targets, save_every=2, ema=0.9, decoder="mlp", run="whole",
        phases=[{"steps": 2, "freeze": "encoder"}], layer_decay=0.9, augment={"gain": 0.1},
    )  # fmt: skip
    whole = finetune(given)
    cut = given.model_copy(update={"run": "cut"})
    original: Any = Pooled.scores

    def scores(self: Pooled, *args: Any) -> Any:
        if self.loop.step == 5:
            raise RuntimeError("killed")
        return original(self, *args)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Pooled, "scores", scores)
        finetune(cut)
    run = finetune(cut)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (run / ANSWERS).read_bytes() == (whole / ANSWERS).read_bytes()


def test_a_signal_while_it_answers_keeps_what_is_answered(
    release: Release, corpus: Path, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between two scans it goes on with the next; answers of other weights are none."""
    given = scan_settings(release, corpus, tmp_path, SIDE, targets, split="some", run="whole")
    whole = finetune(given)
    cut = given.model_copy(update={"run": "cut"})
    original, asked = Answerer.answer, []

    def answer(self: Answerer, volume: Volume) -> torch.Tensor:
        asked.append(volume)
        if len(asked) == 3:
            monkeypatch.setattr(preemption, "_asked", preemption.Ask.REQUEUE)
        return original(self, volume)

    monkeypatch.setattr(Answerer, "answer", answer)
    with pytest.raises(preemption.Preempted):
        finetune(cut)
    run = tmp_path / "cut"
    assert len(read_answers(run, "key", ScanTask.model_validate(SIDE))) == 3
    assert not (run / "rows.csv").exists()
    monkeypatch.setattr(preemption, "_asked", preemption.Ask.NOTHING)
    kept = Path(shutil.copytree(run, tmp_path / "other"))
    finetune(cut)
    assert len(asked) == 8
    for name in (ANSWERS, "rows.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    (kept / "model.safetensors").write_bytes(b"of a start whose last checkpoint was lost")
    finetune(given.model_copy(update={"run": "other"}))
    assert len(asked) == 8 + 8


def test_a_regression_learns_from_its_draw_alone(
    release: Release, corpus: Path, targets: Path
) -> None:
    """Mean and deviation are those of the training cases: nothing of the test is looked at."""
    plan = make_plan(scan_settings(release, corpus, Path("r"), VOLUME, targets))
    model, _ = build_model(plan)
    assert isinstance(model, Pooled) and set(model.targets) == set(plan.train_keys)
    assert plan.targets is not None and len(plan.targets.values) == 5
    with pytest.raises(InputError, match="a regression needs finite numbers that differ"):
        make_plan(scan_settings(release, corpus, Path("r"), VOLUME, targets, labels=1))


def test_other_targets_are_another_recipe(
    release: Release, corpus: Path, targets: Path, tmp_path: Path
) -> None:
    def identity(file: Path) -> Any:
        return make_plan(scan_settings(release, corpus, tmp_path, VOLUME, file)).identity

    moved = shutil.copy(targets, tmp_path / "moved.csv")
    assert identity(targets) == identity(moved)
    truth = truth_of(corpus)
    key = Corpus.open(corpus).split("few")["parts"]["test"][0]
    truth[key]["ml"] += 0.25
    changed = write_targets(tmp_path / "changed.csv", truth)
    assert identity(changed)["config_hash"] != identity(targets)["config_hash"]
    # A case that the split leaves out is nobody's business.
    truth = truth_of(corpus)
    spare = set(truth) - {k for p in Corpus.open(corpus).split("few")["parts"].values() for k in p}
    truth[sorted(spare)[0]]["ml"] = "unknown"
    assert identity(write_targets(changed, truth)) == identity(targets)


def test_classes_without_a_case_are_told(
    release: Release, corpus: Path, targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    task = {**SIDE, "classes": ["odd", "even", "neither"]}
    run = finetune(
        scan_settings(
            release, corpus, tmp_path, task, targets, steps=8, validations=4, deep_supervision=True
        )
    )
    said = capsys.readouterr().out
    assert "no training case is neither in this label draw" in said
    assert "validations and deep_supervision are of segmentation" in said
    assert json.loads((run / "run.json").read_text())["classes_without_label"] == ["neither"]
    (group,) = read_table([run]).groups
    assert any("no labelled case has neither" in note for note in group.notes)


@pytest.mark.parametrize("protocol", ["short_cnn", "short_cnn_sawtooth", "nnunet", "probe_linear"])
def test_protocols_fit_scan_tasks(
    protocol: str, release: Release, corpus: Path, targets: Path, tmp_path: Path
) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "volume.yaml").write_text(
        "".join(f"{name}: {value}\n" for name, value in VOLUME.items())
    )
    words = [
        "--config-dir", str(tmp_path), "task=volume", f"protocol={protocol}", f"corpus={corpus}",
        f"ckpt={release.path}", f"targets={targets}", "split=few", "labels=2",
    ]  # fmt: skip
    plan = make_plan(settings_for("finetune", words))
    model, _ = build_model(plan)
    assert isinstance(model, Pooled) and plan.transfer == "encoder"
    jobs = plan_jobs(
        [f"--config-dir={tmp_path}", *words[2:], f"runs={tmp_path / 'runs'}", "seed=0,1"]
    )
    assert len({job.name for job in jobs}) == 4


def test_an_unlabelled_corpus_will_do(
    release: Release, samples: Path, targets: Path, tmp_path: Path
) -> None:
    prep(
        PrepSettings(
            input=samples / "hippocampus.csv",
            output=tmp_path / "c",
            keys="names",
            processes=1,
            labels=False,
        )
    )
    corpus = Corpus.open(tmp_path / "c")
    assert not corpus.labelled
    write_split(make_split(corpus.keys, corpus.subjects), corpus.path / "splits")
    given = scan_settings(
        release, corpus.path, tmp_path, VOLUME, targets, split="default", part="validation", steps=2
    )
    rows = read_rows(finetune(given) / "rows.csv")
    assert len(rows) == len(corpus.split("default")["parts"]["validation"]) > 0


# What others make of a run.


def test_a_release_answers_as_its_run(runs: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    for name in ("volume-scratch", "side-scratch"):
        run = runs[name]
        found = export(run, tmp_path / name)
        assert found.kind == "answerer" and found.transfers == "encoder"
        assert check_golden_network(found.path) <= 1e-5
        volume = Corpus.open(corpus).volume(0)
        one, other = load_network(run, "cpu"), load_network(found.path, "cpu")
        assert isinstance(one, Answerer) and isinstance(other, Answerer)
        assert torch.equal(one.answer(volume), other.answer(volume))
        assert "finetuning run" in as_text(describe(run))
        for facts in (describe(run), describe(found.path)):
            said = {"volume": "regression of ml: ml", "side": "classification of side: odd, even"}
            assert facts["answers"] == said[name.partition("-")[0]]
        assert describe(found.path)["kind"] == "release of an answerer"
        assert "finetuning begins with a new one" in describe(found.path)["decoder"]
        text = (found.path / "README.md").read_text()
        assert ("MAE" if name.startswith("volume") else "AUROC not defined") in text
        assert "answers for whole scans" in text


def test_a_release_whose_task_is_of_another_kind_is_refused(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    from data_prep.files import file_digest

    found = export(runs["volume-scratch"], tmp_path / "r")
    original = (found.path / "config.json").read_text()

    def changed(**what: Any) -> Path:
        (found.path / "config.json").write_text(json.dumps(json.loads(original) | what))
        sums = (found.path / "SHA256SUMS").read_text().splitlines()
        sums = [line for line in sums if not line.endswith("config.json")]
        sums.append(f"{file_digest(found.path / 'config.json')}  config.json")
        (found.path / "SHA256SUMS").write_text("\n".join(sums) + "\n")
        return found.path

    facts = json.loads(original)["answers"]
    with pytest.raises(CorruptionError, match=r"out_channels is 3, and the task has 1"):
        load_network(changed(decoder={"out_channels": 3}), "cpu")
    with pytest.raises(InputError, match="kind='answerer' needs answers and decoder"):
        load_release(changed(answers=None))
    with pytest.raises(InputError, match="answers belongs to kind='answerer'"):
        load_release(changed(kind="segmenter", segmentation=facts))
    with pytest.raises(CorruptionError, match="its task is of the other kind"):
        load_network(changed(kind="segmenter", segmentation=facts, answers=None), "cpu")


def test_predict_writes_a_row_for_each_scan(
    runs: dict[str, Path], corpus: Path, samples: Path, tmp_path: Path
) -> None:
    run = runs["volume-pretrained"]
    rows = {row.case: row.answer for row in read_rows(run / "rows.csv")}
    scans = tmp_path / "in"
    (scans / "deep").mkdir(parents=True)
    images = {p.name.removesuffix(".nii.gz"): p for p in samples.rglob("images/*.nii.gz")}
    (key,) = rows
    shutil.copy(images[key], scans / "deep" / f"{key}.nii.gz")
    other = next(name for name in sorted(images) if name != key)
    shutil.copy(images[other], scans / "b.nii.gz")
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    given = {"ckpt": run, "input": scans, "output": tmp_path / "out", "device": "cpu"}
    found = predict(PredictSettings.model_validate(given))
    assert len(found.written) == 2 and list(found.left_out) == ["broken.nii.gz"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [ANSWERS]
    with (tmp_path / "out" / ANSWERS).open() as file:
        said = {row["file"]: float(row["ml"]) for row in csv.DictReader(file)}
    assert set(said) == {f"deep/{key}.nii.gz", "b.nii.gz"}
    assert said[f"deep/{key}.nii.gz"] == pytest.approx(rows[key], rel=1e-5)
    # What has an answer is left alone, whichever network gave it; that of another task is not.
    before = (tmp_path / "out" / ANSWERS).read_bytes()
    again = predict(PredictSettings.model_validate({**given, "resume": True}))
    assert len(again.there) == 2 and not again.written
    assert (tmp_path / "out" / ANSWERS).read_bytes() == before
    with pytest.raises(InputError, match="columns file, ml, expected file, odd, even"):
        predict(
            PredictSettings.model_validate({**given, "ckpt": runs["side-scratch"], "resume": True})
        )


def test_scores_are_made_anew_from_the_answers(
    runs: dict[str, Path], release: Release, corpus: Path, targets: Path, tmp_path: Path
) -> None:
    """As those of segmentations are, when the metric has changed."""
    run = tmp_path / "volume-scratch"
    shutil.copytree(runs[run.name], run)
    rows = read_rows(run / "rows.csv")
    write_rows([dataclasses.replace(r, metric_version=1, answer=9.0) for r in rows],
               run / "rows.csv")  # fmt: skip
    given = scan_settings(release, corpus, tmp_path, VOLUME, targets, init="scratch", run=run.name)
    assert repr(read_rows(finetune(given) / "rows.csv")) == repr(rows)
    write_rows([dataclasses.replace(r, metric_version=1) for r in rows], run / "rows.csv")
    (run / ANSWERS).write_text("key,ml\n")
    with pytest.raises(InputError, match=r"has no answer for hippocampus_\d+") as caught:
        finetune(given)
    assert "cannot be made anew; remove the folder" in str(caught.value)


def test_a_search_is_for_the_lowest_error(tmp_path: Path) -> None:
    from test_scan_metrics import row

    for rate, error in ((0.001, 0.5), (0.003, 0.2), (0.01, 0.9)):
        run = tmp_path / str(rate)
        run.mkdir()
        rows = [row(f"c{i}", "ml", 0, 3.0, 3.0 + error, "ml", arm="scratch") for i in range(4)]
        write_rows(rows, run / "rows.csv")
        facts = {"trained": {"lr": rate}, "recipe": {"task": VOLUME}}
        (run / "run.json").write_text(json.dumps(facts))
    (search,) = read_searches(tmp_path).values()
    rate, found = search.best("scratch")
    assert rate == 0.003 and found == pytest.approx(0.2)


# Tables.


def test_cases_that_were_seen_leave_the_auroc(corpus: Path, targets: Path, tmp_path: Path) -> None:
    """The walk by its files: a checkpoint that has seen a test case is compared without it."""
    found = Corpus.open(corpus)
    seen = found.split("some")["parts"]["test"][0]
    from small_runs import BACKBONES

    folder = write_encoder(
        tmp_path / "r", BACKBONES["resenc"], prints=[found.fingerprints()[seen]],
        crop_size=[16, 32, 32],
    )  # fmt: skip
    known = load_release(folder)
    for init in ("pretrained", "scratch"):
        finetune(
            scan_settings(
                known,
                corpus,
                tmp_path / "runs",
                SIDE,
                targets,
                init=init,
                run=init,
                split="some",
                labels="all",
                steps=2,
            )
        )
    rows = read_rows(tmp_path / "runs/pretrained/rows.csv")
    assert {r.case for r in rows if r.status == "tainted"} == {seen}
    (group,) = read_table([tmp_path / "runs"]).groups
    assert group.main.difference is not None and group.main.difference.cases == 7
    kept = [r for r in rows if r.case != seen]
    scores = case_scores(kept, METRICS["auroc"], ALL_CLASSES, set())
    by_subject: dict[str, list[float]] = {}
    for (case, _), value in scores.items():
        by_subject.setdefault(found.subjects[found.position(case)], []).append(value)
    mean = float(np.mean([np.mean(v) for v in by_subject.values()]))
    assert group.main.pretrained is not None
    assert group.main.pretrained.mean == pytest.approx(mean)
    told = [r.answer for r in kept if r.class_name == "odd"]
    odd = np.array([r.truth == 1 for r in kept if r.class_name == "odd"])
    gaps = np.array(told)[odd][:, None] - np.array(told)[~odd][None]
    assert mean == pytest.approx(100 * ((np.sign(gaps) + 1) / 2).mean())


def test_tables_and_reports_name_what_they_show(runs: dict[str, Path], tmp_path: Path) -> None:
    table = make_table(list(runs.values()), tmp_path)
    titles = [group.main.measures.title for group in table.groups]
    assert titles == ["AUROC", "MAE"]
    text = (tmp_path / "table.md").read_text()
    assert "MAE (ml)" in text and "AUROC (points)" in text and "in AUROC or MAE, adjusted" in text
    assert "Dice" not in text
    assert "Metric" in (tmp_path / "table.tex").read_text()
    page = make_report([], list(runs.values()), table, tmp_path / "r.html").read_text()
    assert "Difference in MAE, ml" in page and "one answer each" in page
    assert "Difference in Dice" not in page and "Surface Dice at" not in page


def arm(
    name: str,
    seed: int,
    *,
    shift: float = 0.0,
    positives: int = 20,
    cases: int = 40,
    draws: int = 3,
) -> Any:
    """Rows of a classification: the more shift, the better it ranks."""
    from test_scan_metrics import row

    rng = np.random.default_rng([seed, len(name)])
    given = {"checkpoint": "mae", "checkpoint_digest": "d"} if name == "pretrained" else {}
    rows: list[Row] = []
    for draw in range(draws):
        for i in range(cases):
            truth = i < positives
            odds = (1.0 + shift) * truth + rng.normal()
            p = 1 / (1 + np.exp(-odds))
            for k, (label, answer) in enumerate((("ill", p), ("well", 1 - p))):
                rows.append(
                    row(
                        f"c{i}",
                        label,
                        k,
                        float(truth == (k == 0)),
                        answer,
                        arm=name,
                        seed=draw,
                        label_seed=draw,
                        init_seed=draw,
                        dataset="sick",
                        **given,
                    )
                )
    return rows


def test_a_better_ranking_is_seen_and_power_is_told(seed: int) -> None:
    from finetune.table import tabulate

    # Three draws see even a perfect ranking only with four seeds of five.
    better = arm("pretrained", seed, shift=4.0, draws=5)
    (group,) = tabulate(arm("scratch", seed, draws=5) + better).groups
    assert group.main.verdict == "pretrained better"
    assert "AUROC" in group.sentence and "points" in group.sentence
    assert any("for +2 and" in note and "AUROC points" in note for note in group.notes)
    assert [line.class_name for line in group.lines] == ["mean"] * 4
    main = group.main
    assert np.isnan(main.improved) and np.isnan(main.median)
    assert group.shown == "Log loss" and len(group.scores["scratch"]) == 200
    # Too few of a class to know how its cases vary: a number, and no interval.
    few = arm("scratch", seed, positives=9) + arm("pretrained", seed, shift=4.0, positives=9)
    (group,) = tabulate(few).groups
    assert group.main.verdict == "undecided"
    assert "an interval needs 10 subjects of each class" in group.sentence
    logs = next(line for line in group.lines if line.metric == "log_loss")
    assert logs.difference is not None and logs.difference.has_interval
    (group,) = tabulate(arm("scratch", 0, positives=40) + arm("pretrained", 0, positives=40)).groups
    assert group.main.verdict == "not defined"
    assert "AUROC is not defined, for all test cases are of one class" in group.sentence
    assert "no test case is well" in group.notes


@pytest.mark.parametrize(("fold_of", "alone"), [(lambda i: i % 5, 0), (lambda i: i // 8, 4)])
def test_folds_that_tell_no_classes_apart_are_noted(
    seed: int, fold_of: Callable[[int], int], alone: int
) -> None:
    """Nor are others blamed where there is no interval for other reasons."""
    from finetune.table import tabulate

    rows = [
        dataclasses.replace(r, split=f"fold-{n}/validation", split_hash=f"{n}")
        for r in arm("scratch", seed) + arm("pretrained", seed, shift=4.0)
        for n in [fold_of(int(r.case[1:]))]
    ]
    (group,) = tabulate(rows).groups
    said = [note for note in group.notes if "folds have cases" in note]
    assert said == (
        [f"{alone} of 5 folds have cases of one class alone, and no AUROC"] * bool(alone)
    )
    few = [r for r in rows if int(r.case[1:]) % 20 < 9]  # nine subjects of each class
    (group,) = tabulate(few).groups
    assert bool(alone) is any("folds have cases" in note for note in group.notes)


def test_arms_are_compared_over_the_cases_that_both_have(seed: int) -> None:
    """A case that one arm lacks takes no part in the other's ranks."""
    from finetune.table import tabulate

    ours, theirs = arm("pretrained", seed, shift=1.0), arm("scratch", seed)
    fewer = [r for r in theirs if r.case not in ("c0", "c1", "c39")]
    shared = [r for r in ours if r.case not in ("c0", "c1", "c39")]
    (group,) = tabulate(ours + fewer).groups
    (other,) = tabulate(shared + fewer).groups
    assert group.main.difference == other.main.difference
    assert group.main.pretrained != other.main.pretrained


def test_lower_errors_are_better() -> None:
    from test_scan_metrics import row

    from finetune.figures import draw_table
    from finetune.formats import latex, markdown
    from finetune.table import tabulate

    rng = np.random.default_rng(SEED + 3)
    rows = []
    for name, error in (("scratch", 0.3), ("pretrained", 0.1)):
        given = {"checkpoint": "mae", "checkpoint_digest": "d"} if name == "pretrained" else {}
        for draw in range(3):
            drawn = {"arm": name, "seed": draw, "label_seed": draw, "init_seed": draw, **given}
            rows += [
                row(
                    f"c{i}",
                    "ml",
                    0,
                    3.0 + i / 10,
                    3.0 + i / 10 + error * rng.normal(),
                    "ml",
                    **drawn,
                )
                for i in range(25)
            ]
    table = tabulate(rows)
    (group,) = table.groups
    assert group.main.verdict == "pretrained better" and group.main.unit == "ml"
    assert group.main.difference is not None and group.main.difference.mean < 0
    assert group.main.improved > 0.7
    (power,) = (note for note in group.notes if "a true difference" in note)
    assert power.startswith("a true difference would be found with a chance of 80% from 0.")
    assert power.endswith(" ml on")
    assert "% MAE in ml, mean" in latex(table)
    assert f"{group.main.scratch.mean:.3f} [" in markdown(table)  # type: ignore[union-attr]
    assert set(draw_table(table)) == {"forest.png"}
