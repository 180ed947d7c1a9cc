"""Publish an adapter on the Hugging Face Hub, with its files and its card in one commit."""

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
# Patterns of the files that contain facts. A push without facts deletes those of an earlier push.
FACT_FILES = (
    LINES,
    REPORT,
    REPORT_PAGE,
    *(f"{place}*.{kind}" for place in ("", "inspect/") for kind in ("html", "png")),
)
LOCAL_FIELDS = ("model", "adapter")  # fields of a report that may be local paths
TRIES, FIRST_PAUSE = 4, 1.0  # the pause is in seconds, and doubles after each try
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

    The folder itself is not changed. In an existing card, text that a person wrote is kept.

    Args:
        folder: the adapter's folder.
        repo_id: `user/name`; the repository is created if it does not exist.
        private: whether a new repository is private.
        revision: the branch to upload to, created if it does not exist; by default `main`.
        token: a token for the Hub; by default the one you are logged in with.
        facts: whether to upload the files that contain facts (journal, report, pictures) and to list the facts in the card. If
            not, such files of an earlier push are deleted; they stay in the history of the repository.
        base_model, base_revision: id and revision of the base model on the Hub; by default those in the adapter's config.
        results: result lines of `baft bench --adapter` to show in the card.
        message: the commit message.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: the folder has no adapter, its journal is damaged, or the base model's id on the Hub is unknown.
        PermissionError: there is no token, or it does not permit this.
        OSError: the Hub could not be reached, or answered with errors only.
    """
    folder = Path(folder)
    _require_adapter(folder)
    config = PeftConfig.from_pretrained(str(folder))
    base_model = require_on_hub(base_model or config.base_model_name_or_path)
    _require_results_of(folder, results)
    facts_of_journal(Journal(folder))  # raises if the journal is damaged
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
    """Write the card into a folder and upload the folder.

    Args:
        copy: the folder to upload, which is changed. folder: the adapter's folder, which the card describes.
        commit: further arguments of the upload. The other arguments are as for `push`.
    """
    repo_id = source.repo_id
    assert repo_id is not None, "a published adapter has a repository"
    _remove_local_paths(copy, source)
    api = HfApi(token=token)
    with _explained_errors(repo_id):
        name = _with_retries(
            lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        )
        if revision is not None:
            _with_retries(lambda: api.create_branch(name, branch=revision, exist_ok=True))
        earlier = _with_retries(lambda: _card_to_keep(folder, api, name, revision))
        write_card(copy, source, folder, earlier)
        upload = {"repo_id": name, "folder_path": copy, "revision": revision, **commit}
        return str(_with_retries(lambda: api.upload_folder(**upload)).commit_url)


def files_to_publish(folder: Path, facts: bool) -> list[str]:
    """List the files of an adapter's folder to upload, without the card. Snapshots and temporary files are not uploaded.

    Args:
        facts: whether to include files that contain facts.
    """
    names = [CONFIG_NAME, WEIGHTS]
    if facts:
        names += [name for name in (LINES, REPORT, REPORT_PAGE) if (folder / name).is_file()]
        for picture in pictures_of(folder):
            names += [picture.page] if picture.image is None else [picture.page, picture.image]
    return names


def _remove_local_paths(copy: Path, source: CardSource) -> None:
    """Write the base model's id on the Hub into the configs, and remove paths of this machine from the report."""
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
        public = {name: value for name, value in content.items() if name not in LOCAL_FIELDS}
        report.write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _require_adapter(folder: Path) -> None:
    """Raise a ValueError unless a folder has the config and the weights of an adapter."""
    missing = [name for name in (CONFIG_NAME, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no adapter to upload: there is no {' and no '.join(missing)}. Name a folder that "
            "`baft edit --output` or save_pretrained wrote."
        )


def _require_results_of(folder: Path, results: Sequence[AdapterResult]) -> None:
    """Raise a ValueError unless result lines are about the current adapter in a folder."""
    if not results:
        return
    weights = short_hash(save(load_file(folder / WEIGHTS)))
    for result in results:
        if result.settings.get("sha256") != weights:
            raise ValueError(
                f"A result line is about another adapter ({result.settings.get('adapter')}), or an earlier state of {folder}. "
                f"Measure this one: baft bench {result.benchmark} --adapter {folder} ..."
            )


def _card_to_keep(folder: Path, api: HfApi, name: str, revision: str | None) -> ModelCard | None:
    """Return the card whose text by a person is kept: the folder's, or else the one on the Hub."""
    local = card_in(folder)
    if local is not None and own_text(local.text):
        return local
    try:
        card: ModelCard = ModelCard.load(api.hf_hub_download(name, CARD, revision=revision))
        return card
    except EntryNotFoundError:
        return local


def _with_retries(request: Callable[[], Result]) -> Result:
    """Send a request to the Hub, and retry if the Hub has an internal error or cannot be reached."""
    pause = FIRST_PAUSE
    for _ in range(TRIES - 1):
        try:
            return request()
        except Exception as error:
            if not _is_transient(error):
                raise
            logger.warning(
                "The Hub did not answer (%s); retrying in %g s.", _first_line(error), pause
            )
            time.sleep(pause)
            pause *= 2
    return request()


def _is_transient(error: Exception) -> bool:
    """Check whether a request that failed with this error may succeed later."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return _status(cause) in (429, *range(500, 600))
    return _is_network_error(cause)


def _cause(error: BaseException) -> BaseException:
    """Return the cause of an error: huggingface_hub wraps upload errors into a RuntimeError that says less."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_network_error(error: BaseException) -> bool:
    # huggingface_hub has used three HTTP libraries so far: requests, httpx and httpx2.
    is_http_error = type(error).__module__.startswith(("httpx", "requests"))
    return isinstance(error, ConnectionError) or (
        is_http_error and not isinstance(error, TypeError)
    )


def _status(error: HfHubHTTPError) -> int | None:
    return None if error.response is None else error.response.status_code


@contextmanager
def _explained_errors(repo_id: str) -> Iterator[None]:
    """Replace errors of the Hub by errors that say in one line what failed and what to do."""
    try:
        yield
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, LocalTokenNotFoundError):
            raise PermissionError(f"There is no token for the Hub: {LOG_IN}") from None
        if isinstance(cause, HfHubHTTPError):
            raise _error_for_status(cause, repo_id) from error
        if not _is_network_error(cause):
            raise
        raise OSError(
            f"Nothing was uploaded to {repo_id}, since the Hub cannot be reached ({_first_line(cause)}). Check the network."
        ) from error


def _error_for_status(error: HfHubHTTPError, repo_id: str) -> OSError:
    match _status(error):
        case 401:
            return PermissionError(
                f"The Hub rejected your credentials (401), and nothing was uploaded to {repo_id}: {LOG_IN}"
            )
        case 403:
            return PermissionError(
                f"Your token may not write to {repo_id} (403), and nothing was uploaded: use a token with the right to write, or "
                "your own repository."
            )
    return OSError(f"Nothing was uploaded to {repo_id}: {_first_line(error)}")


LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token with the right to write."


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
