"""Models built on FlashJAX. Imported as ``flashjax.models``."""
