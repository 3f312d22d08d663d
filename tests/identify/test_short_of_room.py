"""``vllm-duo identify`` on a disk that is full and in memory that is too small, for real."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.identify import tiny
from tests.identify.short_of_room import LONGEST, Attempt, own_group
from vllm_duo.identify.available import available_cpu_bytes
from vllm_duo.identify.checkpoint import CHECKPOINT_NAME
from vllm_duo.identify.registry import FORWARD_METHODS

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
    try:
        with own_group():
            return True
    except OSError:
        return False


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


class TestMemory:
    def refused_with_what_fits(self, large: Attempt, small: Attempt) -> None:
        assert large.code == BAD_INPUT
        told = re.search(
            r"a step of 200 x 1000 tokens needs about (\S+) GiB beside the weights, cpu has (\d+) "
            r"MiB left: use --max-length (\d+) or less, or a smaller --batch-size",
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
                r"use --max-length \1 and start again",
                failed.told,
            )
            assert told, failed.told
            assert 64 <= int(told[1]) <= LONGEST // 2
            assert failed.files == []
            assert again.code == 0, again.told
            assert TABLE in again.files

    def test_a_failed_allocation_in_the_self_check_keeps_the_run(self, attempts):
        failed, again = attempts["self-check"]
        assert failed.code == BAD_INPUT
        assert (
            f"out of memory in the self-check, with samples of {LONGEST} tokens; the run's checkpoint "
            "is kept: run the same command with --resume and a shorter --check-length, or with "
            "--check-samples 0"
        ) in failed.told
        assert failed.files == [CHECKPOINT_NAME]
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
    def test_what_control_groups_leave(self, tmp_path, groups, expected):
        proc, root = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:   900 kB\n")
        (proc / "self" / "status").write_text("VmSize:\t 100 kB\nVmData:\t 50 kB\n")
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

    def test_weights_that_do_not_fit_are_not_loaded(self, model_folder, monkeypatch):
        from vllm_duo.identify import memory, model

        stored = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
        monkeypatch.setattr(memory, "available_cpu_bytes", lambda: stored // 2 - 1000)
        for dtype in (None, "bfloat16"):  # half as large, and still too large
            with pytest.raises(
                MemoryError, match=r"its weights need about .* are left: use a mach"
            ):
                model.load_model(str(model_folder), device="cpu", dtype=dtype)
