"""What pytest reads first: little, where this process only hands tests out to others; they read `common_fixtures`."""

from __future__ import annotations

import gc

import pytest

pytest.register_assert_rewrite("brute_force", "contracts", "five_sigma")


gc.disable()  # until all is imported


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("common_fixtures")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the pretrained model is marked, before marked tests are left out."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("pretrained")


def pytest_collection_finish() -> None:
    """What imports and collection left will stay: no garbage collection needs to look through it."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 10, 10)  # tests make few cycles
