"""Render an inspection as a self-contained HTML page. All texts come from users and models, so all are escaped."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from peft_baft.adapter.parameters import WEIGHTINGS
from peft_baft.tools.inspect.inspect import Adapter, Inspection, Token
from peft_baft.tools.inspect.token_text import visible
from peft_baft.tools.pages import html_environment, read_asset

NOTHING = "(nothing: it stops at once)"
LONG_PROMPT = 140  # characters; longer prompts get a smaller heading
GATES = (
    "A gate is a number between 0 (closed) and 1 (open) that the adapter computes from a token's hidden vector. It scales one "
    "direction of the update. Each bar is a gate."
)
NO_GATES = "has no gates, as in ReFT. This is drawn as gates that are always fully open."
OTHER_KIND = "is a {} of edits: one full bar where it sets what the model says next."


def page(inspection: Inspection) -> str:
    """Return a page with both answers, the gates of the edited blocks at each token, and the changes of the next tokens.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    folder = Path(__file__).parent
    script = read_asset(folder, "page.js")
    environment = html_environment()
    # Without sort_keys, so that adapters keep their order.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.from_string(read_asset(folder, "page.html")).render(
        style=read_asset(folder, "page.css"),
        script=script,
        # The page's policy allows only the script with this hash.
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        prompt=inspection.prompt.strip(),
        length="long" if len(inspection.prompt) > LONG_PROMPT else "short",
        before=inspection.before or NOTHING,
        after=inspection.after or NOTHING,
        outcome="same" if inspection.before == inspection.after else "another",
        summary=summary(inspection),
        gates=_gates_legend(inspection),
        rule=_position_rule(inspection),
        data=_data(inspection),
    )


def summary(inspection: Inspection) -> list[str]:
    """Summarise the inspection in three sentences, or in two if nothing is changed."""
    answer_start = inspection.prompt_end + 1
    prompt, answer = inspection.tokens[:answer_start], inspection.tokens[answer_start:]
    if not any(cell.size for block in inspection.blocks for cell in block.cells):
        return ["The edits change no hidden vector.", _first_token(prompt[-1])]
    acts = f"The edits act in {len(inspection.blocks)} block{'s' * (len(inspection.blocks) > 1)}"
    acts += f", on {sum(token.edited for token in prompt)} of the prompt's {len(prompt)} tokens"
    acts += " and on every token of the answer." if answer else "."
    return [acts, _first_token(prompt[-1]), _strongest(inspection)]


def _first_token(last: Token) -> str:
    """Describe how the edits change the first token of the answer."""
    was = max(last.changes, key=lambda change: change.before)
    now = max(last.changes, key=lambda change: change.after)
    if was.id == now.id:
        shares = f"{percent(now.before)} without the edits, {percent(now.after)} with them"
        return f"The most probable first token of the answer stays {_quoted(now.text)}: {shares}."
    fell, rose = (f"{_quoted(c.text)} {percent(c.before)} → {percent(c.after)}" for c in (was, now))
    return f"The first token of the answer changes: {fell}, {rose}."


def _strongest(inspection: Inspection) -> str:
    places = [
        (cell.size, i, block.name)
        for block in inspection.blocks
        for i, cell in enumerate(block.cells)
    ]
    size, i, name = max(places)
    where = f"{_quoted(inspection.tokens[i].text)} in {block_label(name)}"
    return f"They are strongest at {where}: the norm of the update is {percent(size)} of the hidden vector's."


def _gates_legend(inspection: Inspection) -> str:
    memories = [adapter for adapter in inspection.adapters if adapter.weighting not in WEIGHTINGS]
    others = [adapter for adapter in inspection.adapters if adapter.weighting in WEIGHTINGS]
    free = [adapter.name for adapter in others if adapter.weighting == "none"]
    sentences = [GATES] if len(free) < len(others) else []
    if free:
        which = ", ".join(free) if len(inspection.adapters) > 1 else "This adapter"
        sentences.append(f"{which} {NO_GATES}")
    for memory in memories:
        sentences.append(
            f"{memory.name} {OTHER_KIND.format(memory.weighting)} Here {_answering(memory)}."
        )
    return " ".join(sentences)


def _answering(memory: Adapter) -> str:
    return "none of its edits answers" if memory.edit is None else f"edit {memory.edit} answers"


def _position_rule(inspection: Inspection) -> str:
    spans = {(a.prompt_positions, a.answer_positions) for a in inspection.adapters}
    rules = sorted(f"{_last_tokens(prompt)}{_answer_tokens(answer)}" for prompt, answer in spans)
    return f"Pale: not edited. An adapter edits {', or '.join(rules)}."


def _last_tokens(count: int) -> str:
    return f"the last {count} prompt tokens" if count > 1 else "the last prompt token"


def _answer_tokens(count: int | None) -> str:
    if count is None:
        return " and every token of the answer"
    if count == 0:
        return ""
    return (
        f" and the first {count} tokens of the answer"
        if count > 1
        else " and the answer's first token"
    )


def _quoted(text: str) -> str:
    return f"“{visible(text.strip() or text)}”"


def percent(share: float) -> str:
    """Format a share in [0, 1] as a percentage; small and large shares are never rounded to 0% or 100%."""
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.999 < share < 1:
        return ">99.9%"
    if share in (0, 1):
        digits = 0
    elif share < 0.01:
        digits = 2
    else:
        digits = 1 if share < 0.1 or share > 0.99 else 0
    return f"{100 * share:.{digits}f}%"


def block_label(name: str) -> str:
    """Return a short name for a block of the base model: `block 7` for `model.layers.7`."""
    last = name.rpartition(".")[2]
    return f"block {last}" if last.isdigit() else name


def _data(inspection: Inspection) -> dict[str, Any]:
    """Collect the data for the script. The template writes it as JSON that cannot close the script element."""
    data: dict[str, Any] = asdict(inspection)
    for token in data["tokens"]:
        for shown in (token, *token["changes"]):
            shown["label"] = visible(shown.pop("text"))
    for block in data["blocks"]:
        block["label"] = block_label(block["name"])
    return {name: data[name] for name in ("adapters", "tokens", "blocks")}
