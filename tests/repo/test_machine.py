import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from kvist.store import LocalStore, Store, open_store
from kvist.testing.objects import ObjectServer
from kvist.testing.repo import RepositoryMachine


class LocalMachine(RepositoryMachine):
    def make_store(self) -> Store:
        self.directory = tempfile.TemporaryDirectory()
        return LocalStore(Path(self.directory.name), durable=False)

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


def run(machine: type[RepositoryMachine], examples: int, steps: int) -> None:
    checks = [*HealthCheck]
    chosen = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(machine, settings=chosen)


def test_agrees_with_the_model_in_memory() -> None:
    run(RepositoryMachine, 30, 50)


def test_agrees_with_the_model_on_disk() -> None:
    run(LocalMachine, 5, 40)


@pytest.mark.parametrize("server", ["moto", "seaweed"])
def test_agrees_with_the_model_in_a_bucket(request: pytest.FixtureRequest, server: str) -> None:
    bucket: ObjectServer = request.getfixturevalue(server)

    class BucketMachine(RepositoryMachine):
        def make_store(self) -> Store:
            return open_store(bucket.new_url())

    run(BucketMachine, 2, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_agrees_with_the_model_for_long() -> None:
    run(RepositoryMachine, 200, 200)
