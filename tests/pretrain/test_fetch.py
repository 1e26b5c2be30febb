"""What comes from elsewhere arrives whole and as it was meant, or not at all.

A real server on this machine answers, and huggingface_hub talks to it as to the hub.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import Fake, Repo
from safetensors.numpy import save

import voxelith
from data_prep import download
from data_prep.errors import CorruptionError, InputError, UnreachableError
from data_prep.preprocess import Preprocess
from data_prep.references import parse
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.cache import cached
from pretrain.fetch import fetch, resolve
from pretrain.foreign.nnssl_file import adaptation_plan
from pretrain.release import write_release
from pretrain.run_folder import RunFolder

COMMIT = "5" * 40
ROOT = Path(__file__).parent.parent.parent
ARGS = {"in_channels": 1, "features": [4, 6], "strides": [1, 2], "blocks": [1, 1]}


def make_release(output: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = {
        "format": 1,
        "name": "tiny",
        "kind": "encoder",
        "backbone": {"name": "resenc.ResEncUNetEncoder", "args": ARGS},
        "objective": {"name": "cnn_mae.CnnMAE", "args": {}},
        "crop_size": [8, 16, 8],
        "modalities": ["CT"],
        "preprocess": Preprocess.default(spacing_mm=(4.0, 4.0, 4.0)).to_dict(),
        "training": {},
        "data": {},
        "versions": {},
        "decoder": None,
        "transfers": "encoder",
    }
    prints = {"format": 1, "values": []}
    encoder = ResEncUNetEncoder(**ARGS)
    plan = adaptation_plan(config)
    assert plan is not None  # so that what is not in every release is among what travels
    write_release(
        output, encoder=encoder, config=config, fingerprints=prints, card="# tiny\n", plan=plan
    )
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two releases that differ in their weights."""
    made = tmp_path_factory.mktemp("releases")
    return make_release(made / "one", 0), make_release(made / "two", 1)


@pytest.fixture
def files(folders: tuple[Path, Path]) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folders[0].iterdir()}


@pytest.fixture
def other(folders: tuple[Path, Path]) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folders[1].iterdir()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VOXELITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.02))
    return tmp_path / "cache"


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    made = Fake().start()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    yield made
    made.stop()


def weights(seed: int = 0, numbers: int = 300_000) -> bytes:
    values = np.random.default_rng(seed).normal(size=numbers).astype(np.float32)
    return save({"weight": values})


def kept(cache: Path) -> list[Path]:
    """Files that the cache gives out or would go on with."""
    parts = (cache / "content", cache / "partial")
    return [file for part in parts for file in part.rglob("*") if file.is_file()]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# What arrives.


def test_a_release_on_the_web_arrives_and_gives_features(
    fake: Fake, files: dict[str, bytes], cache: Path
) -> None:
    url = fake.put("/r/tiny", files)
    found = fetch(url)
    assert found.kind == "release" and not found.cached
    assert found.digest == digest(files["SHA256SUMS"])
    assert {file.name: file.read_bytes() for file in found.path.iterdir()} == files
    assert found.path == cache / "content" / found.digest / "tiny"
    assert not (cache / "partial").exists() or not list((cache / "partial").iterdir())
    encoder = voxelith.load_encoder(url)
    assert encoder.features(found.path / "golden_input.nii.gz").vector.shape == (6,)


def test_a_release_on_the_hub_arrives(fake: Fake, files: dict[str, bytes]) -> None:
    fake.repos["org/tiny@main"] = Repo(COMMIT, {**files, ".gitattributes": b"x", "notes.md": b"x"})
    found = fetch("hf://org/tiny")
    assert (found.commit, found.reference) == (COMMIT, "hf://org/tiny@main")
    assert {file.name for file in found.path.iterdir()} == files.keys()
    # What was listed at a commit is fetched at that commit, not at what the branch is by then.
    assert all(COMMIT in path for _, path, _ in fake.log if "/resolve/" in path)


def test_a_release_in_a_folder_of_a_repository(fake: Fake, files: dict[str, bytes]) -> None:
    fake.repos["org/many@v1"] = Repo(COMMIT, {f"a/b/{name}": d for name, d in files.items()})
    assert fetch("hf://org/many@v1/a/b").digest == digest(files["SHA256SUMS"])


