"""Settings of all tests: none has a time limit, and so no example of a property has one."""

from hypothesis import settings

settings.register_profile("kvist", deadline=None)
settings.load_profile("kvist")
