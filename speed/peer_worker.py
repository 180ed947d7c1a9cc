"""Run by `peers.py` in one peer's environment: peer, folder, rows, learning rate, threads. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

POSITIONS, RANK, MAX_STEPS, STOP = 3, 12, 40, 0.01
# One step costs a sixth of what lies between so many: nothing that is done once an edit.
FEW_AND_MORE = (
    2,
    8,
)
PEERS_DECAY = 0.0  # their orthogonal parametrisation keeps signs in parameters: any weight decay makes it zero


def base_model(shape: dict, folder: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**shape))
    missing, unexpected = model.load_state_dict(
        load_file(folder / "weights.safetensors"), strict=False
    )
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def batch(edit: dict) -> tuple[dict, list[int]]:
    """One row with labels, and the columns that are edited."""
    ids = torch.tensor([edit["ids"]])
    labels = ids.clone()
    labels[:, : edit["prompt"]] = -100
    columns = list(range(edit["prompt"] - POSITIONS, len(edit["ids"])))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, columns


def with_pyreft(model, blocks: list[int]):
    import pyreft

    def fresh():
        intervention = {"low_rank_dimension": RANK, "component": "block_output"}
        config = pyreft.ReftConfig(
            representations=[
                intervention
                | {
                    "layer": block,
                    "intervention": pyreft.LoreftIntervention(
                        embed_dim=model.config.hidden_size,
                        low_rank_dimension=RANK,
                        dtype=torch.float32,
                    ),
                }
                for block in blocks
            ]
        )
        return pyreft.get_reft_model(model, config)

    def loss_of(reft, edit: dict):
        inputs, columns = batch(edit)
        places = {"sources->base": (None, [[columns]] * len(blocks))}
        _, output = reft(
            {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]},
            unit_locations=places,
            labels=inputs["labels"],
        )
        return output.loss

    def parameters_of(reft):
        for p in reft.model.parameters():
            p.requires_grad = False
        return [
            p
            for module in reft.interventions.values()
            for p in _module(module).parameters()
            if p.requires_grad
        ]

    return fresh, loss_of, parameters_of, lambda reft: _take_off(reft, model)


def _module(entry):
    return entry[0] if isinstance(entry, (list, tuple)) else entry


def _take_off(reft, model) -> None:
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def with_adapters(model, blocks: list[int]):
    import adapters
    from adapters import LoReftConfig

    adapters.init(model)

    def fresh():
        model.add_adapter(
            "edit",
            config=LoReftConfig(
                layers=blocks, r=RANK, prefix_positions=0, suffix_positions=POSITIONS
            ),
        )
        model.train_adapter("edit")
        model.eval()
        return model

    def loss_of(edited, edit: dict):
        inputs, columns = batch(edit)
        for module in edited.modules():
            if hasattr(module, "suffix_positions"):
                module.suffix_positions = len(columns)
        return edited(**inputs).loss

    return (
        fresh,
        loss_of,
        lambda edited: [p for p in edited.parameters() if p.requires_grad],
        lambda edited: edited.delete_adapter("edit"),
    )


def by_loop(setting, edits: list[dict], rate: float, max_steps: int, stop: float) -> dict:
    """Each edit with a fresh adapter, in the plainest loop: forward, stop test, backward, AdamW."""
    fresh, loss_of, parameters_of, take_off = setting
    found = {"steps": [], "seconds": [], "learned": []}
    for edit in edits:
        torch.manual_seed(0)
        edited = fresh()
        parameters = parameters_of(edited)
        begin = time.process_time()
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=PEERS_DECAY)
        for step in range(max_steps + 1):
            loss = loss_of(edited, edit)
            if loss.item() < stop or step == max_steps:
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found["seconds"].append(time.process_time() - begin)
        found["steps"].append(step)
        found["learned"].append(loss.item() < stop)
        take_off(edited)
    return found


def by_this_package(
    model, blocks, method, edits: list[dict], rate: float, max_steps: int, stop: float
) -> dict:
    """The same with this package's editors, given numbers of tokens for text."""
    from peft import LoraConfig, get_peft_model

    import peft_baft
    from peft_baft.tools.check.made_up_text import NumberTokenizer

    found = {"steps": [], "seconds": [], "learned": []}
    settings = peft_baft.DescentConfig(lr=rate, max_steps=max_steps, stop_loss=stop)
    reft = peft_baft.BaftConfig(
        task_type="CAUSAL_LM", r=RANK, weighting="none", layers_to_transform=blocks
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)
    kind = {"peft_baft": peft_baft.BaftEditor, "peft_lora": peft_baft.AdapterEditor}[method]
    for edit in edits:
        torch.manual_seed(0)
        adapted = get_peft_model(model, reft if method == "peft_baft" else lora)
        editor = kind(
            adapted, NumberTokenizer(), descent=settings, template="raw", scope=peft_baft.NARROW
        )
        words = [str(number) for number in edit["ids"]]
        prompt, answer = words[: edit["prompt"]], words[edit["prompt"] :]
        begin = time.process_time()
        outcome = editor.edit([peft_baft.Edit(" ".join(prompt), " ".join(answer))])
        found["seconds"].append(time.process_time() - begin)
        found["steps"].append(outcome.steps)
        found["learned"].append(outcome.learned)
        adapted.unload()
    return found


def versions(peer: str) -> str:
    from importlib.metadata import version

    names = {
        "pyreft": "pyreft",
        "adapters": "adapters",
        "peft_baft": "peft_baft",
        "peft_lora": "peft",
    }
    return f"{names[peer]} {version(names[peer])}, transformers {version('transformers')}, torch {torch.__version__}"


def main() -> None:
    peer, folder, rows, rate, threads = (
        sys.argv[1],
        Path(sys.argv[2]),
        sys.argv[3],
        float(sys.argv[4]),
        int(sys.argv[5]),
    )
    torch.set_num_threads(threads)
    task = json.loads((folder / "task.json").read_text())
    model, edits, blocks = base_model(task["shape"], folder), task["edits"][rows], task["blocks"]
    if peer in ("peft_baft", "peft_lora"):
        run = partial(by_this_package, model, blocks, peer)
    else:
        setting = {"pyreft": with_pyreft, "adapters": with_adapters}[peer](model, blocks)
        run = partial(by_loop, setting)
    run(edits[:1], rate, MAX_STEPS, STOP)  # warm
    found = run(edits, rate, MAX_STEPS, STOP)
    spent = [sum(run(edits[:3], rate, steps, 0.0)["seconds"]) for steps in FEW_AND_MORE]
    found["step"] = (spent[1] - spent[0]) / (FEW_AND_MORE[1] - FEW_AND_MORE[0]) / len(edits[:3])
    print(json.dumps(found | {"versions": versions(peer)}))


if __name__ == "__main__":
    main()
