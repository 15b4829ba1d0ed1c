"""What the tests of the command line share."""

import subprocess
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors


def byte_tokenizer() -> Tokenizer:
    """One token a byte, with OPT's special tokens in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return tokenizer


def run_process(*args, **kwargs) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-m", "flashjax.cli", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **kwargs
    )


def assert_error(result, *parts, code: int = 1) -> None:
    """A command failed with one line on stderr; 2 is that of wrong usage."""
    assert result.code == code, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("flashjax: error: ")
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in result.out + result.err
