"""Studies as files: expand `studies/<name>.yaml` into explicit lines of params.yaml.

A study file holds a claim, its source, a compact sweep and hypotheses, in two profiles: what a laptop can do,
and what the publication did. Shorthands keep it short; the expanded file has none of them.

- `shared` holds what both profiles have. A profile adds entries and replaces fields.
- `words` of a profile: `{base}` stands for a value of any type, in names and in values.
- `each: {bits: [8, 4]}` makes an entry for each value, with `{bits}` in its name. `{50: 0.5}` in place of a
  list gives each value a word for the name. Several words make all combinations.
- Candidates may be patterns, such as `prune/wanda-*`: in `evaluate` over all recipes, in hypotheses and in
  `report.noise` over `evaluate.candidates`.
- `mirror` holds what published data sets add; `--mirror FOLDER` adds it, with `{mirror}` for the folder.
- `hub:<name>@<branch>` becomes `hub:<name>@<commit>`, the commit at which the branch is.
- `note` of an entry becomes a comment above it.

The first line of an expanded file holds the hash of the rest. While it fits, nobody has edited the file, so
another study may be added to it, and nothing is lost if it is written again.
"""

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from flows.layout import SECTIONS, check_replaceable, held_text, section_lines
from flows.pins import commit_of
from stages.core.errors import Refusal
from stages.core.files import sha256, text_sha256, write_text
from stages.core.schema import RECIPES, Strict
from stages.job.load import checked_params, parsed, read
from stages.job.params import Params
from stages.job.sentences import allowed, sentence

STUDY_FILES = Path("studies")
_PARTS = ("hypotheses", "no_data")
"""The parts of a profile that become a part of the study, beside the sections of params.yaml."""
_SECTIONS = tuple(name for name in Params.model_fields if name != "studies")
_NAMED = ("models", "datasets", *RECIPES, *_PARTS)
"""The parts whose entries have names, so that `each` and `note` apply."""
_WORD = re.compile(r"\{([a-z_]+)\}")
_FIRST = (
    "# Written by `prunequant study`; while the rest of this file has sha256 {seal}, nobody has edited it."
)
_ORIGIN = "# study {study}, profile {profile}, mirror {mirror}; {file} had sha256 {digest}."
_READ = re.compile(r"# study (\S+), profile (\S+), mirror (.+); \S+ had sha256 [0-9a-f]{64}\.")


class Chosen(NamedTuple):
    """A study as it was asked for, which an expanded file names."""

    study: str
    profile: str
    mirror: str | None
    """The folder of published data sets."""

    @property
    def file(self) -> Path:
        """The study's file."""
        return STUDY_FILES / f"{self.study}.yaml"


class StudyFile(Strict):
    """`studies/<name>.yaml`; the parts of a profile are checked once they are expanded."""

    claim: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    shared: dict[str, Any] = Field(default_factory=dict)
    profiles: Annotated[dict[Literal["laptop", "paper"], dict[str, Any]], Field(min_length=1)]


@dataclass
class Expansion:
    """A study in explicit lines."""

    origin: Chosen
    sections: dict[str, Any] = field(default_factory=dict)
    """The sections of params.yaml."""
    notes: dict[tuple[str, str], str] = field(default_factory=dict)
    """Comments, by section and entry."""


def write_study(origin: Chosen, into: Path, force: bool) -> Params:
    """Expand a study into params.yaml; return what the file then says.

    A file that only this command has written keeps its other studies. A committed file is replaced.

    Args:
        into: the file to write.
        force: replace the file whatever it holds.

    Raises:
        Refusal: there is no such study or profile; the file has edits of somebody, or another profile of the
            study; a name would mean two things; or the result is no sound params.yaml. Nothing is written.
    """
    old = held_text(into, "--into")
    origins = [] if force or not old else _origins(old)
    if origins is None:
        check_replaceable(into, "--into")
        origins = []
    before = next((other for other in origins if other.study == origin.study), origin)
    if before != origin:
        raise Refusal(
            f"{into} holds study {before.study} already, with profile {before.profile} and mirror "
            f"{before.mirror or 'none'}; name another file with --into, or start it again with --force."
        )
    held = parsed(old) if origins else {}
    text = expanded_text([*origins, *([] if origin in origins else [origin])], held)
    params = checked_params(parsed(text), f"{into} as expanded", device=False)
    if text != old:
        write_text(into, text)
    return params


