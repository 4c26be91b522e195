"""``python -m fastattn`` shows what was built, what runs here, and why."""

from fastattn.introspect import show_config

show_config()
