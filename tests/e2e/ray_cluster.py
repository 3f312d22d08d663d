"""A Ray cluster of two nodes on this machine, on which vLLM's CPU platform runs Ray.

vLLM's CPU platform names no Ray resource, so vLLM refuses Ray on CPUs. Here a platform plugin, for
these tests alone, names "GPU", and each node has one such resource, which is a number and no device.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ray._common.utils import get_ray_address_file
from ray.cluster_utils import Cluster

from tests.e2e.needle import SERVER_ENV

ADDRESSES = ("127.0.0.2", "127.0.0.3")
STORE_BYTES = 100 * 1024 * 1024
SHIM = "duo_test_ray_platform"
# Ray gives its processes 30 seconds to start, too few on a machine that is busy.
PATIENCE = {"RAY_raylet_start_wait_time_s": "180", "RAY_agent_register_timeout_ms": "180000"}


def write_platform(folder: Path) -> Path:
    """A distribution that vLLM finds on ``PYTHONPATH``: the CPU platform, with a Ray resource."""
    info = folder / f"{SHIM}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {SHIM}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[vllm.platform_plugins]\n{SHIM} = {SHIM}:qualified_name\n"
    )
    (folder / f"{SHIM}.py").write_text(
        f'def qualified_name():\n    return "{SHIM}_class.RayCpuPlatform"\n'
    )
    (folder / f"{SHIM}_class.py").write_text(
        "from vllm.platforms.cpu import CpuPlatform\n\n\n"
        'class RayCpuPlatform(CpuPlatform):\n    ray_device_key = "GPU"\n'
    )
    return folder


def write_absence(folder: Path) -> Path:
    """A folder that, on ``PYTHONPATH``, makes Python find no vllm_duo."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(
        "import sys\n\n\n"
        "class Absent:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'vllm_duo':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n\n\n"
        "sys.meta_path.insert(0, Absent)\n"
    )
    return folder


def server_env(platform: Path, address: str = ADDRESSES[0]) -> dict[str, str]:
    """Environment of a server, or of a node, at one of the addresses."""
    return {
        **SERVER_ENV,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(platform),
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_HOST_IP": address,
    }


@contextmanager
def two_nodes(platform: Path, second: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Start two nodes, and stop them whatever happens; ports are free ones.

    Args:
        platform: folder of ``write_platform``.
        second: environment of the second node, on top of the first's.
    """
    folder = tempfile.mkdtemp(prefix="duo")  # sockets lie in it: a short name
    # Ray notes a cluster's address in its usual folder, and only makes the cluster's own one.
    Path(get_ray_address_file(None)).parent.mkdir(exist_ok=True)
    cluster = Cluster()
    try:
        for place, address in enumerate(ADDRESSES):
            extra = dict(second or {}) if place else {}
            cluster.add_node(
                node_ip_address=address,
                num_cpus=1,
                num_gpus=1,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                dashboard_agent_listen_port=None,
                env_vars=server_env(platform, address) | PATIENCE | extra,
                **({} if place else {"temp_dir": folder}),
            )
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
