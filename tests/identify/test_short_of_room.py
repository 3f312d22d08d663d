"""``vllm-duo identify`` on a disk that is full and in memory that is too small, for real."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.identify import tiny
from tests.identify.conftest import tiny_settings
from tests.identify.control_group import own_group
from tests.identify.short_of_room import LONGEST, Attempt
from vllm_duo.identify.available import available_cpu_bytes
from vllm_duo.identify.checkpoint import CHECKPOINT_NAME
from vllm_duo.identify.registry import FORWARD_METHODS
from vllm_duo.identify.run import identify

ROOT = Path(__file__).resolve().parents[2]
TABLE = "full_attention_heads.tsv"
BAD_INPUT = 2
ENV = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # What is freed goes back at once, and no arena holds room in store.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
NAMESPACES = (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"])


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    """A command that may mount, in a namespace of its own; empty: there is none."""
    test = f"mount -t tmpfs -o size=4k tmpfs {tmp_path_factory.mktemp('mount')}"
    if shutil.which("unshare"):
        for command in NAMESPACES:
            if subprocess.run([*command, "sh", "-c", test], capture_output=True).returncode == 0:
                return command
    return []


@pytest.fixture(scope="module")
def attempts(tmp_path_factory, mounts):
    """What ``short_of_room.py`` saw, by kind: one process, since its imports take longest."""
    folder = tmp_path_factory.mktemp("room")
    tiny.save(tiny.random_llama(), folder / "models" / "short")
    wide = tiny.random_llama(max_position_embeddings=LONGEST, intermediate_size=1024)
    tiny.save(wide, folder / "models" / "long")
    kinds = ["allocation", "self-check", "address-space", "file-size"]
    kinds += ["full-disk"] if mounts else []
    kinds += ["control-group"] if may_have_a_group() else []
    done = subprocess.run(
        [*mounts, sys.executable, "-m", "tests.identify.short_of_room", str(folder), *kinds],
        cwd=ROOT,
        env=os.environ | ENV,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        kind: [Attempt(**one) for one in json.loads((folder / f"{kind}.json").read_text())]
        for kind in kinds
    }


def may_have_a_group() -> bool:
    """Tried by another process, which moves from group to group instead of this one."""
    probe = [sys.executable, "-m", "tests.identify.control_group"]
    return subprocess.run(probe, cwd=ROOT, capture_output=True).returncode == 0


class TestFullDisk:
    def test_what_was_saved_is_kept_and_gone_on_with(self, attempts):
        if "full-disk" not in attempts:
            pytest.skip("this process may mount no tmpfs, neither as root nor in a user namespace")
        whole, *found = attempts["full-disk"]
        assert whole.code == 0
        kept = (
            "no checkpoint was written before this one",
            "the checkpoint before this one is kept",
            "the run's checkpoint is kept",
        )
        left = ([], [CHECKPOINT_NAME], [CHECKPOINT_NAME])
        for words, files, failed, resumed in zip(kept, left, found[::2], found[1::2], strict=True):
            assert failed.code == BAD_INPUT
            told = re.search(
                r"the disk of (\S+) is full, .*: (\d+) bytes are needed in \1, (\d+) are free; "
                rf"{words}: make room and run the same command with --resume",
                failed.told,
            )
            assert told, failed.told
            assert int(told[2]) > int(told[3])
            # What was written of the results before the disk was full is no pattern: the table is last.
            assert [name for name in failed.files if not name.endswith((".png", ".md"))] == files
            assert (resumed.code, resumed.table) == (0, whole.table), resumed.told
            assert resumed.files == whole.files

    def test_limit_of_a_files_size(self, attempts):
        whole, *found = attempts["file-size"]
        kept = ("no checkpoint was written before this one", "the run's checkpoint is kept")
        for words, failed, resumed in zip(kept, found[::2], found[1::2], strict=True):
            assert failed.code == BAD_INPUT
            assert re.search(
                r"a file of this process may have \d+ bytes .ulimit -f.: \d+ bytes are needed in "
                rf"\S+, \d+ are free; {words}: raise the limit",
                failed.told,
            ), failed.told
            assert TABLE not in failed.files
            assert (resumed.code, resumed.table) == (0, whole.table), resumed.told
            assert resumed.files == whole.files


@pytest.fixture
def kernel(tmp_path):
    """What /proc and /sys/fs/cgroup may show: 900 kB are left, 100 in use, and no group limits them."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:   900 kB\n")
    (proc / "self" / "status").write_text("VmSize:\t 100 kB\nVmData:\t 50 kB\n")
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    return proc, root


