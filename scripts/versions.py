"""One saved adapter under several versions of transformers and PEFT: are its answers the same, bit for bit?

    python scripts/versions.py                                           # VERSIONS below; or: make test-across
    python scripts/versions.py "transformers==5.21.0" "peft==0.20.0"     # others, each installed for its own run alone
    python scripts/versions.py --python /some/environment/bin/python     # what another environment has

This interpreter makes and saves tiny random models, with one random adapter for each. Then it and each of the others load them,
and compute what depends on how transformers calls a model: one forward of a padded batch, and the logits of `generate`, which
come token by token out of a cache. Where the models without an adapter already differ, the arithmetic of transformers does, and
nothing can be said about the adapter (5.20's "sdpa" multiplies a single query otherwise than 5.23's); where they agree, the
edited models have to. The exit code is 1 if they do not, or if nothing could be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VERSIONS = [
    "transformers==5.20.0 peft==0.20.0 accelerate==1.4.0",
    "transformers==5.23.0",
    "peft==0.20.0",
]
ARCHITECTURES = ["llama", "gpt2", "gemma3"]
NEW_TOKENS = 6
PACKAGES = ["transformers", "peft", "accelerate", "torch"]
ATTENTION = ["eager", "sdpa"]

# {"versions": {package: version}, "digests": {"eager": {"llama, forward": {"base": sha256, "edited": sha256}}}}
Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions",
        nargs="*",
        help="requirements in one argument: 'transformers==5.20.0 peft==0.20.0'",
    )
    parser.add_argument(
        "--python", action="append", default=[], help="another interpreter; may be repeated"
    )
    parser.add_argument("--worker", choices=["save", "compute"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "save":
        save(Path(arguments.folder))
        return 0
    if arguments.worker == "compute":
        print(json.dumps(compute(Path(arguments.folder))))
        return 0

    versions = arguments.versions
    if not versions and not arguments.python:
        versions = VERSIONS
    with tempfile.TemporaryDirectory() as folder:
        work(sys.executable, "save", folder)
        results = [json.loads(work(sys.executable, "compute", folder))]
        for number, requirements in enumerate(versions):
            overlay = str(Path(folder, f"overlay-{number}"))
            install(requirements.split(), overlay)
            results.append(json.loads(work(sys.executable, "compute", folder, overlay)))
        for python in arguments.python:
            results.append(json.loads(work(python, "compute", folder)))
    return report(results)


def install(requirements: list[str], overlay: str) -> None:
    """Install packages without their dependencies into a folder, which then stands before the environment's own."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--target",
        overlay,
    ]
    subprocess.run([*pip, *requirements], check=True)


def work(python: str, what: str, folder: str, overlay: str | None = None) -> str:
    """Run this file's worker under another interpreter, and return what it prints."""
    paths = [overlay, str(ROOT / "src"), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # as many threads everywhere: sums keep their order
    command = [python, __file__, "--worker", what, "--folder", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(
            f"The worker failed: {' '.join(command)} (with PYTHONPATH={environment['PYTHONPATH']})"
        )
    return done.stdout


def save(folder: Path) -> None:
    """Save each tiny model, and an adapter for it that visibly edits."""
    from peft import get_peft_model

    from conftest import make_model, randomise
    from peft_baft import BaftConfig

    for architecture in ARCHITECTURES:
        model = make_model(architecture)
        model.save_pretrained(folder / architecture)
        edited = get_peft_model(model, BaftConfig(task_type="CAUSAL_LM", r=4, gate_offset=0.0))
        randomise(edited)
        edited.save_pretrained(str(folder / f"{architecture}-adapter"))


def compute(folder: Path) -> Result:
    """Load each model, without and with its adapter, and digest what it computes."""
    from importlib.metadata import version

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import peft_baft  # noqa: F401  (makes PEFT know the type BAFT)

    digests: dict[str, dict[str, dict[str, str]]] = {attention: {} for attention in ATTENTION}
    for attention, architecture in product(ATTENTION, ARCHITECTURES):
        base = AutoModelForCausalLM.from_pretrained(
            folder / architecture, attn_implementation=attention
        ).eval()
        of_base = digests_of(base)
        of_edited = digests_of(
            PeftModel.from_pretrained(base, str(folder / f"{architecture}-adapter")).eval()
        )
        for quantity in of_base:
            both = {"base": of_base[quantity], "edited": of_edited[quantity]}
            digests[attention][f"{architecture}, {quantity}"] = both
    return {"versions": {package: version(package) for package in PACKAGES}, "digests": digests}


def digests_of(model: Any) -> dict[str, str]:
    """Return the sha256 of a model's logits of a padded batch, and of the tokens and logits that it generates."""
    import torch

    tokens = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0  # on the left, as `generate` wants it
    mask[2, :1] = 0
    inputs = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with torch.no_grad():
        logits = model(**inputs).logits
        generated = model.generate(
            **inputs, **settings, output_logits=True, return_dict_in_generate=True
        )
    return {
        "forward": sha256([logits[mask == 1]]),
        "generate": sha256([generated.sequences, *generated.logits]),
    }


def sha256(tensors: list[Any]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def verdict(first: dict[str, str], other: dict[str, str]) -> str:
    """Say how one quantity of two versions compares; both give the digests of "base" and "edited"."""
    if first["edited"] == other["edited"]:
        return "same"
    return "DIFFERS" if first["base"] == other["base"] else "base differs"


def report(results: list[Result]) -> int:
    """Print a Markdown table against the first result; return 1 if an adapter's answers changed or were never compared."""
    first = results[0]["digests"]
    quantities = list(first[ATTENTION[0]])
    for attention, name in product(ATTENTION, quantities):
        digests = first[attention][name]
        assert digests["base"] != digests["edited"], (
            f"The adapter changes nothing in {name}: nothing to compare."
        )
    columns = [*PACKAGES, "attention", *quantities]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    verdicts = []
    for result, attention in product(results[1:], ATTENTION):
        row = [
            verdict(first[attention][name], result["digests"][attention][name])
            for name in quantities
        ]
        print("| " + " | ".join([*result["versions"].values(), attention, *row]) + " |")
        verdicts += row
    counts = Counter(verdicts)
    reference = ", ".join(
        f"{package} {version}" for package, version in results[0]["versions"].items()
    )
    print(
        f"\nBeside {reference}: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        + "."
    )
    return int(counts["DIFFERS"] > 0 or counts["same"] == 0)


if __name__ == "__main__":
    sys.exit(main())