def expanded_text(origins: Sequence[Chosen], held: Mapping[str, Any]) -> str:
    """Return the params.yaml that these studies expand to.

    Args:
        held: what the file holds so far; commits of branches that it names stay.

    Raises:
        Refusal: a line each mistake in the study files, all of them.
    """
    mistakes: list[str] = []
    expansions = []
    for origin in origins:
        expander = _Expander(origin, held)
        expansions.append(expander.expand())
        mistakes += [f"{origin.file}: {mistake}" for mistake in expander.mistakes]
    merged = _composed(expansions, mistakes)
    if mistakes:
        listed = "\n".join(f"  - {mistake}" for mistake in dict.fromkeys(mistakes))
        raise Refusal(f"{len(set(mistakes))} problem(s), nothing was written:\n{listed}")
    lines = [
        _ORIGIN.format(**origin._asdict() | {"mirror": origin.mirror or "none"}, file=origin.file,
                       digest=sha256(origin.file))
        for origin in origins
    ]  # fmt: skip
    for section in SECTIONS:
        lines += ["", *section_lines(section, merged.sections.get(section, {}), merged.notes)]
    rest = "\n".join(lines) + "\n"
    return f"{_FIRST.format(seal=text_sha256(rest))}\n{rest}"


def stage_counts(params: Params) -> dict[str, int]:
    """Return how many stages of each kind DVC makes of params.yaml."""
    single = dict.fromkeys(("code", "validate", "tidy", "report"), 1)
    sections = {name: len(getattr(params, name)) for name in ("models", "datasets", *RECIPES)}
    return {
        **sections,
        "alias": len(params.suites.datasets),
        "evaluate": len(params.evaluations()),
        "profile": len(params.profile.candidates),
        **single,
    }


def _origins(text: str) -> list[Chosen] | None:
    """Return what a text was expanded from; None if it was not, or was edited since."""
    first, _, rest = text.partition("\n")
    if first != _FIRST.format(seal=text_sha256(rest)):
        return None
    lines = [_READ.fullmatch(line) for line in rest.splitlines()]
    return [Chosen(match[1], match[2], None if match[3] == "none" else match[3]) for match in lines if match]


def _composed(expansions: Sequence[Expansion], mistakes: list[str]) -> Expansion:
    """Put the sections of several studies together; a name with two meanings is a mistake."""
    whole = Expansion(expansions[0].origin)
    owners: dict[str, str] = {}

    def add(ours: dict[str, Any], theirs: Mapping[str, Any], at: str, study: str, depth: int) -> None:
        for name, value in theirs.items():
            place = f"{at}{name}"
            if name not in ours:
                ours[name] = dict(value) if isinstance(value, dict) and depth else value
                owners[place] = study
                if isinstance(value, dict) and depth:
                    for inner in value:
                        owners[f"{place}.{inner}"] = study
            elif place in ("evaluate.candidates", "profile.candidates"):
                ours[name] = list(dict.fromkeys([*ours[name], *value]))
            elif isinstance(value, dict) and depth:
                add(ours[name], value, f"{place}.", study, depth - 1)
            elif ours[name] != value:
                first = owners.get(place) or owners.get(place.rpartition(".")[0]) or study
                mistakes.append(
                    f"{place} means one thing in study {first} and another in study {study}; give it another "
                    "name in one of them, or expand one into another file with --into."
                )

    for expansion in expansions:
        for section, content in expansion.sections.items():
            add(whole.sections.setdefault(section, {}), content, f"{section}.", expansion.origin.study,
                1 if section in ("suites", "report") else 0)  # fmt: skip
        whole.notes |= expansion.notes
    return whole