class TestControlGroup:
    """The tests' own: a folder stands in for the kernel, which adds files to a group that is made."""

    @pytest.fixture
    def groups(self, tmp_path):
        above = tmp_path / "a"
        above.mkdir()
        (above / "memory.current").write_text("5\n")
        (above / "cgroup.procs").write_text("")
        (tmp_path / "of_process").write_text("1:cpu:/x\n0::/a\n")
        return above

    def test_without_a_limit_it_is_refused_and_removed(self, groups, tmp_path):
        with (
            pytest.raises(FileNotFoundError, match=r"has no memory\.max"),
            own_group(tmp_path, tmp_path / "of_process"),
        ):
            pass
        assert sorted(path.name for path in groups.iterdir()) == ["cgroup.procs", "memory.current"]

    def test_a_failure_within_leaves_it(self, groups, tmp_path, monkeypatch):
        made = Path.mkdir

        def make(folder):
            made(folder)
            for name in ("memory.max", "memory.current", "cgroup.procs"):
                (folder / name).write_text("7\n")

        def remove(folder):  # the kernel's files go with the group, once no process is in it
            assert (groups / "cgroup.procs").read_text() == str(os.getpid())
            shutil.rmtree(folder)

        monkeypatch.setattr(Path, "mkdir", make)
        monkeypatch.setattr(Path, "rmdir", remove)

        def fail():
            with own_group(tmp_path, tmp_path / "of_process") as limit:
                limit(10)
                (own,) = groups.glob("duo-*")
                assert (own / "memory.max").read_text() == "17"
                assert (own / "cgroup.procs").read_text() == str(os.getpid())
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert not list(groups.glob("duo-*"))


