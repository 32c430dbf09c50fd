"""What holds for all tests: Hypothesis judges no speed, since a busy machine draws and runs slowly."""

from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
