"""dvc.lock, kept whole: a copy from before each stage restores what a full disk or a kill cuts off.

DVC writes the file in place. Killed in the middle, or on a full disk, it leaves part of the file or nothing,
and the next stage would treat that as the complete lock. The copy, `.dvc/tmp/dvc.lock.good`, is replaced only
by a lock that is whole. What DVC wrote for a stage after the copy and before the cut may be in neither. Its
run cache has it, so the flow asks DVC for that stage again (`flows.plan`).
"""

import re
import subprocess
import threading

from flows.terminal import console
from flows.workspace import DVC_TMP
from stages.core import disk
from stages.core.errors import Refusal
from stages.core.files import write_text
from stages.job.locked import LOCK, Entries, whole

_COPY = DVC_TMP / "dvc.lock.good"
_HEAD = "schema: '2.0'\nstages:\n"
_ENTRY = re.compile(r"^  (?=[^\s:])", re.M)
"""Where the entry of a stage begins; a line with a colon continues a long name."""
_HASHES = {"md5", "etag", "checksum"}
"""What DVC knows an output by: a file here, or one that a stage leaves in a remote store."""


class SafeLock:
    """dvc.lock during a run.

    Attributes:
        entries: its last whole state.
        mended: how often it had to be restored.
    """

    def __init__(self) -> None:
        self.entries: Entries = {}
        self.mended = 0
        self._text = ""
        self._guard = threading.Lock()

    def begin(self) -> None:
        """Restore the file if it is cut off; otherwise accept it: it may come from another commit.

        Raises:
            Refusal: the file holds a merge conflict.
        """
        if not LOCK.exists():
            _COPY.unlink(missing_ok=True)
            return
        text = LOCK.read_text(errors="replace")
        if re.search(r"^(<<<<<<<|>>>>>>>) ", text, re.M):
            raise Refusal(
                "dvc.lock holds a merge conflict; keep a side (`git checkout --ours dvc.lock`, or --theirs) "
                "and run it again. DVC's cache restores what that side lacks."
            )
        known_text = _COPY.read_text(errors="replace") if _COPY.exists() else ""
        known = whole(known_text)
        if known is None:  # there is no copy, or it is cut off too
            known_text = _committed()
            known = whole(known_text)
        entries = known if text == known_text else whole(text)
        known = known or {}
        if text == known_text:
            self._text, self.entries = text, known  # parse it no more
        elif entries is None or (_is_start(entries, known) and text != _committed()):
            self._text, self.entries = known_text, known
        self.keep()

    def keep(self) -> Entries:
        """Copy the file if it is whole and has lost no entry; otherwise restore it. Return its entries."""
        from dvc.repo import Repo

        with self._guard:
            if LOCK.exists() and not self._kept():
                with Repo(_wait_for_lock=True).lock:  # now nobody is writing
                    if not self._kept():
                        self._restore()
            return self.entries

    def sort(self) -> None:
        """Restore the file if it is cut off and sort it; DVC writes stages as they end, which git shows."""
        from dvc.lock import LockError
        from dvc.repo import Repo

        entries = self.keep()
        if list(entries) == sorted(entries):
            return
        try:
            with Repo().lock:
                if self._kept() and (blocks := entry_texts(self._text)):
                    self._write(blocks)
        except LockError:
            return  # a DVC command works here; the next run sorts

    def _kept(self) -> bool:
        text = LOCK.read_text(errors="replace")
        if text == self._text and _COPY.exists():
            return True
        entries = whole(text)
        if entries is None or not self.entries.keys() <= entries.keys():
            return False
        if _lost_outs(entries, self.entries):
            return False
        self._text, self.entries = text, entries
        try:
            write_text(_COPY, text)
        except OSError as error:  # the last copy stays
            if not disk.is_full(error):
                raise
        return True

    def _restore(self) -> None:
        cut = LOCK.read_text(errors="replace")
        blocks = {**entry_texts(self._text), **entry_texts(beginning(cut, self.entries))}
        if not self.entries.keys() <= blocks.keys():
            raise Refusal(
                f"{LOCK} is cut off and cannot be restored from its copy; run `git checkout {LOCK}` or `dvc "
                "repro`, whose cache has every result."
            )
        self._write(blocks)
        self.mended += 1
        console.print(
            f"dvc.lock was cut off, by a full disk or a kill; {len(blocks)} stages restored from its copy",
            markup=False, style="yellow",
        )  # fmt: skip

    def _write(self, blocks: dict[str, str]) -> None:
        write_text(LOCK, joined(blocks))
        self._kept()


def beginning(text: str, known: Entries) -> str:
    """Return a cut lock without its last entry, or all of a lock that DVC began anew after a cut.

    Args:
        known: what the lock held before; DVC keeps the order.
    """
    entries = whole(text)
    if entries is not None and not _is_start(entries, known) and not _lost_outs(entries, known):
        return text
    starts = [match.start() for match in _ENTRY.finditer(text)]
    return text[: starts[-1]] if starts else ""


def _is_start(entries: Entries, known: Entries) -> bool:
    """Tell whether entries are the first of the known ones and not all of them."""
    return len(entries) < len(known) and list(entries) == list(known)[: len(entries)]


def _lost_outs(entries: Entries, known: Entries) -> bool:
    """Tell whether an entry was cut off between its inputs and its outputs."""
    return any(
        "outs" in known[name] and "outs" not in entry for name, entry in entries.items() if name in known
    )


def put_entry(name: str, block: str) -> None:
    """Write one entry, as `entry_texts` returns it, into dvc.lock."""
    from dvc.repo import Repo

    with Repo(_wait_for_lock=True).lock:
        text = LOCK.read_text() if LOCK.exists() else ""
        before = entry_texts(text)
        if _ENTRY.search(text) and not before:
            raise OSError(f"{LOCK} is cut off, so {name} cannot be added to it; run it again.")
        write_text(LOCK, joined({**before, name: block}))


def joined(entries: dict[str, str]) -> str:
    """Return the lock of these entries, sorted."""
    return _HEAD + "".join(entries[name] for name in sorted(entries))


def entry_texts(text: str) -> dict[str, str]:
    """Return the text of each entry of a lock as DVC writes it, and nothing of any other file.

    Entries are moved as text, as another parser than DVC's reads some numbers as words.
    """
    starts = [match.start() for match in _ENTRY.finditer(text)]
    names = list(whole(text) or {})
    if len(names) != len(starts):
        return {}
    return {
        name: text[start:end] for name, start, end in zip(names, starts, [*starts[1:], None], strict=False)
    }


def _committed() -> str:
    shown = subprocess.run(["git", "show", f"HEAD:./{LOCK}"], capture_output=True, text=True)
    return "" if shown.returncode else shown.stdout
