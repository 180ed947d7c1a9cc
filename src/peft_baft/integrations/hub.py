"""Publish an adapter on the Hugging Face Hub: its files and its card in one commit, or nothing."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file, save

from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.editing.journal import LINES, Journal
from peft_baft.integrations.base_model import require_on_hub
from peft_baft.integrations.card import (
    CARD,
    REPORT,
    AdapterResult,
    CardSource,
    card_in,
    own_text,
    write_card,
)
from peft_baft.loading import short_hash
from peft_baft.tools.report.folder import pictures_of
from peft_baft.tools.report.taught import facts_of_journal

logger = logging.getLogger(__name__)
REPORT_PAGE = "report.html"
# What tells the facts, as patterns: taken away where an earlier push had it, and this one leaves it out.
FACT_FILES = (
    LINES,
    REPORT,
    REPORT_PAGE,
    *(f"{place}*.{kind}" for place in ("", "inspect/") for kind in ("html", "png")),
)
LOCAL_FIELDS = ("model", "adapter")  # of a report: where they lay when it was made
TRIES, FIRST_PAUSE = 4, 1.0  # seconds, doubled after each try
Result = TypeVar("Result")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    facts: bool = True,
    base_model: str | None = None,
    base_revision: str | None = None,
    results: Sequence[AdapterResult] = (),
    message: str = "Upload adapter",
) -> str:
    """Upload the adapter in a folder, with its journal, its report and its card.

    The folder itself is left as it is. A card that is there already keeps what a person wrote into it.

    Args:
        folder: of the adapter. repo_id: `user/name`; the repository is made where there is none.
        private: of a new repository. revision: the branch to upload to, made where there is none; by default `main`.
        token: of the Hub; by default the one that is logged in.
        facts: whether to upload what tells the facts: journal, report, pictures, and the card's table of them. Without, what
            an earlier push had of it goes as well; the history of the repository keeps it.
        base_model, base_revision: id on the Hub of the model that the adapter is for; by default what its config says.
        results: lines of `baft bench --adapter`, which the card shows.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the folder holds no adapter, its journal is damaged, or it is not known which model of the Hub it is for.
        PermissionError: there is no token, or it may not do this.
        OSError: the Hub could not be reached, or answered with an error each time.
    """
    folder = Path(folder)
    _require_adapter(folder)
    config = PeftConfig.from_pretrained(str(folder))
    base_model = require_on_hub(base_model or config.base_model_name_or_path)
    _require_about(results, folder)
    facts_of_journal(Journal(folder))  # a damaged one is not published
    source = CardSource(config, base_model, base_revision, repo_id, facts, results=results)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for file in files_to_publish(folder, facts):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, copy / file)
        commit = {"commit_message": message, "delete_patterns": None if facts else list(FACT_FILES)}
        return publish(copy, source, folder, private, revision, token, commit)


def publish(
    copy: Path,
    source: CardSource,
    folder: Path,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit: dict[str, Any],
) -> str:
    """Make the card of a folder that is to be published as it is, and upload it.

    Args:
        copy: what is uploaded. folder: what the card is about, and where a person may have written one.
        commit: further arguments of the upload. Otherwise as `push`.
    """
    repo_id = source.repo_id
    assert repo_id is not None, "what is published has a name"
    _forget_this_machine(copy, source)
    api = HfApi(token=token)
    with _errors_of_the_hub(repo_id):
        name = _repeated(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None:
            _repeated(lambda: api.create_branch(name, branch=revision, exist_ok=True))
        earlier = _repeated(lambda: _card_to_keep(folder, api, name, revision))
        write_card(copy, source, folder, earlier)
        upload = {"repo_id": name, "folder_path": copy, "revision": revision, **commit}
        return str(_repeated(lambda: api.upload_folder(**upload)).commit_url)


def files_to_publish(folder: Path, facts: bool) -> list[str]:
    """List what of an adapter's folder is uploaded, apart from its card; snapshots and what a run leaves behind are not.

    Args:
        facts: whether files that tell the facts are among them.
    """
    names = [CONFIG_NAME, WEIGHTS]
    if facts:
        names += [name for name in (LINES, REPORT, REPORT_PAGE) if (folder / name).is_file()]
        for picture in pictures_of(folder):
            names += [picture.page] if picture.image is None else [picture.page, picture.image]
    return names


def _forget_this_machine(copy: Path, source: CardSource) -> None:
    """Name the base model in the configs as the Hub does, and leave paths of this machine out of the report."""
    for file in (copy / CONFIG_NAME, *copy.glob(f"*/{CONFIG_NAME}")):
        if file.is_file():
            config = json.loads(file.read_text("utf-8"))
            config |= {"base_model_name_or_path": source.base, "revision": source.revision}
            file.write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
    report = copy / REPORT
    if report.is_file():
        try:
            content = dict(json.loads(report.read_text("utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{REPORT} is damaged ({error}), and nothing was uploaded. Delete it, or edit again."
            ) from None
        kept = {name: value for name, value in content.items() if name not in LOCAL_FIELDS}
        report.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _require_adapter(folder: Path) -> None:
    """Raise a ValueError unless a folder holds a whole adapter."""
    missing = [name for name in (CONFIG_NAME, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} holds no adapter that could be uploaded: there is no {' and no '.join(missing)}. Name a folder that "
            "`baft edit --output` or save_pretrained has made."
        )


def _require_about(results: Sequence[AdapterResult], folder: Path) -> None:
    """Raise a ValueError unless result lines are about the adapter in a folder as it is now."""
    if not results:
        return
    weights = short_hash(save(load_file(folder / WEIGHTS)))
    for line in results:
        if line.settings.get("sha256") != weights:
            raise ValueError(
                f"A result line is about another adapter ({line.settings.get('adapter')}), or an earlier state of {folder}. "
                f"Measure this one: baft bench {line.benchmark} --adapter {folder} ..."
            )


def _card_to_keep(folder: Path, api: HfApi, name: str, revision: str | None) -> ModelCard | None:
    """Find the card whose text of a person's own stays: the folder's, or else the one that is on the Hub."""
    local = card_in(folder)
    if local is not None and own_text(local.text):
        return local
    try:
        return ModelCard.load(api.hf_hub_download(name, CARD, revision=revision))
    except EntryNotFoundError:
        return local


def _repeated(ask: Callable[[], Result]) -> Result:
    """Ask the Hub, and ask again a few times where it has an error of its own or cannot be reached."""
    pause = FIRST_PAUSE
    for _ in range(TRIES - 1):
        try:
            return ask()
        except Exception as error:
            if not _passes(error):
                raise
            logger.warning("The Hub did not answer (%s); once more in %g s.", _line(error), pause)
            time.sleep(pause)
            pause *= 2
    return ask()


def _passes(error: Exception) -> bool:
    """Tell whether an error may be gone a moment later."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return _status(cause) in (429, *range(500, 600))
    return _is_of_the_network(cause)


