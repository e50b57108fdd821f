"""Which errors may pass by themselves, told from the error and all that led to it."""

import ssl

import httpx
import pytest
import requests
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from stages.core.errors import Refusal
from stages.job.transient import passing


def answer(status):
    """What the hub's client raises for an answer."""
    response = requests.Response()
    response.status_code = status
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"{status} from the hub")
    error.response = response
    return error


def refused(cause, text="cannot download a/b at c from the hub: so it is", hide=False):
    """A refusal raised as the sources do."""
    try:
        try:
            raise cause
        except type(cause) as error:
            raise Refusal(text) from (None if hide else error)
    except Refusal as refusal:
        return refusal


def not_found(cause):
    """What the hub's client raises when nothing answers and nothing is cached."""
    error = LocalEntryNotFoundError("not in the cache")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("status", [408, 429, 500, 503, 504])
def test_a_server_that_asks_to_come_again(status):
    assert passing(refused(answer(status))) == "network"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_server_that_says_no(status):
    assert passing(refused(answer(status))) is None


@pytest.mark.parametrize(
    "error",
    [
        httpx.ReadTimeout("slow"),
        httpx.ConnectError("nobody there"),
        httpx.RemoteProtocolError("cut off"),
        requests.exceptions.ConnectionError("nobody there"),
        requests.exceptions.ChunkedEncodingError("cut off"),
        requests.exceptions.ReadTimeout("slow"),
        TimeoutError("slow"),
        ConnectionResetError("cut off"),
    ],
)
def test_a_network_that_is_away(error):
    assert passing(error) == passing(refused(error)) == passing(refused(not_found(error))) == "network"


def test_a_network_that_only_the_user_can_mend():
    certificate = httpx.ConnectError("certificate verify failed")
    certificate.__cause__ = ssl.SSLCertVerificationError("self-signed")
    assert passing(refused(certificate)) is None
    assert passing(refused(not_found(OfflineModeIsEnabled("offline")))) is None
    assert passing(httpx.UnsupportedProtocol("ftp")) is None


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("ERROR: HTTP error 503 while getting https://x/y.whl", "network"),
        (
            "pip._vendor.urllib3.exceptions.ReadTimeoutError: Pool(): Read timed out.",
            "network",
        ),
        ("pip._vendor.urllib3.exceptions.ProtocolError: ('Connection broken: IncompleteRead')", "network"),
        ("ERROR: HTTP error 404 while getting https://x/y.whl", None),
        ("ERROR: No matching distribution found for y==1", None),
    ],
)
def test_pip_is_judged_by_its_words(reason, cause):
    assert passing(Refusal(f"pip cannot download a wheel of y==1: {reason}")) == cause
    assert passing(Refusal(reason)) is None


def test_memory_that_ran_out():
    card = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert passing(card) == passing(refused(card, "there is not enough memory")) == "card"
    assert passing(RuntimeError("CUDA error: out of memory")) == "card"
    assert passing(MemoryError()) == "memory"
    assert passing(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")) == "memory"


@pytest.mark.parametrize(
    "error",
    [
        Refusal("so it is."),
        ValueError("a bug"),
        OSError(28, "No space left on device"),
        FileNotFoundError("x"),
        SystemExit(143),
        KeyboardInterrupt(),
        refused(TimeoutError("slow"), "set another value", hide=True),
    ],
)
def test_what_stays(error):
    assert passing(error) is None
