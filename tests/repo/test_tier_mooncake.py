from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mooncake.store", reason="needs the package mooncake-transfer-engine", exc_type=ImportError)

from kvist.repo.tier import PageTier, open_tier
from kvist.repo.tier.base import Clock
from kvist.repo.tier.mooncake import MooncakeTier
from kvist.testing.page_tier import PageTierTests, name_of, page, read
from kvist.testing.processes import free_port
from kvist.testing.tier_servers import mooncake_master


@pytest.fixture(scope="module")
def master() -> Iterator[str]:
    """A master, and a member that lends memory."""
    with mooncake_master() as port:
        lender = MooncakeTier(f"127.0.0.1:{port}", segment=256 << 20)
        lender.write([(name_of(b"x"), b"x")])
        assert lender.stats().errors == 0
        yield f"127.0.0.1:{port}"
        lender.close()


class TestMooncakeTier(PageTierTests):
    @pytest.fixture(autouse=True)
    def _at(self, master: str) -> None:
        self.master = master

    def make_tier(self, tmp_path: Path) -> PageTier:
        return MooncakeTier(self.master)

    def make_down(self, tmp_path: Path, clock: Clock) -> PageTier:
        return MooncakeTier(f"127.0.0.1:{free_port()}", clock=clock)


def test_a_page_larger_than_a_slab_is_not_kept(master: str) -> None:
    with open_tier(f"mooncake://{master}?buffer=64MiB") as tier:
        large, small = page((16 << 20) + 1), page(100)
        tier.write([(name_of(large), large), (name_of(small), small)])
        assert read(tier, [name_of(large), name_of(small)], [len(large), 100]) == [None, small]
        assert tier.stats().errors == 0
