"""What SLURM says of a cluster becomes settings, and what stands in the way is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm import discover
from slurm.discover import _gpus, init, read_cluster, warnings
from slurm.settings import cluster_of

CONFIG = """\
Configuration data as of 2026-11-26T19:07:35
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptParameters       = (null)
SLURM_VERSION           = 23.11.4
SlurmctldParameters     = enable_configless
"""
PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL Default=YES GraceTime=0 MaxTime=2-00:00:00 Nodes=c[1-4] \
PreemptMode=OFF State=UP TotalCPUs=256 TotalNodes=4
PartitionName=gpu AllowGroups=ALL Default=NO GraceTime=120 MaxTime=1-12:00:00 Nodes=g[1-2] \
PreemptMode=REQUEUE State=UP TotalCPUs=256 TotalNodes=2
PartitionName=spot AllowGroups=ALL Default=NO GraceTime=10 MaxTime=UNLIMITED Nodes=g[1-2] \
PreemptMode=CANCEL State=UP TotalCPUs=256 TotalNodes=2
"""
NODES = """\
cpu|c1|64|256000|(null)
cpu|c2|32|128000|(null)
gpu|g1|128|1031000|gpu:a100:8(S:0-1)
gpu|g2|96|1031000|gpu:a100:4(S:0-1),nvme:1
spot|g1|128|1031000|gpu:a100:8(S:0-1)
"""


def test_partitions_are_what_their_least_node_has() -> None:
    found = read_cluster(CONFIG, PARTITIONS, NODES)
    assert (found.version, found.requeues, found.kill_wait) == ("23.11.4", True, 30)
    assert not found.sends_signal
    assert _gpus("gpu:1g.10gb:7(S:0-1),nvme:2") == (7, "1g.10gb")
    assert _gpus("gpu:a100:2,gpu:2g.20gb:4") == (6, "") and _gpus("gpu:4(S:0,2)") == (4, "")
    cpu, gpu, spot = found.partitions
    assert (cpu.default, cpu.gpus, cpu.cpus, cpu.memory_mb) == (True, 0, 32, 128000)
    assert (gpu.gpus, gpu.gpu_type, gpu.cpus, gpu.nodes) == (4, "a100", 96, 2)
    assert (gpu.limit, gpu.preempt, gpu.grace) == ("1-12:00:00", "REQUEUE", 120)
    assert spot.limit is None
    signals = CONFIG.replace("enable_configless", "preempt_send_user_signal")
    assert read_cluster(signals, PARTITIONS, NODES).sends_signal


def test_what_stands_in_the_way_of_coming_back_is_said() -> None:
    found = read_cluster(CONFIG, PARTITIONS, NODES)
    cpu, gpu, spot = found.partitions
    assert warnings(found, cpu) == warnings(found, gpu) == []
    canceled, short = warnings(found, spot)
    assert "PreemptMode=CANCEL" in canceled and "GraceTime=10 s" in short
    never = read_cluster(CONFIG.replace("JobRequeue              = 1", "JobRequeue = 0"), "", "")
    assert "JobRequeue=0" in warnings(never, gpu)[0]


def test_the_file_is_one_that_launch_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = read_cluster(CONFIG, PARTITIONS, NODES)
    monkeypatch.setattr(discover, "discover", lambda: cluster)
    assert init(tmp_path, "a")["partition"] == "gpu"  # the default has no GPUs
    settings, _ = cluster_of(["cluster=a", f"--config-dir={tmp_path}"])
    assert (settings.tasks, settings.cpus_per_task, settings.partition) == (4, 24, "gpu")
    assert (settings.time, settings.memory, settings.hours) == ("1-12:00:00", "979450M", 36.0)
    assert init(tmp_path, "b", "cpu")["partition"] == "cpu"
    settings, _ = cluster_of(["cluster=b", f"--config-dir={tmp_path}"])
    assert (settings.tasks, settings.gpus_per_node, settings.cpus_per_task) == (1, 0, 32)
    assert "* gpu: 2 nodes of 4 a100, 96 CPUs" in capsys.readouterr().out
    from data_prep.errors import InputError

    with pytest.raises(InputError, match="exists; choose another name="):
        init(tmp_path, "a")
    with pytest.raises(InputError, match="no such partition; did you mean gpu"):
        init(tmp_path, "c", "gpus")
