"""What a comparison runs: ways to train a bundle, numbers of labelled cases, seeds, and trials of the learning rates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from monai_petl.compare.records import write_record
from monai_petl.files.json_files import read_object, require_fields

__all__ = ["FACTORS", "Job", "Plan", "parse_budget", "parse_methods", "parse_shots"]

FACTORS = (1.0, 0.3, 3.0, 0.1, 10.0)  # of the bundle's learning rates, in the order in which they are tried
RESERVED = {
    "bundle_root",
    "ckpt_dir",
    "num_labelled",
    "output_dir",
    "seed",
    "val_interval",
    "validate::datalist::section",
}
REMEDY = "use --shots for labelled cases, --seeds for the seeds, --section for the scored cases, --out for the files"
RATES = ("lr", "delta_lr", "backbone_lr")
REMEDY_PLAN = "Give another folder as --out, or delete this one"
PLAN: dict[str, tuple[type, ...]] = {"bundle": (str,), "section": (str,), "settings": (dict,), "methods": (dict,)}
UNITS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Job:
    """One training and its scoring.

    Args:
        phase: ``"tune"`` is scored on the validation section, ``"test"`` on that of the plan.
        method: label of the way to train.
        shots: labelled cases; ``None`` for all.
        seed: of the choice of cases and of the training.
        factor: of the bundle's learning rates.
    """

    phase: str
    method: str
    shots: int | None
    seed: int
    factor: float = 1.0

    @property
    def key(self) -> str:
        """Name of its record."""
        shots = "all" if self.shots is None else self.shots
        name = re.sub(r"[^\w.-]+", "-", self.method)
        tail = f"_x{self.factor:g}" if self.phase == "tune" or self.factor != 1 else ""
        return f"{self.phase}_{name}_{shots}_seed{self.seed}{tail}"


@dataclass(frozen=True)
class Plan:
    """What is compared, on what.

    Args:
        bundle: its folder.
        methods: label -> top-level ids of the bundle, ``{"lora": {"method": "lora"}}``. The key ``bundle`` is no id: it names
            the folder of another bundle, which is run with the same settings.
        shots: numbers of labelled cases; ``None`` for all.
        seeds: how many, counted from 0.
        trials: the most learning rates that are tried for a method, of :data:`FACTORS`.
        seconds: no further rate is tried for a method where its trials would take longer than this together.
        settings: top-level ids that all trainings share, such as ``{"dataset_dir": ..., "epochs": 4}``.
        section: of the data list, for the scores.
        pictures: how many cases are drawn.
        margin: what a smaller method that ties with the best may lie behind it in the mean, to be advised in its place.
    """

    bundle: str
    methods: Mapping[str, Mapping[str, Any]]
    shots: Sequence[int | None] = (None,)
    seeds: int = 3
    trials: int = 1
    seconds: float = float("inf")
    settings: Mapping[str, Any] = field(default_factory=dict)
    section: str = "test"
    pictures: int = 3
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.seeds, int) or not self.methods or not self.shots or self.seeds < 1:
            raise ValueError(
                "a comparison needs at least one method, one number of labelled cases and one seed; got "
                f"{len(self.methods)}, {len(self.shots)} and {self.seeds!r}"
            )
        taken = RESERVED & {name for ids in (self.settings, *self.methods.values()) for name in ids}
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))}: the comparison sets this itself; {REMEDY}")
        keys = {job.key for job in self.jobs()}
        if len(keys) < len(self.jobs()):
            raise ValueError(f"two methods would share a record; their names are too alike: {', '.join(self.methods)}")

    def jobs(self) -> list[Job]:
        """The runs whose scores are reported, the first seed of everything first."""
        return [Job("test", m, shots, seed) for seed in range(self.seeds) for shots in self.shots for m in self.methods]

    def tuning(self, method: str) -> list[Job]:
        """Trials of a method's learning rates, with the fewest labelled cases and seed 0."""
        fewest = min(self.shots, key=lambda shots: shots or float("inf"))
        return [Job("tune", method, fewest, 0, factor) for factor in FACTORS[: self.trials]]

    def bundle_of(self, method: str) -> str:
        """The bundle that a method is run by."""
        return str(self.methods[method].get("bundle", self.bundle))

    def ids_of(self, method: str) -> dict[str, Any]:
        """The settings and a method's own ids."""
        return {**self.settings, **{name: value for name, value in self.methods[method].items() if name != "bundle"}}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return json.loads(json.dumps(asdict(self), default=str))

    def save(self, folder: Path) -> None:
        """Write plan.json, or compare with the one that is there.

        Raises:
            ValueError: the folder holds a comparison of another bundle or with other settings.
        """
        path, now = folder / "plan.json", self.to_dict()
        if path.exists():
            before = read_object(path, REMEDY_PLAN)
            require_fields(path, before, PLAN, REMEDY_PLAN)
            changed = [name for name in ("bundle", "section") if before[name] != now[name]]
            old, new = before["settings"], now["settings"]
            changed += [
                f"{n} ({old.get(n)!r} there, {new.get(n)!r} now)"
                for n in sorted({*old, *new})
                if old.get(n) != new.get(n)
            ]
            changed += [
                f"method {n}"
                for n in now["methods"]
                if n in before["methods"] and before["methods"][n] != now["methods"][n]
            ]
            if changed:
                raise ValueError(
                    f"{folder} holds a comparison that differs in {', '.join(changed)}; give another folder as --out"
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_record(path, now)


def parse_methods(text: Any) -> dict[str, dict[str, Any]]:
    """``"lora,head"``, a list of names, or a JSON file of ``{label: {id: value}}``.

    Raises:
        FileNotFoundError: there is no such JSON file.
        ValueError: it holds something else.
    """
    if isinstance(text, str) and text.endswith(".json"):
        form = 'It must hold {label: {id: value}}, such as {"LoRA 4": {"method": "lora"}}'
        arms = read_object(Path(text), form)
        require_fields(Path(text), arms, dict.fromkeys(arms, (dict,)), form)
        for label, ids in arms.items():
            if not isinstance(ids.get("bundle", ""), str):
                raise ValueError(f"{text}: 'bundle' of {label!r} must be the folder of a bundle, got {ids['bundle']!r}")
        return arms
    return {name: {"method": name} for name in _items(text)}


def parse_shots(text: Any) -> tuple[int | None, ...]:
    """``"3,10,all"`` -> ``(3, 10, None)``.

    Raises:
        ValueError: something is neither a positive whole number nor ``all``.
    """
    found: list[int | None] = []
    for item in _items(text):
        if item != "all" and not (item.isdigit() and int(item) > 0):
            raise ValueError(f"--shots takes positive whole numbers and 'all', such as 3,10,all; got {item!r}")
        found.append(None if item == "all" else int(item))
    return tuple(dict.fromkeys(found))


def parse_budget(text: Any) -> tuple[int, float]:
    """``"10min"`` -> as many trials as there are, 600.0 seconds; ``3`` -> 3 trials, any time.

    Raises:
        ValueError: it is neither.
    """
    given = str(text).strip()
    if given.isdigit() and 1 <= int(given) <= len(FACTORS):
        return int(given), float("inf")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", given)
    if not match:
        raise ValueError(f"--budget takes a time such as 90s, 10min or 2h, or 1 to {len(FACTORS)} trials; got {text!r}")
    return len(FACTORS), float(match[1]) * UNITS[match[2]]


def _items(text: Any) -> list[str]:
    parts = text.split(",") if isinstance(text, str) else text if isinstance(text, list | tuple) else [text]
    return [str(part).strip() for part in parts if str(part).strip()]
