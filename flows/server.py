"""Prefect's server: the one that is configured, if it answers, or a temporary one for this run.

Prefect runs no flow without a server. The temporary one runs under a guard (`flows.guard`) in a session of
its own. So a signal to the run's process group, such as a terminal's ctrl-C, does not reach it: it still
answers while the flow reports how it ended. And it ends with the flow, even after `kill -9`. If it dies
first, the run ends within seconds instead of waiting for it.
"""

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from flows import guard
from flows.process import GUARD
from flows.workspace import DVC_TMP
from stages.core.errors import Refusal

WITHOUT = "or use `dvc repro`, which needs no server"
_PATIENCE = 5.0
"""Seconds that a configured server may take to answer."""
_TAKEN = 3
"""The exit code of a server when its port is in use; Prefect retries on another."""


def configure() -> None:
    """Set what Prefect reads from the environment when it is imported, unless the user has set it.

    Its database goes into the project; its profiles, which may name a server, stay where they are.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # It creates a database first.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    if "PREFECT_HOME" not in os.environ and Path(".dvc").is_dir():
        os.environ["PREFECT_HOME"] = str((DVC_TMP / "prefect").resolve())
        profiles = Path("~/.prefect/profiles.toml").expanduser()
        if profiles.is_file():
            os.environ.setdefault("PREFECT_PROFILES_PATH", str(profiles))


def start(at_loss: Callable[[], None]) -> None:
    """Ensure a server for the life of this process: the configured one if it answers, or a temporary one.

    Prefect stops it at the exit of the process, after the last logs have been sent.

    Args:
        at_loss: called in another thread if the temporary server dies before that.

    Raises:
        Refusal: the configured server does not answer, or none can be started.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    if url := PREFECT_API_URL.value():
        if reason := why_silent():
            raise Refusal(
                f"the Prefect server {url} does not serve this run ({reason}); mend that, unset "
                f"PREFECT_API_URL, {WITHOUT}."
            )
        return
    home = Path(PREFECT_HOME.value())
    try:
        home.mkdir(parents=True, exist_ok=True)
        _start(at_loss)
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise Refusal(
            f"Prefect's temporary server cannot start in {home} ({reason}); set PREFECT_HOME to a folder "
            f"that is writable, {WITHOUT}."
        ) from None


def why_silent() -> str:
    """Ask the configured server something as Prefect's client does; return why that failed, or nothing."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(httpx_settings={"timeout": _PATIENCE}, sync_client=True) as client:
            client.hello()
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (401, 403):
            return (
                f"it answers {error.response.status_code}; set PREFECT_API_AUTH_STRING to its user:password"
            )
        return f"it answers {error.response.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


def _start(at_loss: Callable[[], None]) -> None:
    from prefect.server.api.server import SubprocessASGIServer

    stopping = threading.Event()

    class Guarded(SubprocessASGIServer):
        """The temporary server that Prefect's client finds, under a guard."""

        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            popen = subprocess.Popen

            def begin(args: list[str], **options: Any) -> subprocess.Popen[Any]:
                return popen(
                    [*GUARD, guard.BOUND, *args], stdin=subprocess.PIPE, start_new_session=True, **options
                )

            with mock.patch.object(subprocess, "Popen", begin):
                process = super()._run_uvicorn_command()
            threading.Thread(target=watch, args=(process,), daemon=True).start()
            return process

        def stop(self) -> None:
            stopping.set()
            if self.server_process and self.server_process.stdin:
                self.server_process.stdin.close()
                self.server_process.wait(2 * guard.GRACE)
            super().stop()

    def watch(process: subprocess.Popen[Any]) -> None:
        """Call `at_loss` when the server dies, even during its start, which Prefect would wait out."""
        if process.wait() != _TAKEN and not stopping.is_set():
            at_loss()

    Guarded().start()
