import pytest

pytest.register_assert_rewrite("kvist.testing.policy")
