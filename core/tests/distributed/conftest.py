import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """The pool of a size: started at its first use, and again after a job that failed."""
    from pool import Pool

    made = {}

    def get(size):
        if size not in made or not made[size].is_open:
            made[size] = Pool(size, tmp_path_factory.mktemp("pool"))
        return made[size]

    yield get
    for pool in made.values():
        pool.close(kill=True)
