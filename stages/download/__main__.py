"""Download: bring in a model or data set from its pinned source, checked against its hash.

`base/<model>` is written to data/models/base/<model>, `datasets/<name>` to data/datasets/<name>.
"""

from stages.core import artifact, run
from stages.core.blocks import linears
from stages.core.calibration import DATASETS
from stages.core.errors import Refusal
from stages.core.params import Params
from stages.core.run import write_json


def download(params: Params, name: str) -> None:
    """Download `base/<model>` or `datasets/<name>`."""
    params.run.start()
    kind, key = name.split("/")
    if kind == "base":
        _model(params, key)
    else:
        with artifact.writing(DATASETS / key) as folder:
            dataset = params.datasets[key]
            made = dataset.write(folder)
            write_json(folder / "dataset.json", {"dataset": key, **dataset.model_dump(mode="json"), **made})


def _model(params: Params, key: str) -> None:
    wanted = params.models[key]
    with artifact.writing(artifact.MODELS / "base" / key) as folder:
        facts = wanted.write(folder, params.run.torch_dtype)
        model = artifact.finish_base(f"base/{key}", folder, {"name": key, **wanted.model_dump(mode="json"), **facts})
        widths = tuple(sorted({linear.weight.shape[1] for linear in linears(model)}))
        if widths != wanted.in_features:
            raise Refusal(
                f"models.{key}.in_features is {list(wanted.in_features)}, the model has {list(widths)}; "
                f"write in_features: {list(widths)}."
            )


if __name__ == "__main__":
    run.entry(
        "download",
        download,
        lambda params: [f"base/{key}" for key in params.models] + [f"datasets/{key}" for key in params.datasets],
    )
