"""Podman with an image store of the tests' own."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.skips import NO_BASE_IMAGE, NO_CONTAINERS, NO_PODMAN

ROOT: Final = Path(__file__).parents[2]
PYTHON_IMAGE: Final = os.environ.get("PYTHON_IMAGE", "docker.io/library/python:3.11-slim-bookworm")
COMPOSE: Final = (
    str(Path(sys.executable).with_name("podman-compose")),
    "-f",
    str(ROOT / "deploy/compose/compose.yaml"),
)


class Podman:
    """Runs podman and what calls it. Images are kept in ``.cache/containers`` between runs."""

    def __init__(self) -> None:
        if shutil.which("podman") is None:
            pytest.skip(NO_PODMAN)
        self._store = ROOT / ".cache/containers"
        self._store.mkdir(parents=True, exist_ok=True)
        self._environment = {**os.environ, "CONTAINER_ENGINE": "podman"}
        self._limit_to_what_is_allowed()
        # Without overlay every step of a build copies the whole image.
        self._keep_images_with("overlay")
        if self.run("podman", "info", check=False).returncode:
            self._keep_images_with("vfs")

    def run(
        self, *arguments: str, timeout_s: float = 120.0, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end."""
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env={**self._environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done

    def have_image(self, image: str, *packages: str) -> None:
        """Gets a base image; skips where there is no way to."""
        done = self.run("scripts/base-image.sh", image, *packages, timeout_s=900, check=False)
        if done.returncode == 3:
            print(done.stdout, done.stderr)
            pytest.skip(NO_BASE_IMAGE)
        assert done.returncode == 0, done.stderr

    def skip_unless_allowed(self) -> None:
        """Skips where not even the base image runs."""
        done = self.run("podman", "run", "--rm", PYTHON_IMAGE, "true", check=False)
        if done.returncode:
            print(done.stderr)
            pytest.skip(NO_CONTAINERS)

    def eventually_healthy(self, container: str, timeout_s: float = 30.0) -> None:
        """Waits until the image's own health check passes."""
        self.eventually(
            lambda: (
                self.run("podman", "healthcheck", "run", container, check=False).returncode == 0
            ),
            timeout_s,
        )

    @staticmethod
    def eventually(condition: Callable[[], bool], timeout_s: float) -> None:
        """Waits until a condition holds that a program has to be asked for."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it did not come true in time"
            time.sleep(0.1)

    def _limit_to_what_is_allowed(self) -> None:
        """Podman asks for more open files than a machine may grant."""
        limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        rows = []
        for name, number in limits.items():
            most = resource.getrlimit(number)[1]
            value = 4_096 if most == resource.RLIM_INFINITY else min(most, 4_096)
            rows.append(f'"{name}={value}:{value}"')
        file = self._store / "containers.conf"
        file.write_text(f"[containers]\ndefault_ulimits = [{', '.join(rows)}]\n")
        self._environment["CONTAINERS_CONF"] = str(file)

    def _keep_images_with(self, driver: str) -> None:
        file = self._store / f"{driver}.conf"
        images, state = self._store / driver, self._store / f"{driver}-state"
        file.write_text(
            f'[storage]\ndriver = "{driver}"\ngraphroot = "{images}"\nrunroot = "{state}"\n'
        )
        self._environment["CONTAINERS_STORAGE_CONF"] = str(file)
