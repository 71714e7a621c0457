"""LeRobot datasets on the Hub: metadata at once, data and videos file by file when they are needed."""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubSnapshot:
    """One commit of a Hub dataset in the local cache, which fills up as its files are used.

    Args:
        repo_id: "organisation/name".
        revision: branch, tag or commit; resolved once, so that a dataset cannot change under a run.
    """

    def __init__(self, repo_id: str, revision: str | None = None):
        self.repo_id = repo_id
        self.root = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns="meta/*"))
        self.commit = self.root.name  # the cache names a snapshot by its commit

    def fetch(self, path: Path) -> None:
        """Make sure that a file of the snapshot is there; downloads it if it is not.

        Raises:
            FileNotFoundError: the dataset has no such file.
            ConnectionError: the Hub cannot be reached. Nobody may skip that: a failing network is no reason to train
                on fewer episodes.
        """
        if path.is_file():
            return
        name = path.relative_to(self.root).as_posix()
        try:
            hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.commit)
        except LocalEntryNotFoundError as error:
            raise ConnectionError(f"{name} of {self.repo_id} cannot be downloaded: {error}. Try again.") from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(
                f"{name} is not in {self.repo_id} at commit {self.commit}, although its metadata names it."
            ) from error


def open_dataset(root: str | Path, revision: str | None = None) -> tuple[Path, HubSnapshot | None]:
    """The folder of a dataset, and its snapshot if `root` is a Hub id and not a folder.

    Raises:
        FileNotFoundError: neither a folder nor the form of a Hub id.
    """
    path = Path(root)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a local folder, which has no revision {revision!r}. Leave revision out.")
        return path, None
    if isinstance(root, str) and _HUB_ID.fullmatch(root) and not root.startswith("."):
        snapshot = HubSnapshot(root, revision)
        return snapshot.root, snapshot
    raise FileNotFoundError(f"Dataset folder {path} does not exist, and {str(root)!r} is not a Hub id (owner/name).")
