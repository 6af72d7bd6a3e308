"""The order of the tests."""


def pytest_collection_modifyitems(items) -> None:
    """Files with slow tests first, the longest of which are in workflow/, so that two workers end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: str(item.path), reverse=True)
    items.sort(key=lambda item: item.path not in slow)
