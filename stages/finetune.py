"""Finetune: train a model to recover what compression cost it."""

from stages.core.files import SCRATCH
from stages.core.run import Run
from stages.corpus import examples
from stages.job.entry import entry
from stages.model import artifact, checkpoint, resume
from stages.recovery import curve, grids, objective, training
from stages.recovery.saves import Checkpoints
from stages.recovery.tuning import Tuning


def finetune(recipe: Tuning, run: Run, name: str) -> None:
    """Fine-tune the recipe's source into data/models/finetune/<name>."""
    artifact.check_family(recipe)
    grids.check(recipe)
    run.start()
    folder = resume.place(SCRATCH / "finetune" / name, "finetune", recipe, run)
    checkpoints = Checkpoints(folder, recipe.checkpoint_every)
    with training.memory(recipe):
        model = artifact.load_model(recipe.source, run, dequantize=True)
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
            recipe,
            run,
            keep=finished.keep,
            quantized=finished.codes,
            notes=notes,
        )
    checkpoints.clear()


if __name__ == "__main__":
    entry(finetune)
