"""One of several processes that use a directory tier at once: ``python -m repo.tier_process ROOT BOUND SEED``."""

import logging
import random
import sys
from pathlib import Path

from kvist.repo.tier.directory import DirectoryTier
from kvist.testing.page_tier import name_of, page, read


def main(root: str, bound: str, seed: str) -> None:
    chance = random.Random(seed)
    logging.disable()
    pages = [page(chance.choice([100, 3000, 20_000]), i % 40 if i < 40 else f"{seed}/{i}") for i in range(120)]
    tier = DirectoryTier(Path(root), max_bytes=int(bound))
    print("ready", flush=True)
    while True:
        some = chance.sample(pages, 10)
        match chance.randrange(8):
            case 0:
                tier.forget([name_of(data) for data in some])
            case 1 | 2 | 3:
                for data, got in zip(
                    some, read(tier, [name_of(data) for data in some], [len(data) for data in some]), strict=True
                ):
                    assert got in (None, data)
            case _:
                tier.write([(name_of(data), data) for data in some])
        assert tier.stats().errors == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
