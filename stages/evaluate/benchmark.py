"""lm-eval's stock tasks by name, on data the download stage has brought in.

A task is used as lm-eval ships it but for where its data comes from: the parquet files of
`data/datasets/<suite>` take the hub's place, so nothing is fetched. A split the task names and the data
lacks (lm-eval asks for a training split even at zero shots) is left out.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.calibration import DATASETS
from stages.core.errors import Refusal
from stages.core.schema import Strict
from stages.evaluate.lm_tasks import rows, run_tasks

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class BenchmarkSuite(Strict):
    """One stock task of lm-eval, limited to its first `limit` items (null: all)."""

    task: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    shots: Annotated[int, Field(ge=0)] | None = None
    """null: as many as the task's own config says."""
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)]
    max_gen_toks: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; null: as the task says."""
    chat_template: bool = False

    def evaluate(self, lm: "HFLM", name: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Score rows of every per-item metric the task has, and one sample row an item and metric."""
        folder = DATASETS / name
        if (folder / "nltk_data").exists():
            import nltk

            nltk.data.path.insert(0, str((folder / "nltk_data").resolve()))
        result = run_tasks(
            lm, [self._task(folder)], limit=self.limit, chat_template=self.chat_template, seed=seed
        )
        kind = result["configs"][self.task]["output_type"]
        scores, samples = rows(
            result,
            self.task,
            lm=lm,
            name=self.task,
            readout="generation" if kind == "generate_until" else "likelihood",
            floor=None,
            chat_template=self.chat_template,
            seed=seed,
        )
        if not scores:
            raise Refusal(f"{self.task} scores no single item ({kind}); only tasks that do are served.")
        return scores, samples

    def _task(self, folder: Path) -> dict[str, Any]:
        """The stock task's config with its data taken from `folder`.

        Raises:
            Refusal: lm-eval has no such task, or the data has no split it can be scored on.
        """
        import datasets
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        manager = TaskManager()
        if self.task not in manager.all_subtasks:
            raise Refusal(f"lm-eval has no task {self.task!r}; `lm-eval ls tasks` prints those it has.")
        # lm-eval gives no public way to change a stock task before it asks the hub for its data.
        config = load_yaml(manager.task_index[self.task].yaml_path)
        if "class" in config:
            raise Refusal(
                f"{self.task} is a program of lm-eval's rather than a task in YAML; it is not served."
            )
        files = {file.stem: str(file) for file in sorted(folder.glob("*.parquet"))}
        has = ", ".join(files) or "none"
        scored = config.get("test_split") or config.get("validation_split")
        examples = config.get("fewshot_split") or config.get("training_split")
        for split in SPLITS:
            if config.get(split) not in files:
                config[split] = None
        if not (config["test_split"] or config["validation_split"]):
            raise Refusal(f"{folder} has the splits {has}; {self.task} is scored on {scored}.")
        if self.shots is not None:
            config["num_fewshot"] = self.shots
        written = (config.get("fewshot_config") or {}).get("samples")
        if config.get("num_fewshot") and not (written or examples in files):
            raise Refusal(
                f"{folder} has the splits {has}; {self.task} takes its {config['num_fewshot']} examples from "
                f"{examples or 'the items it is scored on'}; bring that split in, or set shots: 0."
            )
        if self.max_gen_toks is not None:
            config["generation_kwargs"] = {
                **(config.get("generation_kwargs") or {}),
                "max_gen_toks": self.max_gen_toks,
            }
        for structure in ("tag", "group", "task_list"):
            config.pop(structure, None)
        return config | {
            "task": self.task,
            "custom_dataset": lambda **_: {
                split: datasets.Dataset.from_parquet(file) for split, file in files.items()
            },
        }