@pytest.mark.parametrize("name", ["w.safetensors", "sub/w.safetensors"])
def test_weights_on_the_hub_and_on_the_web(fake: Fake, name: str) -> None:
    data = weights()
    fake.repos["org/foreign@main"] = Repo(COMMIT, {name: data})
    url = fake.put("/w", {name: data})
    hub, web = fetch(f"hf://org/foreign/{name}"), fetch(f"{url}/{name}?download=true")
    assert hub.kind == web.kind == "weights"
    assert hub.path == web.path and hub.path.read_bytes() == data  # kept once, by content
    assert hub.digest == digest(data)


def test_two_processes_end_with_one_whole_copy(
    fake: Fake, files: dict[str, bytes], cache: Path
) -> None:
    fake.repos["org/tiny@main"] = Repo(COMMIT, files)
    fake.slow = 0.02
    command = [sys.executable, "-m", "voxelith", "fetch", "hf://org/tiny", "--json"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    results = [json.loads(out) for out, _ in said]
    assert results[0]["path"] == results[1]["path"]
    assert sorted(one["cached"] for one in results) == [False, True]
    assert len(fake.asked(end="/model.safetensors")) == 1
    assert {f.name: f.read_bytes() for f in Path(results[0]["path"]).iterdir()} == files


# Broken connections.


def test_a_cut_connection_is_gone_on_with(fake: Fake, cache: Path) -> None:
    data = weights()
    url = fake.put("/w", {"w.safetensors": data})
    fake.cut["/w/w.safetensors"] = [400_000, 300_000]
    assert fetch(f"{url}/w.safetensors").path.read_bytes() == data
    ranges = [headers.get("Range") for headers in fake.asked(end="w.safetensors")]
    assert ranges == [None, "bytes=400000-", "bytes=700000-"]
    assert fake.asked(end="w.safetensors")[1]["If-Range"].startswith('"')


@pytest.mark.parametrize("where", ["hub", "web"])
def test_a_later_run_goes_on_where_one_gave_up(fake: Fake, cache: Path, where: str) -> None:
    data = weights()
    fake.repos["org/foreign@main"] = Repo(COMMIT, {"w.safetensors": data})
    url = fake.put("/w", {"w.safetensors": data})
    ref = f"{url}/w.safetensors" if where == "web" else "hf://org/foreign/w.safetensors"
    path = "/w/w.safetensors" if where == "web" else f"/org/foreign/resolve/{COMMIT}/w.safetensors"
    fake.cut[path] = [500_000, 0, 0, 0]
    with pytest.raises(UnreachableError, match="500,000 bytes are kept"):
        fetch(ref)
    assert not (cache / "content").exists()
    fake.cut.clear()
    fake.log.clear()
    assert fetch(ref).path.read_bytes() == data
    assert [h.get("Range") for h in fake.asked(end="w.safetensors")] == ["bytes=500000-"]


def test_a_file_that_changed_meanwhile_is_begun_anew(fake: Fake, cache: Path) -> None:
    url = fake.put("/w", {"w.safetensors": weights(0)})
    fake.cut["/w/w.safetensors"] = [500_000, 0, 0, 0]
    with pytest.raises(UnreachableError):
        fetch(f"{url}/w.safetensors")
    fake.cut.clear()
    fake.put("/w", {"w.safetensors": weights(1)})
    assert fetch(f"{url}/w.safetensors").path.read_bytes() == weights(1)


def test_passing_faults_are_tried_again_and_lasting_ones_are_not(
    fake: Fake, files: dict[str, bytes], cache: Path
) -> None:
    fake.repos["org/tiny@main"] = Repo(COMMIT, files)
    fake.status["/api/models/org/tiny/revision/main"] = [503]
    fake.status[f"/org/tiny/resolve/{COMMIT}/config.json"] = [500, 429]
    assert fetch("hf://org/tiny").kind == "release"
    url = fake.put("/busy", files)
    fake.status["/busy/SHA256SUMS"] = [503] * 9
    with pytest.raises(UnreachableError, match="answers 503, 3 tries in a row"):
        fetch(url)
    fake.status["/busy/SHA256SUMS"] = [400] * 9
    with pytest.raises(InputError, match="answers 400"):
        fetch(url)
    assert len(fake.status["/busy/SHA256SUMS"]) == 8


# What is refused.


def test_what_is_not_there_is_said_clearly(
    fake: Fake, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.repos["org/tiny@main"] = Repo(COMMIT, {"w.pth": b"PK weights"})
    for ref, said in {
        f"{fake.url}/w.safetensors": "w.safetensors: is not there (404); check the address",
        f"{fake.url}/release": "SHA256SUMS: is not there (404)",
        "hf://org/nothing": "hf://org/nothing@main: ",
        "hf://org/tiny@v9": "hf://org/tiny@v9: has no such revision",
        "hf://org/tiny": "files of weights there: hf://org/tiny@main/w.pth",
        "hf://org/tiny/x.pth": "hf://org/tiny@main/x.pth: has no x.pth",
        "voco": "did you mean voco-",
        "hi-end-mae": "on Google Drive alone",
    }.items():
        assert voxelith.main(["fetch", ref]) == 2
        assert said in capsys.readouterr().err
    assert not kept(cache) and not cached()


@pytest.mark.parametrize("where", ["hub", "web"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "golden_output.safetensors"])
def test_a_tampered_byte_is_refused_and_nothing_is_left(
    fake: Fake, files: dict[str, bytes], cache: Path, where: str, name: str
) -> None:
    bad = bytearray(files[name])
    bad[len(bad) // 2] ^= 1
    fake.repos["org/tiny@main"] = Repo(COMMIT, {**files, name: bytes(bad)})
    url = fake.put("/r", {**files, name: bytes(bad)})
    with pytest.raises(CorruptionError, match=f"{name}: its bytes are not those"):
        fetch("hf://org/tiny" if where == "hub" else url)
    assert not fake.asked(end="/README.md")  # nor was what comes after it fetched
    assert not kept(cache) and not cached()


@pytest.mark.parametrize("where", ["hub", "web"])
def test_a_release_with_a_file_missing_is_refused(
    fake: Fake, files: dict[str, bytes], cache: Path, where: str
) -> None:
    del files["golden_input.nii.gz"]
    fake.repos["org/tiny@main"] = Repo(COMMIT, files)
    url = fake.put("/r", files)
    with pytest.raises(InputError, match=r"golden_input\.nii\.gz: is not there"):
        fetch("hf://org/tiny" if where == "hub" else url)
    assert not (cache / "content").exists() and not cached()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("config.json", "../../evil"), "lists '../../evil'"),
        (lambda text: text.replace("config.json", "/etc/evil"), "lists '/etc/evil'"),
        (lambda text: text + f"{'0' * 64}  more.py\n", "lists 'more.py'"),
        (lambda text: "".join(text.splitlines(True)[1:]), "does not list model.safetensors"),
        (lambda text: "", "does not list"),
    ],
)
def test_sums_that_list_what_no_release_has(
    fake: Fake, files: dict[str, bytes], cache: Path, change: object, said: str
) -> None:
    text = change(files["SHA256SUMS"].decode())  # type: ignore[operator]
    url = fake.put("/r", {**files, "SHA256SUMS": text.encode()})
    with pytest.raises(CorruptionError, match="SHA256SUMS") as caught:
        fetch(url)
    assert said in str(caught.value)
    assert [path for _, path, _ in fake.log] == ["/r/SHA256SUMS"]  # and nothing else was asked for
    assert not kept(cache)


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/evil", "a\\..\\evil", "a//b", "a\0b"]
)
def test_a_listing_that_leads_out_is_refused(
    fake: Fake, files: dict[str, bytes], cache: Path, name: str
) -> None:
    fake.repos["org/tiny@main"] = Repo(COMMIT, {**files, name: b"evil"})
    with pytest.raises(CorruptionError, match="a path out of its folder"):
        fetch("hf://org/tiny")
    assert not [path for _, path, _ in fake.log if "/resolve/" in path]
    assert not kept(cache)