class TestMemory:
    def refused_with_what_fits(self, large: Attempt, small: Attempt) -> None:
        assert large.code == BAD_INPUT
        told = re.search(
            r"a step of 200 x 1000 tokens needs about (\S+) GiB beside the weights, cpu has (\d+) "
            r"MiB left: use --max-length (\d+) or less and --min-length at most \3, or a smaller "
            r"--batch-size",
            large.told,
        )
        assert told, large.told
        needs, left, fits = float(told[1]) * 1024, int(told[2]), int(told[3])
        assert 0 < left < 900  # the limits leave 800 and 400, and loading may free some
        assert fits == pytest.approx(1000 * left / needs, rel=0.1)  # of figures that are rounded
        assert large.files == []
        assert small.code == 0, small.told
        assert TABLE in small.files

    def test_limit_of_the_address_space_is_estimated_before_the_run(self, attempts):
        self.refused_with_what_fits(*attempts["address-space"])

    def test_limit_of_a_control_group_is_estimated_before_the_run(self, attempts):
        if "control-group" not in attempts:
            pytest.skip("this process may make no control group with a limit")
        self.refused_with_what_fits(*attempts["control-group"])

    def test_a_failed_allocation_names_a_length_that_fits(self, attempts):
        found = attempts["allocation"]
        assert len(found) == 2 * (1 + len(FORWARD_METHODS))
        for failed, again in zip(found[::2], found[1::2], strict=True):
            assert failed.code == BAD_INPUT
            told = re.search(
                rf"out of memory with samples of up to {LONGEST} tokens; (\d+) was tried and fits: "
                r"use --max-length \1 and --min-length at most \1 and start again",
                failed.told,
            )
            assert told, failed.told
            assert int(told[1]) <= LONGEST // 2
            assert failed.files == []
            assert again.code == 0, again.told
            assert TABLE in again.files

    def test_a_failed_allocation_in_the_self_check_keeps_the_run(self, attempts):
        failed, again, *exclusive = attempts["self-check"]
        told = f"Error: out of memory in the self-check, with samples of {LONGEST} tokens; "
        remedy = "a shorter --check-length, or with --check-samples 0"
        kept = f"the run's checkpoint is kept: run the same command with --resume and {remedy}"
        assert failed.code == BAD_INPUT
        assert told + kept in failed.told
        assert failed.files == [CHECKPOINT_NAME]
        assert again.code == 0, again.told
        assert TABLE in again.files
        failed, again = exclusive  # it saves nothing on its way
        assert failed.code == BAD_INPUT
        assert f"{told}no result is there yet: run the same command with {remedy}" in failed.told
        assert failed.files == []
        assert again.code == 0, again.told
        assert TABLE in again.files

    @pytest.mark.parametrize(
        ("groups", "expected"),
        [
            ({}, 900 << 10),
            # Version 2: the group's own limit, one above it, and none.
            ({"a/b": ("max", 400_000, 300_000, 50_000)}, 150_000),
            ({"a/b": ("max", "max", 300_000, 0), "a": ("max", 500_000, 450_000, 1000)}, 51_000),
            ({"a/b": ("max", "max", 300_000, 0)}, 900 << 10),
            # A container: its own group is the root of what it sees.
            ({"": ("max", 400_000, 300_000, 50_000)}, 150_000),
            # Version 1, whose "no limit" is a number.
            ({"memory/a/b": ("limit_in_bytes", 400_000, 390_000, 0)}, 10_000),
            ({"memory/a/b": ("limit_in_bytes", (1 << 63) - 4096, 390_000, 0)}, 900 << 10),
            # More than the limit is in use: what is left is nothing, not less.
            ({"a/b": ("max", 400_000, 500_000, 0)}, 0),
        ],
    )
    def test_what_control_groups_leave(self, kernel, groups, expected):
        proc, root = kernel
        first = any(kind == "limit_in_bytes" for kind, *_ in groups.values())
        line = "4:memory:/a/b" if first else "0::/a/b"
        (proc / "self" / "cgroup").write_text(f"1:name=systemd:/\n{line}\n")
        for path, (kind, limit, used, cached) in groups.items():
            folder = root / path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"memory.{kind}").write_text(f"{limit}\n")
            name = "memory.usage_in_bytes" if first else "memory.current"
            (folder / name).write_text(f"{used}\n")
            field = "total_inactive_file" if first else "inactive_file"
            (folder / "memory.stat").write_text(f"anon 5\n{field} {cached}\n")
        assert available_cpu_bytes(proc, root) == expected

    @pytest.mark.parametrize(
        ("kind", "limit", "expected"),
        [
            (resource.RLIMIT_AS, 300 << 10, 200 << 10),
            (resource.RLIMIT_DATA, 130 << 10, 80 << 10),
            (resource.RLIMIT_DATA, 30 << 10, 0),
        ],
    )
    def test_what_ulimit_leaves(self, kernel, monkeypatch, kind, limit, expected):
        proc, root = kernel
        none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        monkeypatch.setattr(
            resource, "getrlimit", lambda asked: (limit, limit) if asked == kind else none
        )
        assert available_cpu_bytes(proc, root) == expected
        (proc / "self" / "status").unlink()  # what is in use is not known, nor what is left
        assert available_cpu_bytes(proc, root) == 900 << 10

    def test_files_that_are_missing_or_odd_limit_nothing(self, kernel):
        proc, root = kernel
        group = root / "a" / "b"
        group.mkdir(parents=True)
        (group / "memory.max").write_text("400000\n")
        (group / "memory.stat").write_text("inactive_file 0\n")
        for used in (None, "", "many\n"):
            if used is not None:
                (group / "memory.current").write_text(used)
            assert available_cpu_bytes(proc, root) == 900 << 10
        (proc / "self" / "cgroup").write_text("of another kernel\n")
        assert available_cpu_bytes(proc, root) == 900 << 10
        (proc / "self" / "cgroup").unlink()
        assert available_cpu_bytes(proc, root) == 900 << 10
        (proc / "meminfo").write_text("MemTotal:  2000 kB\n")
        assert available_cpu_bytes(proc, root) is None
        assert available_cpu_bytes(proc / "nowhere", root / "nowhere") is None

    @pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
    def test_peak_is_told_in_bytes(self, monkeypatch, platform, unit):
        from vllm_duo.identify import memory

        used = SimpleNamespace(ru_maxrss=5000)
        monkeypatch.setattr(memory.resource, "getrusage", lambda who: used)
        monkeypatch.setattr(memory.sys, "platform", platform)
        assert memory.peak_bytes(torch.device("cpu")) == 5000 * unit

    def test_without_figures_nothing_is_refused_and_that_is_logged_once(
        self, model_folder, tmp_path, monkeypatch
    ):
        from vllm_duo.identify import memory

        told = []
        monkeypatch.setattr(memory, "available_cpu_bytes", lambda: None)
        monkeypatch.setattr(memory.logger, "warning", told.append)
        memory._log_unknown.cache_clear()
        settings = tiny_settings(method="on-the-fly", samples=1, check_samples=0)
        identify(str(model_folder), settings, tmp_path / "out")
        memory._log_unknown.cache_clear()
        assert len(told) == 1
        assert "does not tell how much memory is left" in told[0]

    def test_weights_that_do_not_fit_are_not_loaded(self, model_folder, monkeypatch):
        from vllm_duo.identify import memory, model

        stored = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
        monkeypatch.setattr(memory, "available_cpu_bytes", lambda: stored // 2 - 1000)
        for dtype in (None, "bfloat16"):  # half as large, and still too large
            with pytest.raises(
                MemoryError, match=r"its weights need about .* are left: use a mach"
            ):
                model.load_model(str(model_folder), device="cpu", dtype=dtype)

    def test_only_the_files_that_transformers_loads_count(
        self, model_folder, tmp_path, monkeypatch
    ):
        from vllm_duo.identify import memory, model

        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        single = folder / memory.WEIGHTS_NAME
        stored = single.stat().st_size
        (folder / "consolidated.safetensors").write_bytes(bytes(4 * stored))
        (folder / "adapter_model.safetensors").write_bytes(bytes(stored))
        assert memory.weight_bytes(folder) == stored
        monkeypatch.setattr(memory, "available_cpu_bytes", lambda: stored + 1000)
        assert model.load_model(str(folder), device="cpu", dtype=None).info.num_layers == 2
        shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        index = {f"weight {number}": shards[number % 2].name for number in range(5)}
        (folder / memory.INDEX_NAME).write_text(json.dumps({"weight_map": index}))
        for number, shard in enumerate(shards):
            shard.write_bytes(bytes(100 + number))
        assert memory.weight_bytes(folder) == stored  # one file goes before shards
        single.unlink()
        assert memory.weight_bytes(folder) == 201
        (folder / memory.INDEX_NAME).write_text("[]")
        assert memory.weight_bytes(folder) == 0