class _Expander:
    """Turns a study file into explicit sections; `mistakes` has a sentence for all that is wrong."""

    def __init__(self, origin: Chosen, held: Mapping[str, Any]) -> None:
        self.origin, self.held = origin, held
        self.mistakes: list[str] = []
        self.words: dict[str, Any] = {}

    def expand(self) -> Expansion:
        """Return the expanded study.

        Raises:
            Refusal: there is no such study, profile or mirror, or the file is no study.
        """
        study, parts = self._parts()
        self.words = {"mirror": self.origin.mirror, **parts.pop("words", {})}
        whole = Expansion(self.origin)
        for section in _SECTIONS:
            content = parts.get(section, {})
            if section in _NAMED:
                whole.sections[section] = self._entries(section, content, whole.notes)
            elif section == "suites":
                whole.sections[section] = {
                    kind: self._entries(f"suites.{kind}", entries, whole.notes)
                    for kind, entries in content.items()
                    if self._is_mapping(entries, f"suites.{kind}")
                }
            else:
                whole.sections[section] = self._filled(content, self.words, section)
        self._pin(whole.sections)
        for section in ("evaluate", "profile"):
            listed = whole.sections[section].get("candidates", [])
            if not isinstance(listed, list):
                self.mistakes.append(f"{section}.candidates must be a list, such as [base/smollm2, prune/*].")
                listed = []
            whole.sections[section]["candidates"] = self._chosen(
                listed, _artifacts(whole.sections), f"{section}.candidates"
            )
        known = whole.sections["evaluate"]["candidates"]
        noise = whole.sections["report"].get("noise", {})
        if self._is_mapping(noise, "report.noise") and noise:
            whole.sections["report"]["noise"] = {
                group: self._chosen(names, known, f"report.noise.{group}")
                if isinstance(names, list)
                else names
                for group, names in noise.items()
            }
        judged = self._entries("hypotheses", parts.get("hypotheses", {}), {})
        missing = self._entries("no_data", parts.get("no_data", {}), {})
        whole.sections["studies"] = {
            self.origin.study: {
                "claim": study.claim, "source": study.source, "profile": self.origin.profile,
                "hypotheses": {
                    name: self._resolved(content, known, f"hypotheses.{name}")
                    for name, content in judged.items()
                },
                "no_data": {name: why for name, why in missing.items() if name not in judged},
            }
        }  # fmt: skip
        return whole

    def _parts(self) -> tuple[StudyFile, dict[str, Any]]:
        """Return the study, and its profile with the shared parts and those of the mirror."""
        file, profile, mirror = self.origin.file, self.origin.profile, self.origin.mirror
        if not file.exists():
            there = [path.stem for path in STUDY_FILES.glob("*.yaml")]
            raise Refusal(f"there is no study {self.origin.study!r}; {allowed(there, self.origin.study)}.")
        try:
            study = StudyFile.model_validate(read(file))
        except ValidationError as error:
            sentences = [sentence(details, StudyFile) for details in error.errors()]
            raise Refusal(f"{file} is no study:\n" + "\n".join(f"  - {line}" for line in sentences)) from None
        if profile not in study.profiles:
            raise Refusal(f"{file} has no profile {profile!r}; {allowed(study.profiles, profile)}.")
        parts = _merged(study.shared, study.profiles[profile])
        extra = parts.pop("mirror", None)
        if mirror is not None:
            if extra is None:
                raise Refusal(f"profile {profile} of {file} reads no mirror; leave --mirror out.")
            parts = _merged(parts, extra)
        known = (*_SECTIONS, *_PARTS, "words", "mirror")
        for name, content in list(parts.items()):
            if name not in known:
                self.mistakes.append(f"profile {profile} has no part {name!r}; {allowed(known, name)}.")
            elif not self._is_mapping(content, name):
                del parts[name]
        return study, parts

    def _is_mapping(self, value: Any, at: str) -> bool:
        """Tell whether a part is a mapping; it is a mistake if not."""
        if not isinstance(value, dict):
            self.mistakes.append(f"{at} must be a mapping.")
        return isinstance(value, dict)

    def _entries(
        self, section: str, entries: Mapping[str, Any], notes: dict[tuple[str, str], str]
    ) -> dict[str, Any]:
        """Return the entries of a section, one for every combination of `each`."""
        expanded: dict[str, Any] = {}
        for pattern, entry in entries.items():
            if not self._is_mapping(entry, f"{section}.{pattern}"):
                continue
            content = {key: value for key, value in entry.items() if key not in ("each", "note")}
            each = self._filled(entry.get("each", {}), self.words, f"{section}.{pattern}.each")
            combinations = self._combinations(f"{section}.{pattern}", each)
            for number, words in enumerate(combinations):
                name = self._filled(pattern, words, f"{section}.{pattern}")
                if name in expanded:
                    self.mistakes.append(
                        f"{section}.{name} comes out twice; name it by every word of its each."
                    )
                expanded[name] = self._filled(content, words, f"{section}.{name}")
                if "note" in entry and not number:
                    notes[section, name] = self._filled(str(entry["note"]), words, f"{section}.{name}")
        return expanded

    def _combinations(self, at: str, each: Any) -> Iterator[dict[str, Any]]:
        """Yield the words of each combination, beside those of the profile."""
        if not isinstance(each, dict) or not all(isinstance(values, dict | list) for values in each.values()):
            self.mistakes.append(f"{at}.each must name lists, such as {{bits: [8, 4]}}, or mappings.")
            return
        named = [
            [(word, _Named(str(key), value)) for key, value in values.items()]
            if isinstance(values, dict)
            else [(word, _Named(str(value), value)) for value in values]
            for word, values in each.items()
        ]
        for combination in itertools.product(*named):
            yield self.words | dict(combination)

    def _filled(self, value: Any, words: Mapping[str, Any], at: str) -> Any:
        """Replace `{word}` everywhere in a value; a text that is nothing else takes the word's own value."""
        if isinstance(value, dict):
            return {
                self._filled(key, words, at): self._filled(inner, words, at) for key, inner in value.items()
            }
        if isinstance(value, list):
            filled = [(inner, self._filled(inner, words, at)) for inner in value]
            spliced = [
                new if isinstance(new, list) and isinstance(old, str) else [new] for old, new in filled
            ]
            return list(itertools.chain.from_iterable(spliced))
        if not isinstance(value, str):
            return value
        for word in _WORD.findall(value):
            if words.get(word) is None:
                known = [name for name, content in words.items() if content is not None]
                self.mistakes.append(f"{at}: {{{word}}} has no value; {allowed(known, word)}.")
                return value
        if whole := _WORD.fullmatch(value):
            content = words[whole[1]]
            return self._inner(whole[1], content.value if isinstance(content, _Named) else content, words, at)
        return _WORD.sub(lambda match: str(self._inner(match[1], str(words[match[1]]), words, at)), value)

    def _inner(self, word: str, content: Any, words: Mapping[str, Any], at: str) -> Any:
        """Replace the words within the value of a word, which may not name itself."""
        return self._filled(content, {name: other for name, other in words.items() if name != word}, at)

    def _resolved(self, value: Any, known: Sequence[str], at: str) -> Any:
        """Resolve the patterns in the lists of candidates of a hypothesis."""
        if isinstance(value, list):
            return [self._resolved(inner, known, at) for inner in value]
        if not isinstance(value, dict):
            return value
        return {
            key: self._chosen(inner, known, f"{at}.{key}")
            if key in ("candidates", "curve") and isinstance(inner, list)
            else self._resolved(inner, known, at)
            for key, inner in value.items()
        }

    def _chosen(self, patterns: Sequence[str], known: Sequence[str], at: str) -> list[str]:
        """Return the names that patterns match, in the order of `known`; plain names stay as they are."""
        chosen: list[str] = []
        for pattern in map(str, patterns):
            matches = [pattern] if not re.search(r"[*?[]", pattern) else fnmatch.filter(known, pattern)
            if not matches:
                self.mistakes.append(f"{at}: {pattern!r} matches nothing; {allowed(known, pattern)}.")
            chosen += [name for name in matches if name not in chosen]
        return chosen

    def _pin(self, sections: dict[str, Any]) -> None:
        """Replace the branches of hub sources by the commits they are at."""
        for kind in ("models", "datasets"):
            for name, entry in sections[kind].items():
                match = re.fullmatch(r"hub:(.+?)@(.+)", str(entry.get("source", "")))
                if match and not re.fullmatch(r"[0-9a-f]{40}", match[2]):
                    before = self.held.get(kind, {}).get(name, {}).get("source", "")
                    try:
                        pinned = f"hub:{match[1]}@"
                        entry["source"] = (
                            before
                            if before.startswith(pinned)
                            else f"{pinned}{commit_of(kind, match[1], match[2])}"
                        )
                    except Exception as error:  # the network's, and whatever the hub's client makes of it
                        self.mistakes.append(
                            f"{kind}.{name}: the hub does not say at which commit {match[1]}@{match[2]} is "
                            f"({type(error).__name__}); try again with a network, or write a commit of 40 "
                            "digits into the file."
                        )


class _Named(NamedTuple):
    """A value of `each` and the word that stands for it in names."""

    word: str
    value: Any

    def __str__(self) -> str:
        return self.word


def _artifacts(sections: Mapping[str, Any]) -> list[str]:
    """Return every model that the sections define, in their order."""
    bases = [f"base/{name}" for name in sections["models"]]
    stages = [stage for stage in ("noise", *RECIPES) if stage != "teach"]
    recipes = [f"{stage}/{name}" for stage in dict.fromkeys(stages) for name in sections[stage]]
    return bases + recipes


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return `shared` with the fields of `own`; lists of candidates are joined."""
    merged = dict(shared)
    for name, value in own.items():
        place = f"{at}{name}"
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value, f"{place}.")
        elif place in ("evaluate.candidates", "profile.candidates"):
            merged[name] = [*merged.get(name, []), *value]
        else:
            merged[name] = value
    return merged