def test_a_swapped_config_is_refused(
    fake: Fake, files: dict[str, bytes], folders: tuple[Path, Path], cache: Path
) -> None:
    """With sums that fit it: the network that it tells of is not that of the weights."""
    config = json.loads(files["config.json"])
    config["backbone"]["args"]["features"] = [4, 2**14]
    swapped = json.dumps(config).encode()
    sums = files["SHA256SUMS"].decode()
    sums = sums.replace(digest(files["config.json"]), digest(swapped))
    url = fake.put("/r", {**files, "config.json": swapped, "SHA256SUMS": sums.encode()})
    with pytest.raises(InputError, match="features"):
        voxelith.load_encoder(url)
    config["backbone"] = {"_target_": "os.system", "name": "x", "args": {}}
    swapped = json.dumps(config).encode()
    sums = files["SHA256SUMS"].decode()
    sums = sums.replace(digest(files["config.json"]), digest(swapped))
    url = fake.put("/s", {**files, "config.json": swapped, "SHA256SUMS": sums.encode()})
    with pytest.raises(InputError, match="name nothing to import"):
        fetch(url)
    assert "/s" not in str(cached())


def test_sizes_are_refused_before_they_are_written(
    fake: Fake, files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = fake.put("/r", {**files, "SHA256SUMS": b"0" * (2**20 + 1)})
    with pytest.raises(InputError, match="more than the 1,048,576"):
        fetch(url)
    url = fake.put("/w", {"w.safetensors": weights()})
    with pytest.raises(InputError, match="more than the 1,000,000"):
        fetch(f"{url}/w.safetensors", limit=1_000_000)
    fake.unlisted.add("/w/w.safetensors")
    with pytest.raises(InputError, match="does not say how long it is"):
        fetch(f"{url}/w.safetensors")
    fake.unlisted.clear()
    full = shutil._ntuple_diskusage(10**6, 10**6, 0)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    with pytest.raises(InputError, match="has room for 0"):
        fetch(f"{url}/w.safetensors")
    assert not kept(cache)


@pytest.mark.parametrize("end", ["tar", "tar.gz", "zip", "tgz"])
def test_archives_are_not_unpacked(fake: Fake, cache: Path, end: str) -> None:
    with pytest.raises(InputError, match="is an archive"):
        fetch(f"{fake.url}/release.{end}")
    assert not fake.log


def test_a_page_is_no_file_of_weights(fake: Fake, cache: Path) -> None:
    url = fake.put("/w", {"a.pth": b"<!DOCTYPE html>", "a.safetensors": b"<html>" * 9})
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(CorruptionError, match=f"{name}: "):
            fetch(f"{url}/{name}")
    assert not kept(cache) and not cached()


def test_what_could_be_changed_on_its_way_needs_a_hash() -> None:
    with pytest.raises(InputError, match="can be changed on its way"):
        parse("http://example.org/release")
    assert parse(f"http://example.org/release#sha256={'0' * 64}").sha256 == "0" * 64


# Pins and the cache.


def test_changed_content_is_refused_after_the_pin(
    fake: Fake, files: dict[str, bytes], other: dict[str, bytes], cache: Path
) -> None:
    fake.repos["org/tiny@main"] = Repo(COMMIT, files)
    first = fetch("hf://org/tiny")
    assert fetch("hf://org/tiny", again=True).path == first.path
    fake.repos["org/tiny@main"] = Repo("6" * 40, other)
    assert fetch("hf://org/tiny").cached  # without asking
    fake.log.clear()
    with pytest.raises(CorruptionError, match="is not what it was") as caught:
        fetch("hf://org/tiny", again=True)
    said = str(caught.value)
    assert digest(files["SHA256SUMS"]) in said and digest(other["SHA256SUMS"]) in said
    assert not fake.asked(end="/model.safetensors")  # the sums alone told
    [pin] = (cache / "pins").iterdir()
    assert str(pin) in said
    pin.unlink()
    assert fetch("hf://org/tiny").digest == digest(other["SHA256SUMS"])
    assert first.path.is_dir()  # whoever uses it still can


def test_changed_weights_are_refused_after_the_pin(fake: Fake, cache: Path) -> None:
    url = fake.put("/w", {"w.safetensors": weights(0)})
    first = fetch(f"{url}/w.safetensors")
    fake.put("/w", {"w.safetensors": weights(1)})
    with pytest.raises(CorruptionError, match="is not what it was"):
        fetch(f"{url}/w.safetensors", again=True)
    assert kept(cache) == [first.path]
    fake.repos["org/foreign@main"] = Repo(COMMIT, {"w.safetensors": weights(0)})
    fetch("hf://org/foreign/w.safetensors")
    fake.repos["org/foreign@main"] = Repo(COMMIT, {"w.safetensors": weights(1)})
    fake.log.clear()
    with pytest.raises(CorruptionError, match="is not what it was"):
        fetch("hf://org/foreign/w.safetensors", again=True)
    assert not fake.asked(end=".safetensors")  # the listing alone told


def test_a_hash_in_the_reference_is_kept_to(fake: Fake, cache: Path) -> None:
    data = weights()
    url = fake.put("/w", {"w.safetensors": data})
    with pytest.raises(CorruptionError, match="is not what it should be"):
        fetch(f"{url}/w.safetensors#sha256={'0' * 64}")
    assert not kept(cache) and not cached()
    assert fetch(f"{url}/w.safetensors#sha256={digest(data)}").digest == digest(data)


def test_offline_from_the_cache(
    fake: Fake,
    files: dict[str, bytes],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.repos["org/tiny@main"] = Repo(COMMIT, files)
    url = fake.put("/w", {"w.safetensors": weights()})
    first = [fetch("hf://org/tiny").path, fetch(f"{url}/w.safetensors").path]
    fake.stop()
    assert [resolve("hf://org/tiny"), resolve(f"{url}/w.safetensors")] == first
    assert voxelith.main(["inspect", "hf://org/tiny"]) == 0
    assert "release of an encoder" in capsys.readouterr().out
    # What is not there: no network is no fault of the input, and offline is one that is said.
    assert voxelith.main(["fetch", "hf://org/other"]) == 1
    err = capsys.readouterr().err
    assert "hf://org/other@main: no answer" in err and "Traceback" not in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert voxelith.main(["fetch", "hf://org/tiny"]) == 0
    assert voxelith.main(["fetch", "hf://org/other"]) == 2
    assert "is not in the cache" in capsys.readouterr().err


def test_a_damaged_cache_is_noticed(fake: Fake, files: dict[str, bytes], cache: Path) -> None:
    url = fake.put("/r", files)
    found = fetch(url)
    weights_file = found.path / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(bytes(data))
    with pytest.raises(CorruptionError, match="the cache is damaged; remove"):
        fetch(url)


def test_a_file_that_is_damaged_in_the_cache_is_replaced_by_what_comes_again(
    fake: Fake, cache: Path
) -> None:
    data = weights()
    first, second = (
        f"{fake.put(at, {'w.safetensors': data})}/w.safetensors" for at in ("/a", "/b")
    )
    path = fetch(first).path
    for ref, again in ((first, True), (second, False)):  # the same content by another reference
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert fetch(ref, again=again).path == path
        assert path.read_bytes() == data
    left = path.stat().st_ino
    assert fetch(first, again=True).path == path and path.stat().st_ino == left
    assert not list((cache / "partial").iterdir())


def test_nothing_is_given_out_before_it_is_whole(
    fake: Fake, files: dict[str, bytes], cache: Path
) -> None:
    """A process that is killed on the way leaves no release, and the next one goes on."""
    url = fake.put("/r", files)
    fake.slow = 0.5
    process = subprocess.Popen(
        [sys.executable, "-m", "voxelith", "fetch", url], cwd=ROOT, stderr=subprocess.PIPE
    )
    try:
        for _ in range(1200):
            if whole := [file for file in kept(cache) if file.name == "model.safetensors"]:
                break
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert whole and not (cache / "content").exists() and not cached()
    fake.slow, before = 0.0, len(fake.asked(end="/model.safetensors"))
    assert fetch(url).digest == digest(files["SHA256SUMS"])
    assert len(fake.asked(end="/model.safetensors")) == before == 1  # what is there is not asked


# Secrets.


def test_passwords_and_signatures_are_never_told(
    fake: Fake, files: dict[str, bytes], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.put("/r", files)
    fake.put("/w", {"w.safetensors": weights()})
    host = fake.url.removeprefix("http://")
    fake.passwords["/w/w.safetensors"] = "Basic am9lOnMzY3JldA=="  # joe:s3cret
    query = "X-Amz-Signature=s1gned&X-Amz-Expires=60"
    refs = [
        f"http://joe:wr0ngs3cret@{host}/w/w.safetensors?{query}",
        f"http://joe:s3cret@{host}/w/w.safetensors?{query}",
        f"http://joe:s3cret@{host}/r?{query}",
        f"http://joe:s3cret@{host}/nothing?{query}",
    ]
    assert [voxelith.main(["fetch", ref, "--json"]) for ref in refs] == [2, 0, 0, 2]
    said = capsys.readouterr()
    told = said.out + said.err + "".join(f.read_text() for f in (cache / "pins").iterdir())
    told += " ".join(map(str, cache.rglob("*"))) + repr(parse(refs[0]))
    for secret in ("s3cret", "s1gned", "am9l", "joe"):
        assert secret not in told
    assert "access is denied (401)" in said.err
    # Signed anew, it is the same file.
    fake.stop()
    assert fetch(refs[1].replace("s1gned", "l8er")).cached


def test_what_a_run_keeps_of_its_command_has_no_secrets(tmp_path: Path) -> None:
    from pretrain.run_folder import RunFolder

    run = RunFolder(tmp_path)
    ckpt = "ckpt=https://j:s3,c@t@h:1/a/b?X-Amz-Signature=s3c,ret&t=1#sha256=0"
    run.describe({}, ["voxelith", f"{ckpt},hf://o/r@v1,https:/u@h/c?s3cret", "lr=1e-3", "x=a@b?c"])
    kept = "ckpt=https://h:1/a/b#sha256=0,hf://o/r@v1,https:/h/c"
    command = json.loads((tmp_path / "run.json").read_text())["command"]
    assert command == ["voxelith", kept, "lr=1e-3", "x=a@b?c"]


def test_a_password_is_not_told_to_another_server(fake: Fake, cache: Path) -> None:
    elsewhere = Fake().start()
    try:
        data = weights()
        url = elsewhere.put("/cdn", {"w.safetensors": data})
        fake.redirects["/w/w.safetensors"] = f"{url}/w.safetensors"
        host = fake.url.removeprefix("http://")
        assert fetch(f"http://joe:s3cret@{host}/w/w.safetensors").path.read_bytes() == data
        assert "Authorization" in fake.asked()[0]
        assert "Authorization" not in elsewhere.asked()[0]
        for there in ("file:///etc/passwd", "ftp://host/f.pth", f"{fake.url}/f.pth"):
            fake.redirects["/f.pth"] = there
            with pytest.raises(InputError, match="not safe to follow"):
                fetch(f"{fake.url}/f.pth")
        secure = urllib.request.Request("https://host/f.pth")
        with pytest.raises(InputError, match="not safe to follow"):
            download._Redirects().redirect_request(secure, None, 302, "", {}, "http://host/f.pth")
    finally:
        elsewhere.stop()


def test_the_hubs_token_goes_to_the_hub_alone(
    fake: Fake, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    elsewhere = Fake().start()
    try:
        url = elsewhere.put("/cdn", {"w.safetensors": weights()})
        fake.repos["org/foreign@main"] = Repo(COMMIT, {"w.safetensors": weights()})
        path = f"/org/foreign/resolve/{COMMIT}/w.safetensors"
        fake.passwords[path] = "Bearer hf_s3cret"
        fake.redirects[path] = f"{url}/w.safetensors"
        fetch("hf://org/foreign/w.safetensors")
        assert all(key.lower() != "authorization" for key in elsewhere.asked()[0])
    finally:
        elsewhere.stop()


# References wherever a checkpoint is named.


def test_a_setting_takes_a_reference(
    fake: Fake, files: dict[str, bytes], cache: Path, tmp_path: Path
) -> None:
    from conf.compose import settings_for

    fake.repos["org/tiny@main"] = Repo(COMMIT, files)
    url = fake.put("/r", files)
    words = [f"input={tmp_path}", f"output={tmp_path / 'out'}"]
    for ref in ("hf://org/tiny", f"http://joe:s3cret@{url.removeprefix('http://')}?sig=a'b"):
        settings = settings_for("predict", [*words, f"ckpt={ref}"])
        assert settings.ckpt == cache / "content" / digest(files["SHA256SUMS"]) / "tiny"
        assert "s3cret" not in settings.model_dump_json()
    with pytest.raises(InputError, match="ckpt: hf://org/none@main: "):
        settings_for("predict", [*words, "ckpt=hf://org/none"])
    fake.log.clear()
    with pytest.raises(InputError, match="batch") as caught:
        settings_for("predict", [*words, "ckpt=hf://org/none", "window_batch=0"])
    assert not fake.log and "is not there" not in str(caught.value)  # other mistakes come first


def test_a_pretraining_begins_from_a_reference(fake: Fake, cache: Path, tmp_path: Path) -> None:
    from conf.compose import settings_for

    data = weights()
    fake.repos["org/foreign@main"] = Repo(COMMIT, {"w.safetensors": data})
    words = [f"corpus={tmp_path}", "run=x", "objective=mae", "backbone=vit_s"]
    ref = f"hf://org/foreign@{COMMIT}/w.safetensors#sha256={digest(data)}"
    settings = settings_for("pretrain", [*words, f"init={ref}"])
    assert settings.init == cache / "content" / digest(data) / "w.safetensors"
    assert settings_for("pretrain", words).init is None


def test_a_run_with_a_checkpoint_needs_its_reference_no_more(
    fake: Fake, cache: Path, tmp_path: Path
) -> None:
    """Requeued to a node without that cache and without a network."""
    from conf.compose import settings_for

    data, run = weights(), RunFolder(tmp_path / "runs" / "x")
    ref = f"hf://org/foreign@{COMMIT}/w.safetensors#sha256={digest(data)}"
    words = ["pretrain", f"corpus={tmp_path}", "run=x", f"runs={tmp_path / 'runs'}",
             "objective=mae", "backbone=vit_s", f"init={ref}"]  # fmt: skip
    run.path.mkdir(parents=True)
    run.describe({"init": "/elsewhere/w.safetensors"}, words)
    with pytest.raises(InputError, match="hf://org/foreign"):  # it is not there
        settings_for(words[0], words[1:])
    run.checkpoints.save(3, {"step": 3})
    assert settings_for(words[0], words[1:]).init == Path("/elsewhere/w.safetensors")
    with pytest.raises(InputError, match="hf://org/other"):  # another one is looked at
        settings_for(words[0], [*words[1:-1], "init=hf://org/other/w.safetensors"])


def test_a_file_that_changed_between_two_starts_comes_whole(tmp_path: Path) -> None:
    """The server resumes whatever tag it is asked with: what has come is of the file of before."""
    first, then = b"A" * 100, b"B" * 120

    class Heedless:
        data, tag = first, "one"

        def open(self, name: str, start: int, tag: str | None) -> download.Part:
            stream = io.BytesIO(self.data[start:])
            return download.Part(stream, start, len(self.data), self.tag)

    source = Heedless()
    (tmp_path / "w.part").write_bytes(first[:80])
    (tmp_path / "w.part.json").write_text('{"tag": "one"}')
    source.data, source.tag = then, "two"
    download.download(source, "w", tmp_path / "w", shown="w", quiet=True)
    assert (tmp_path / "w").read_bytes() == then
    (tmp_path / "v.part").write_bytes(then[:80])
    (tmp_path / "v.part.json").write_text('{"tag": "two"}')
    download.download(source, "v", tmp_path / "v", shown="v", quiet=True)
    assert (tmp_path / "v").read_bytes() == then


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("https://h/modell_größe.pth", "https://h/modell_gr%C3%B6%C3%9Fe.pth"),
        ("https://h/my weights/w.pth", "https://h/my%20weights/w.pth"),
        ("https://h/a%20b/c+d(1).pth?x=y z", "https://h/a%20b/c+d(1).pth?x=y z"),
    ],
)
def test_an_address_is_asked_for_as_a_browser_would(typed: str, asked: str) -> None:
    assert parse(typed).url == asked


def test_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("nowhere") == Path("nowhere")
    assert resolve(tmp_path) == tmp_path
    Path("voco-b").mkdir()
    assert resolve("voco-b") == Path("voco-b")


def test_one_slash_is_enough() -> None:
    """`Path` drops the other."""
    for text in ("hf://org/repo@v1/a/b.pth", "https://host:1/a?b=c", "s3://bucket/a/b"):
        assert parse(str(Path(text))) == parse(text)


@pytest.mark.parametrize(
    "text",
    ["hf://org", "hf://org/repo/../x.pth", "hf://org/repo@a/b/../c", "s3://bucket", "s3://b/../x",
     "https://", "https://[", "https://h/x#md5=0", "hf://o/r#sha256=12"],
)  # fmt: skip
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse(text)


def test_buckets_are_read_through_fsspec(cache: Path, files: dict[str, bytes]) -> None:
    """fsspec's files in memory stand for s3fs, which makes the same calls to a server."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Memory(MemoryFileSystem):
        protocol = "s3"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.removeprefix("s3:/")))

    before = _registry.pop("s3", None)
    fsspec.register_implementation("s3", Memory, clobber=True)
    try:
        for name, data in files.items():
            Memory().pipe_file(f"/bucket/tiny/{name}", data)
        assert fetch("s3://bucket/tiny").digest == digest(files["SHA256SUMS"])
        with pytest.raises(InputError, match="is not there"):
            fetch("s3://bucket/w.pth")
    finally:
        _registry.pop("s3")
        if before is not None:
            _registry["s3"] = before


def test_a_bucket_without_s3fs_names_the_extra(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"voxelith\[s3\]"):
        fetch("s3://bucket/tiny")


# The command.


def test_the_list_says_what_is_known_and_kept(
    fake: Fake, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(fake.put("/r", files))
    assert voxelith.main(["fetch", "--list"]) == 0
    out = capsys.readouterr().out
    for name in ("openmind-resenc-l-mae", "voco-b", "3dino-vit-l", "stu-net-l", "hi-end-mae",
                 "meddinov3-b", "CC BY-NC-ND 4.0", "not pinned", f"{fake.url}/r"):  # fmt: skip
        assert name in out
    assert voxelith.main(["fetch", "--list", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"][0]["digest"] == digest(files["SHA256SUMS"])
    for one in facts["known"]:
        if one["comes_with"]:
            assert (Path(one["reference"]) / "SHA256SUMS").is_file()
        else:
            assert one["reference"] is None or parse(one["reference"]).is_file


@pytest.mark.parametrize("words", [["fetch"], ["fetch", "a", "b"], ["fetch", "x", "again=maybe"]])
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert voxelith.main(words) == 2
    assert "error: " in capsys.readouterr().err


def test_a_local_release_is_verified(folders: tuple[Path, Path]) -> None:
    assert fetch(str(folders[0])).path == folders[0]


def test_fetching_needs_no_torch() -> None:
    code = (
        "import sys, pretrain.fetch; "
        "print([m for m in ('torch', 'huggingface_hub', 'fsspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# Upload.


def test_what_is_pushed_comes_back(
    fake: Fake, folders: tuple[Path, Path], files: dict[str, bytes]
) -> None:
    def push(release: Path) -> str:
        # The client reads HF_ENDPOINT when it is imported; its older versions do so alone.
        code = (
            "import sys, pathlib; from pretrain.hub import destination, push\n"
            "print(push(pathlib.Path(sys.argv[1]), destination('hf://org/mine')))"
        )
        words = [sys.executable, "-c", code, str(release)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    ref = push(folders[0])
    asked = json.loads(fake.pushed["/api/repos/create"])
    assert asked.get("visibility") == "private" or asked["private"] is True
    assert fake.repos["org/mine@main"].files == files
    assert fetch(f"{ref}#sha256={digest(files['SHA256SUMS'])}").digest == digest(
        files["SHA256SUMS"]
    )
    assert push(folders[1]) != ref  # it exists, and gets a new commit


def test_pushing_is_refused_before_or_said_after(
    fake: Fake, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.hub import destination, push

    for wrong in ("https://host/x", "hf://org/repo/folder", "nowhere"):
        words = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--push", wrong]
        assert voxelith.main(words) == 2
    assert "run.json" not in capsys.readouterr().err  # the run was not even looked at
    fake.status["/api/repos/create"] = [403]
    with pytest.raises(InputError, match="access is denied") as caught:
        push(folders[0], destination("hf://other/mine"))
    assert "hf upload other/mine" in str(caught.value)
