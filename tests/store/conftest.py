import pytest

pytest.register_assert_rewrite("kvist.testing.store", "kvist.testing.store_machine", "kvist.testing.store_races")
