"""Panics of libraries in Rust (tokenizers, safetensors)."""


def is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up; it is no Exception, and each library has its type."""
    return type(error).__name__ == "PanicException"
