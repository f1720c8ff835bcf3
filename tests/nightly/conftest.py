"""Ray's switches must be set before ray is imported, so also before any test module is."""

from serving.driver.environment import prepare_environment

prepare_environment()