def _cause(error: BaseException) -> BaseException:
    """Find what lies behind an error: huggingface_hub wraps those of uploads into a RuntimeError that says less."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_of_the_network(error: BaseException) -> bool:
    # huggingface_hub has had three HTTP libraries so far: requests, httpx, httpx2.
    of_library = type(error).__module__.startswith(("httpx", "requests"))
    return isinstance(error, ConnectionError) or (of_library and not isinstance(error, TypeError))


def _status(error: HfHubHTTPError) -> int | None:
    return None if error.response is None else error.response.status_code


@contextmanager
def _errors_of_the_hub(repo_id: str) -> Iterator[None]:
    """Say in one line what the Hub did not do, and what to do about it."""
    try:
        yield
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, LocalTokenNotFoundError):
            raise PermissionError(f"There is no token for the Hub: {LOG_IN}") from None
        if isinstance(cause, HfHubHTTPError):
            raise _of_status(cause, repo_id) from error
        if not _is_of_the_network(cause):
            raise
        raise OSError(
            f"Nothing was uploaded to {repo_id}, since the Hub cannot be reached ({_line(cause)}). Check the network."
        ) from error


def _of_status(error: HfHubHTTPError, repo_id: str) -> OSError:
    match _status(error):
        case 401:
            return PermissionError(
                f"The Hub does not know you (401), so nothing was uploaded to {repo_id}: {LOG_IN}"
            )
        case 403:
            return PermissionError(
                f"Your token may not write to {repo_id} (403), and nothing was uploaded: take one with the right to write, or a "
                "repository of your own."
            )
    return OSError(f"Nothing was uploaded to {repo_id}: {_line(error)}")


LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write."


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
