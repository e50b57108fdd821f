"""Finetune: train a model to recover what compression cost it."""

from stages.core import artifact, checkpoint, resume, run
from stages.core.atomic import SCRATCH
from stages.core.params import Params
from stages.finetune import curve, examples, grids, objective, training
from stages.finetune.checkpoints import Checkpoints


def finetune(params: Params, name: str) -> None:
    """Fine-tune the source of recipe `name` into data/models/finetune/<name>."""
    recipe = params.finetune[name]
    artifact.check_family(recipe)
    grids.check(recipe)
    params.run.start()
    told = recipe.model_dump(mode="json")
    folder = resume.place(SCRATCH / "finetune" / name, told, recipe.train.dataset, params.run)
    checkpoints = Checkpoints(folder, recipe.checkpoint_every)
    with training.memory(recipe):
        model = artifact.load_model(recipe.source, params.run, dequantize=True)
        found = examples.load(recipe.train, artifact.load_tokenizer(recipe.source), model.config)
        objective.check_packing(model, found.train)
        arm = recipe.arm(model, grids.source_grid(recipe.source, model))
        points = training.train(f"finetune {name}", recipe, arm, found, checkpoints)
        finished = arm.finish()
        curve.write(points, name)
        notes = {
            **finished.notes,
            "steps": points[-1].step,
            "tokens": points[-1].tokens,
            "trained_parameters": sum(parameter.numel() for parameter in arm.trained().values()),
            # Of the model as it is written: after a merge or a rounding on the source's grid.
            "held_out_loss": training.held_out_loss(finished.model, found.held_out, recipe.batch_size),
        }
        checkpoint.save(
            f"finetune/{name}",
            finished.model,
            told,
            params.run,
            keep=finished.keep,
            quantized=finished.codes,
            notes=notes,
        )
    checkpoints.clear()


if __name__ == "__main__":
    run.entry("finetune", finetune, lambda params: list(params.finetune))
