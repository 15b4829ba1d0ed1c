"""What options can be chosen from."""

import enum


class Dtype(enum.StrEnum):
    """Dtypes of a model."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class CacheDtype(enum.StrEnum):
    """Dtypes of keys and values other than the model's."""

    FLOAT8 = "float8_e4m3fn"


class Implementation(enum.StrEnum):
    """Implementations of the sparse product."""

    CPU = "cpu"
    CUDA = "cuda"
    XLA = "xla"


class Method(enum.StrEnum):
    """Ways to choose the weights that become zero."""

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    SPARSEGPT = "sparsegpt"
    ALPS = "alps"


class Format(enum.StrEnum):
    """Forms of a stored model."""

    FLASHJAX = "flashjax"
    HF = "hf"
